"""Which documents of a pool are trained on: drawn at random, or by how much they read like a target.

Importance resampling (Xie et al. 2023, arXiv:2302.03169): each document has the log of its probability in the target
over that in the pool (`tokens.ngrams`), and those with the highest sum of that weight and a Gumbel variable are taken,
which draws without replacement in proportion to the weights (Vieira 2014). Everything follows from the documents, the
target and the seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cartilha.errors import UnfinishedError, counted
from cartilha.preparation.executors import Executor
from cartilha.preparation.index import DocumentIndex, shard_ids
from cartilha.preparation.shard_work import ShardTask
from cartilha.tokens import ngrams

FEW_DOCUMENTS = 50  # a target of so few tells little of what it is like
PIECE_TOKENS = 1 << 20  # looked at together; a longer document loses the pair where it is cut
HISTOGRAM_BINS = 20


@dataclass(frozen=True)
class Amount:
    """How much of the pool is taken: so many tokens, or a share of its tokens; `at_most`: all if it has fewer."""

    value: int | float
    at_most: bool = False

    def tokens(self, pool_tokens: int) -> int:
        """The tokens to take; an UnfinishedError if the pool has fewer."""
        if isinstance(self.value, float):
            return round(self.value * pool_tokens)
        if self.at_most:
            return min(self.value, pool_tokens)
        if self.value > pool_tokens:
            raise UnfinishedError(
                f"--select_tokens {self.value:,} is more than the {counted(pool_tokens, 'token')} that there are to"
                " choose from; give fewer, or more text."
            )
        return self.value


@dataclass(frozen=True)
class Chosen:
    """What was chosen; arrays have the shape (num_documents,).

    Attributes:
        mask: Whether each document is trained on, bool.
        pool: Whether it could be chosen, bool.
        weights: The log weight of each document of the pool, in nats of a document of average length, float64.
        ratios: The log ratio of each n-gram bucket (`ngrams.log_ratios`); None without a target.
        facts: What the store's record says of it.
    """

    mask: np.ndarray
    pool: np.ndarray
    weights: np.ndarray
    ratios: np.ndarray | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Weighing:
    """The work on the ids of one shard: to count n-grams by group of document, or to weigh documents by ratios."""

    task: ShardTask
    num_tokens: np.ndarray
    groups: np.ndarray  # int8, of each document; -1: none
    ratios: np.ndarray | None = None


def choose(
    index: DocumentIndex, pool: np.ndarray, target: np.ndarray, asked: tuple[Amount, int], executor: Executor[Any, Any]
) -> Chosen:
    """Choose documents of the pool; with the same weight for all if there is no target.

    Args:
        index: All documents.
        pool: Whether each document may be chosen, bool, shape (num_documents,).
        target: Whether each is part of the target.
        asked: How much to take, and the seed of the draw.
        executor: Does the work on shards.
    """
    amount, seed = asked
    num_tokens = amount.tokens(int(index.num_tokens[pool].sum()))
    weights, ratios, counts = np.zeros(len(pool)), None, None
    if target.any():
        counts = _counts(index, np.select([target, pool], [0, 1], -1), executor)
        ratios = ngrams.log_ratios(*counts)
        weights = _weights(index, pool, ratios, executor)
    keys = np.where(pool, weights + _gumbel(index.hashes, seed), -np.inf)
    order = np.argsort(-keys, kind="stable")
    num_taken = 1 + int(np.searchsorted(np.cumsum(index.num_tokens[order]), num_tokens))
    mask = np.zeros(len(pool), bool)
    mask[order[: min(num_taken, int(pool.sum()))]] = True
    facts: dict[str, Any] = {
        "num_documents": int(mask.sum()),
        "num_tokens": int(index.num_tokens[mask].sum()),
        "pool_documents": int(pool.sum()),
        "pool_tokens": int(index.num_tokens[pool].sum()),
        "seed": seed,
    }
    if counts is not None:
        after = _counts(index, np.where(mask, 0, -1), executor)[0]
        facts |= {
            "target_documents": int(target.sum()),
            "target_tokens": int(index.num_tokens[target].sum()),
            "divergence": {"pool": ngrams.divergence(*counts), "chosen": ngrams.divergence(counts[0], after)},
            "histogram": _histogram(weights[pool], weights[mask]),
        }
    return Chosen(mask, pool, weights, ratios, facts)


def _shards(index: DocumentIndex, groups: np.ndarray, ratios: np.ndarray | None = None) -> list[_Weighing]:
    bounds = zip(index.tasks, pairwise(index.starts), strict=True)
    found = [_Weighing(task, index.num_tokens[a:b], groups[a:b].astype(np.int8), ratios) for task, (a, b) in bounds]
    return [shard for shard in found if (shard.groups >= 0).any()]


def _counts(index: DocumentIndex, groups: np.ndarray, executor: Executor[Any, Any]) -> np.ndarray:
    """The n-grams of the documents of group 0 and of group 1: int64, shape (2, NUM_BUCKETS)."""
    return np.asarray(sum(executor(count_shard, _shards(index, groups)), np.zeros((2, ngrams.NUM_BUCKETS), np.int64)))


def _weights(index: DocumentIndex, pool: np.ndarray, ratios: np.ndarray, executor: Executor[Any, Any]) -> np.ndarray:
    """The log weight of each document of the pool (`log_weights`); zero for the others."""
    sums = np.zeros(len(pool), np.int64)
    firsts = {task.shard.number: start for task, start in zip(index.tasks, index.starts, strict=False)}
    for number, found in executor(weigh_shard, _shards(index, np.where(pool, 0, -1), ratios)):
        sums[firsts[number] : firsts[number] + len(found)] = found
    return log_weights(sums, index.num_tokens, index.num_tokens[pool])


def log_weights(sums: np.ndarray, num_tokens: ArrayLike, pool_tokens: np.ndarray) -> np.ndarray:
    """Log weights, in nats of a document as long as the pool's average, from the documents' log likelihood ratios.

    The sum of a document's log ratios grows with its length and would rank by it; their mean varies most in short
    documents, which chance would put first. The sum over the root of the number of n-grams does neither.
    """
    average = np.maximum(1, 2 * pool_tokens - 1).mean()
    return np.asarray(sums / ngrams.FIXED_POINT * np.sqrt(average / np.maximum(1, 2 * np.asarray(num_tokens) - 1)))


def count_shard(shard: _Weighing) -> np.ndarray:
    """The n-grams of a shard's documents by group: int64, shape (2, NUM_BUCKETS)."""
    counts = np.zeros((2, ngrams.NUM_BUCKETS), np.int64)
    for documents, num_tokens, ids in _pieces(shard):
        of_pieces = shard.groups[documents]
        for group in (0, 1):
            own = of_pieces == group
            if own.any():
                counts[group] += ngrams.count(ids if own.all() else ids[np.repeat(own, num_tokens)], num_tokens[own])
    return counts


