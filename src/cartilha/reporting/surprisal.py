"""surprisal.parquet as the page needs it: each token's surprisal, rank and likeliest tokens at each evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ["step", "document", "doc_id", "position", "text", "nll", "rank"]
LIKELIEST = ["likeliest_texts", "likeliest_probabilities"]
MAX_STEPS = 12  # positions of the page's slider

# A token's surprisal in bits, its rank (1: the likeliest), and texts and probabilities of the likeliest tokens.
TokenScore = tuple[float, int, list[tuple[str, float]]]


@dataclass(frozen=True)
class SurprisalDocument:
    """A held-out document's first tokens; `scores` has one list for each of the steps, with one entry per token."""

    doc_id: str
    texts: tuple[str, ...]
    scores: tuple[list[TokenScore], ...]


@dataclass(frozen=True)
class Surprisal:
    """A few documents at the evaluations of a run (`MAX_STEPS` of them at most, the first and the last among them)."""

    steps: tuple[int, ...]
    documents: tuple[SurprisalDocument, ...]


def read_surprisal(path: Path, missing: list[str]) -> Surprisal | None:
    """The file's documents; None if it is absent, unreadable or empty, and `missing` then says so."""
    if not path.is_file():
        missing.append(path.name)
        return None
    try:
        found = _documents(_rows(path))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, OverflowError):
        missing.append(f"{path.name} (not readable)")
        return None
    if not found.steps:
        missing.append(f"{path.name} (empty)")
        return None
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the steps that the page can show."""
    steps = sorted(set(pq.read_table(path, columns=["step"])["step"].to_pylist()))
    chosen = [steps[i] for i in _spread(len(steps), MAX_STEPS)]
    table = pq.read_table(path, columns=COLUMNS + LIKELIEST, filters=[("step", "in", chosen)] if chosen else None)
    return list(table.to_pylist())


def _documents(rows: Sequence[dict[str, Any]]) -> Surprisal:
    by_document: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: (row["document"], row["step"], row["position"])):
        by_document.setdefault(row["document"], {}).setdefault(row["step"], []).append(row)
    steps = tuple(sorted({row["step"] for row in rows}))
    documents = []
    for by_step in by_document.values():
        if set(by_step) == set(steps) and len({len(tokens) for tokens in by_step.values()}) == 1:
            first = by_step[steps[0]]
            scores = tuple([_score(row) for row in by_step[step]] for step in steps)
            documents.append(SurprisalDocument(str(first[0]["doc_id"]), tuple(str(r["text"]) for r in first), scores))
    return Surprisal(steps, tuple(documents))


def _score(row: dict[str, Any]) -> TokenScore:
    likeliest = zip(row["likeliest_texts"], row["likeliest_probabilities"], strict=True)
    return float(row["nll"]) / math.log(2), int(row["rank"]), [(str(text), float(p)) for text, p in likeliest]


def page_data(surprisal: Surprisal, num_documents: int, max_steps: int = MAX_STEPS) -> dict[str, Any]:
    """Compact values for the page's script.

    Texts are numbered; a score is [bits x 1,000, rank, text, probability x 10,000, text, probability x 10,000, ...].
    """
    steps = _spread(len(surprisal.steps), max_steps)
    texts: dict[str, int] = {}

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    def compact(score: TokenScore) -> list[int]:
        bits, rank, likeliest = score
        return [round(1000 * bits), rank, *(v for text, p in likeliest for v in (number(text), round(10_000 * p)))]

    documents = [
        {
            "id": document.doc_id,
            "tokens": [number(text) for text in document.texts],
            "scores": [[compact(score) for score in document.scores[step]] for step in steps],
        }
        for document in surprisal.documents[:num_documents]
    ]
    return {"steps": [surprisal.steps[i] for i in steps], "documents": documents, "texts": list(texts)}


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` places, evenly, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)}) if limit > 1 else [count - 1]
