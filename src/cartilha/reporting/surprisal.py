"""surprisal.parquet as the page needs it: each token's surprisal, rank and likeliest tokens at each evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LIKELIEST = ["likeliest_texts", "likeliest_probabilities"]
COLUMNS = ["step", "document", "doc_id", "position", "text", "nll", "rank", *LIKELIEST]
MAX_STEPS = 12  # positions of the page's slider


@dataclass(frozen=True)
class Surprisal:
    """The first tokens of a few held-out documents at the evaluations of a run, as the page shows them.

    Each document has its `id`, the texts of its `tokens`, and `scores`: for each step a list with one score per token,
    which is [bits x 1,000, rank (1: the likeliest), text, probability x 10,000, text, ...].
    """

    steps: list[int]  # of the evaluations: `MAX_STEPS` at most, the first and the last among them
    documents: list[dict[str, Any]]


def read_surprisal(path: Path, missing: list[str]) -> Surprisal | None:
    """The file's documents; None if it is absent, unreadable or empty, and `missing` then says so."""
    if not path.is_file():
        missing.append(path.name)
        return None
    try:
        found = _surprisal(_rows(path))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, OverflowError):
        missing.append(f"{path.name} (not readable)")
        return None
    if not found.steps:
        missing.append(f"{path.name} (empty)")
        return None
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the steps that the page can show, by document, step and position."""
    steps = sorted(set(pq.read_table(path, columns=["step"])["step"].to_pylist()))
    chosen = [steps[i] for i in _spread(len(steps), MAX_STEPS)]
    table = pq.read_table(path, columns=COLUMNS, filters=[("step", "in", chosen)] if chosen else None)
    return list(table.sort_by([(name, "ascending") for name in ("document", "step", "position")]).to_pylist())


def _surprisal(rows: Sequence[dict[str, Any]]) -> Surprisal:
    by_document: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        by_document.setdefault(row["document"], {}).setdefault(row["step"], []).append(row)
    steps = sorted({row["step"] for row in rows})
    documents = []
    for by_step in by_document.values():
        if len(by_step) == len(steps) and len({len(tokens) for tokens in by_step.values()}) == 1:
            first = by_step[steps[0]]
            scores = [[_score(row) for row in by_step[step]] for step in steps]
            tokens = [str(row["text"]) for row in first]
            documents.append({"id": str(first[0]["doc_id"]), "tokens": tokens, "scores": scores})
    return Surprisal(steps, documents)


def _score(row: dict[str, Any]) -> list[int | str]:
    score: list[int | str] = [round(1000 * row["nll"] / math.log(2)), int(row["rank"])]
    for text, probability in zip(row["likeliest_texts"], row["likeliest_probabilities"], strict=True):
        score += [str(text), round(10_000 * probability)]
    return score


def page_data(surprisal: Surprisal, num_documents: int, max_steps: int = MAX_STEPS) -> dict[str, Any]:
    """Values for the page's script: the first documents at some of the steps, with their texts numbered."""
    steps = _spread(len(surprisal.steps), max_steps)
    texts: dict[str, int] = {}

    def numbered(values: Sequence[int | str]) -> list[int]:
        return [texts.setdefault(value, len(texts)) if isinstance(value, str) else value for value in values]

    documents = [
        {
            "id": document["id"],
            "tokens": numbered(document["tokens"]),
            "scores": [[numbered(score) for score in document["scores"][step]] for step in steps],
        }
        for document in surprisal.documents[:num_documents]
    ]
    return {"steps": [surprisal.steps[i] for i in steps], "documents": documents, "texts": list(texts)}


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` places, evenly, with the first and the last."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)}) if limit > 1 else [count - 1]