def weigh_shard(shard: _Weighing) -> tuple[int, np.ndarray]:
    """The number of a shard, and the log likelihood ratio of each of its documents (`ngrams.FIXED_POINT`, int64)."""
    assert shard.ratios is not None
    sums = np.zeros(len(shard.num_tokens), np.int64)
    for documents, num_tokens, ids in _pieces(shard):
        np.add.at(sums, documents, ngrams.log_likelihood_ratios(ids, num_tokens, shard.ratios))
    return shard.task.shard.number, sums


def _pieces(shard: _Weighing) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Documents, or pieces of long ones, about `PIECE_TOKENS` at a time: their numbers, lengths and joined ids."""
    num_pieces = np.maximum(1, -(-shard.num_tokens // PIECE_TOKENS))
    documents = np.repeat(np.arange(len(num_pieces)), num_pieces)
    lengths = np.full(len(documents), PIECE_TOKENS)
    lasts = np.cumsum(num_pieces) - 1
    lengths[lasts] = shard.num_tokens - PIECE_TOKENS * (num_pieces - 1)
    ends = np.cumsum(lengths)
    ids, first = shard_ids(shard.task), 0
    while first < len(lengths):
        begin = int(ends[first] - lengths[first])
        last = max(first + 1, int(np.searchsorted(ends, begin + PIECE_TOKENS, side="right")))
        yield documents[first:last], lengths[first:last], ids[begin : ends[last - 1]]
        first = last


def _gumbel(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A standard Gumbel variable for each document, which follows from its hash and the seed: float64."""
    mixed = hashes[:, 1] ^ (np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    uniform = (((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) + 0.5) / 2.0**53
    return np.asarray(-np.log(-np.log(uniform)))


def _histogram(pool: np.ndarray, chosen: np.ndarray) -> dict[str, list[float]]:
    lowest, highest = np.quantile(pool, [0.001, 0.999]).tolist()
    edges = np.linspace(lowest, highest, HISTOGRAM_BINS + 1)
    edges[-1] = np.nextafter(edges[-1], np.inf)
    of_pool, of_chosen = (np.histogram(values.clip(edges[0], edges[-1]), edges)[0] for values in (pool, chosen))
    return {"edges": edges.tolist(), "pool": of_pool.tolist(), "chosen": of_chosen.tolist()}
