"""`--max_perplexity`, `--min_perplexity`, `--classifier`: which documents a network finds too poor to be trained on.

A network needs about a third of the time that training on a document takes. Therefore only the beginnings are looked
at, and only of documents that would be trained on: of a selection, in the order in which it takes them, until there is
enough. Text that is held out or aimed at is not judged. Scores are kept in the work directory, so that a dry run, or a
run that was killed, is not paid for twice.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cartilha.config import PrepareConfig
from cartilha.console import progress
from cartilha.corpus.pieces import PIECE, at_the_ends, each, evenly, large_array, pieces
from cartilha.errors import UserError
from cartilha.preparation.index import DocumentIndex, chosen_ids, first_ids, read_documents
from cartilha.tokens.tokenizer import TextTokenizer

HEAD_TOKENS = 512  # of each document
SAMPLE_DOCUMENTS = 500  # whose scores say what a share of the documents stands for
AT_ONCE = 256
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NUM_SHOWN = 3
SHOWN_TOKENS = 24

Scorer = Callable[[Sequence[np.ndarray]], np.ndarray]  # from the first ids of documents to their scores, float


@dataclass(frozen=True)
class Limit:
    """A score; or, as `is_share`, the share of the documents whose scores lie beyond it."""

    value: float
    is_share: bool


@dataclass(frozen=True)
class Signal:
    """A score that documents have under a model, and the limits of those that are kept."""

    name: str  # perplexity or score
    reference: str  # the MODEL argument
    low: Limit | None
    high: Limit | None = None

    @property
    def key(self) -> str:
        """A hash by which kept scores are found again; a model in a directory must not have changed."""
        path = Path(os.path.expanduser(self.reference))
        files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr((self.name, self.reference, stamps)).encode("utf-8")).hexdigest()[:16]


def read_signals(config: PrepareConfig) -> tuple[Signal, ...]:
    """The signals that are asked for; a UserError says what is wrong with their limits."""
    found = []
    low, high = _limit(config.min_perplexity, "--min_perplexity"), _limit(config.max_perplexity, "--max_perplexity")
    if low or high:
        found.append(Signal("perplexity", config.model, low, high))
        values = [limit.value for limit in (low, high) if limit and not limit.is_share]
        if any(value < 1 for value in values) or (len(values) == 2 and values[0] >= values[1]):
            raise UserError("A perplexity is 1 or more, and --min_perplexity is below --max_perplexity.")
        if sum(limit.value for limit in (low, high) if limit and limit.is_share) >= 1:
            raise UserError("--min_perplexity and --max_perplexity leave out everything; give smaller shares.")
    if config.min_score is not None and config.classifier is None:
        raise UserError("--min_score is for the scores of a classifier; name one with --classifier.")
    if config.classifier is not None:
        if config.min_score is None and not config.dry_run:
            raise UserError(
                "--classifier needs to know which documents are kept; add --min_score, such as 3 or 20%, or look at"
                " the scores first with --dry_run."
            )
        found.append(Signal("score", config.classifier, _limit(config.min_score, "--min_score")))
    return tuple(found)


def _limit(text: str | None, option: str) -> Limit | None:
    if text is None:
        return None
    is_share = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if is_share else 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (is_share and not 0 <= value < 1):
        raise UserError(f"{option} is a number, or a share of the documents such as 10%, not {text!r}.")
    return Limit(value, is_share)


class Judge:
    """Scores documents, and tells those within the limits of every signal from the others.

    Attributes:
        verdicts: Of each document, 0 or one more than the number of its reason in `reasons`: int8.
        reasons: Why documents are left out.
    """

    def __init__(self, index: DocumentIndex, signals: Sequence[tuple[Signal, Scorer]]) -> None:
        self._index = index
        self._signals = list(signals)
        self._scores = [_kept_scores(index, signal) for signal, _ in self._signals]
        self._limits: list[tuple[float, float]] = []
        self._seen = large_array(index.positions.shape, bool)
        self.verdicts = large_array(index.positions.shape, np.int8)
        self.reasons = [f"{signal.name}:{side}" for signal, _ in self._signals for side in ("low", "high")]

    @classmethod
    def of(cls, index: DocumentIndex, signals: Sequence[Signal], scorers: Sequence[Scorer]) -> Judge | None:
        """The judge, if there is anything to judge by."""
        return cls(index, list(zip(signals, scorers, strict=True))) if signals else None

    def begin(self, pool: np.ndarray) -> None:
        """Settle the limits that are shares, by a sample of the documents that may be taken (bool)."""
        sample = evenly(pool, SAMPLE_DOCUMENTS)
        for number, (signal, _) in enumerate(self._signals):
            limits = [-math.inf, math.inf]
            for side, limit in enumerate((signal.low, signal.high)):
                if limit is not None and limit.is_share:
                    share = 1 - limit.value if side else limit.value
                    limits[side] = float(np.quantile(self._scored(number, sample), share))
                elif limit is not None:
                    limits[side] = limit.value
            self._limits.append((limits[0], limits[1]))

    def passes(self, numbers: np.ndarray) -> np.ndarray:
        """Which of these documents, given by number, are within the limits: bool."""
        result = np.ones(len(numbers), bool)
        for number, (low, high) in enumerate(self._limits):
            own = numbers[result]  # what one signal has left out, the next does not look at
            scores = self._scored(number, own)
            verdicts = np.where(scores < low, 1, np.where(scores > high, 2, 0))
            self.verdicts[own] = np.where(verdicts, verdicts + 2 * number, 0)
            result[result] = verdicts == 0
        self._seen[numbers] = True
        return result

    def _scored(self, number: int, numbers: np.ndarray) -> np.ndarray:
        """The scores of documents, computed where they are not known yet."""
        kept, (signal, scorer) = self._scores[number], self._signals[number]
        unknown = numbers[np.isnan(kept[numbers])]
        if not len(unknown):
            return np.asarray(kept[numbers])
        with progress(f"Computing the {signal.name} of documents", float(len(unknown)), "documents") as advance:
            for begin in range(0, len(unknown), AT_ONCE):
                own = unknown[begin : begin + AT_ONCE]
                kept[own] = scorer(list(first_ids(self._index, own.tolist(), HEAD_TOKENS)))
                advance(float(len(own)))
        return np.asarray(kept[numbers])

    @property
    def left_out(self) -> dict[str, int]:
        """How many documents are left out, by reason."""
        counts = np.zeros(len(self.reasons) + 1, np.int64)
        for piece in pieces(len(self.verdicts)):
            counts += np.bincount(self.verdicts[piece], minlength=len(counts))
        return {reason: int(count) for reason, count in zip(self.reasons, counts[1:], strict=True) if count}

    def facts(self, tokenizer: TextTokenizer) -> list[dict[str, Any]]:
        """What the store's record says of each signal: limits, quantiles of the scores, the extreme documents."""
        rows = []
        for (signal, _), kept, limits in zip(self._signals, self._scores, self._limits, strict=True):
            seen = each(lambda own, score: own & ~np.isnan(score), self._seen, kept)
            sample = kept[evenly(seen, PIECE)]
            values = np.quantile(sample, QUANTILES).tolist() if len(sample) else []
            lowest, highest = at_the_ends(kept, seen, NUM_SHOWN)
            rows.append(
                {
                    "signal": signal.name,
                    "model": signal.reference,
                    "kept": [limit if math.isfinite(limit) else None for limit in limits],
                    "num_scored": int(np.count_nonzero(seen)),
                    "quantiles": dict(zip(map(str, QUANTILES), values, strict=False)),
                    "lowest": [self._shown(kept, tokenizer, place) for place in lowest.tolist()],
                    "highest": [self._shown(kept, tokenizer, place) for place in highest.tolist()],
                }
            )
        return rows

    def _shown(self, scores: np.ndarray, tokenizer: TextTokenizer, number: int) -> dict[str, Any]:
        begins = tokenizer.decode(next(first_ids(self._index, [number], SHOWN_TOKENS)))
        return {"doc_id": self._index.label(number, "doc_id"), "score": float(scores[number]), "begins": begins}

    def rejects(self, tokenizer: TextTokenizer) -> Iterator[dict[str, Any]]:
        """The documents that are left out, in order, each with its score; the text is that of its tokens."""
        for task, begin, end in self._index.shards():
            own = self.verdicts[begin:end] > 0
            if not own.any():
                continue
            rows = read_documents(task).select(["doc_id", "source", "num_tokens"]).filter(pa.array(own)).to_pylist()
            ids = np.concatenate(list(chosen_ids(task, self._index.num_tokens[begin:end], own)))
            first = 0
            for number, row in zip((begin + np.flatnonzero(own)).tolist(), rows, strict=True):
                verdict, length = int(self.verdicts[number]) - 1, row["num_tokens"]
                found = {"id": row["doc_id"], "source": row["source"], "reason": self.reasons[verdict]}
                score = float(self._scores[verdict // 2][number])
                yield {**found, "score": score, "text": tokenizer.decode(ids[first : first + length])}
                first += length


def _kept_scores(index: DocumentIndex, signal: Signal) -> np.ndarray:
    """The scores of all documents, float32, NaN where unknown; a file in the work directory, mapped."""
    path = index.tasks[0].work / f"scores-{signal.key}.npy"
    if path.exists():
        kept = np.lib.format.open_memmap(path, mode="r+")
        if kept.shape == index.positions.shape and kept.dtype == np.float32:
            return kept
    scores = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=index.positions.shape)
    scores[:] = np.nan
    return scores
