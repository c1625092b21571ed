"""Which documents of a pool are trained on: drawn at random, or by how much they read like a target.

Importance resampling (Xie et al. 2023, arXiv:2302.03169): each document has the log of its probability in the target
over that in the pool (`tokens.ngrams`), and those with the highest sum of that weight and a Gumbel variable are taken,
which draws without replacement in proportion to the weights (Vieira 2014). How much the weights count follows from how
far two halves of the target agree on them. Everything follows from the documents, the target and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cartilha.corpus.pieces import PIECE, each, evenly, extremes, in_order, large_array, pieces, total
from cartilha.errors import UnfinishedError, counted
from cartilha.preparation.executors import Executor
from cartilha.preparation.index import DocumentIndex, shard_ids, spans
from cartilha.preparation.shard_work import ShardTask
from cartilha.preparation.threshold import Threshold, gumbel, log_weights
from cartilha.tokens import ngrams

FEW_DOCUMENTS = 50  # a target of so few tells little of what it is like
PIECE_TOKENS = 1 << 17  # looked at together; a longer document loses the pair where it is cut
POOL_TOKENS = 8 << 20  # of the pool are counted: some 500 in each bucket; the target has fewer by far
HISTOGRAM_BINS = 20
NUM_GROUPS = 3  # two halves of the target, and the pool
Passes = Callable[[np.ndarray], np.ndarray]
STRENGTH = 4.0  # of a weight one standard deviation above the mean, where signal and noise are equal


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

    def refuse_too_few(self, num_tokens: int) -> None:
        """Refuse, with an UnfinishedError, fewer tokens than were asked for by number: too few documents passed."""
        if isinstance(self.value, int) and not self.at_most and num_tokens < self.value:
            raise UnfinishedError(
                f"--select_tokens {self.value:,} is more than the {counted(num_tokens, 'token')} of documents that are"
                " good enough; give fewer, or wider limits to their perplexity and score."
            )


@dataclass(frozen=True)
class Chosen:
    """What was chosen; arrays have the shape (num_documents,).

    Attributes:
        mask: Whether each document is trained on, bool.
        pool: Whether it could be chosen, bool.
        weights: The log weight of each document of the pool, in nats of a document of average length, float64; empty
            without a target.
        ratios: The log ratio of each n-gram bucket (`ngrams.log_ratios`), of both halves on average; or None.
        strength: How much the weights count against the draw.
        facts: What the store's record says of it.
    """

    mask: np.ndarray
    pool: np.ndarray
    weights: np.ndarray
    ratios: np.ndarray | None
    strength: float
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Weighing:
    """The work on the ids of one shard: to count n-grams by group of document, or to weigh documents by ratios."""

    task: ShardTask
    num_tokens: np.ndarray
    groups: np.ndarray  # int8, of each document; -1: none
    ratios: np.ndarray | None = None


def choose(
    index: DocumentIndex,
    pool: np.ndarray,
    target: np.ndarray,
    asked: tuple[Amount, int],
    executor: Executor[Any, Any],
    passes: Passes | None = None,
) -> Chosen:
    """Choose documents of the pool; with the same weight for all if there is no target.

    Two models are made, each of one half of the target's documents. What they agree on over the pool is the signal and
    the rest is chance: their correlation decides how much the weights count against the draw. On a pool that is all
    like the target, they do not agree, and the draw is a random one.

    Args:
        index: All documents.
        pool: Whether each document may be chosen, bool, shape (num_documents,).
        target: Whether each is part of the target.
        asked: How much to take, and the seed of the draw.
        executor: Does the work on shards.
        passes: Which of some documents, given by number, are good enough; the others are passed over.
    """
    amount, seed = asked
    num_tokens = amount.tokens(total(index.num_tokens, pool))
    weights, strength, ratios, facts = np.zeros(0), 0.0, None, dict[str, Any]()
    if target.any():
        groups = _sampled(index, pool)
        by_hash = np.flatnonzero(target)[np.argsort(index.hashes[target, 0], kind="stable")]
        groups[by_hash] = np.arange(len(by_hash)) % 2  # whatever the order of the input, and neither half empty
        counts = _counts(index, groups, executor)
        both = np.stack([ngrams.log_ratios(half, counts[2]) for half in counts[:2]])
        of_halves = _weights(index, pool, both, executor)
        reliability, deviation = _agreement(of_halves, pool)
        ratios, weights = both.mean(axis=0), large_array(pool.shape, np.float64)
        for piece in pieces(len(pool)):
            weights[piece] = of_halves[:, piece].mean(axis=0)
        strength = STRENGTH * reliability / (1 - reliability) / max(deviation, 1e-9)
        facts = {
            "target_documents": int(np.count_nonzero(target)),
            "target_tokens": total(index.num_tokens, target),
            "reliability": reliability,
        }
    mask = _highest(_keys(index, weights, strength, seed), pool, index.num_tokens, num_tokens, passes)
    amount.refuse_too_few(total(index.num_tokens, mask))
    facts |= {
        "num_documents": int(np.count_nonzero(mask)),
        "num_tokens": total(index.num_tokens, mask),
        "pool_documents": int(np.count_nonzero(pool)),
        "pool_tokens": total(index.num_tokens, pool),
        "seed": seed,
    }
    if ratios is not None:
        # Beside as much text drawn at random, since the divergence from a small text is larger by chance.
        at_random = _highest(_keys(index, weights, 0.0, seed), pool, index.num_tokens, num_tokens)
        facts["divergence"] = _divergences(index, counts[0] + counts[1], at_random, mask, executor)
        facts["histogram"] = _histogram(weights, pool, mask)
    return Chosen(mask, pool, weights, ratios, strength, facts)


def threshold(index: DocumentIndex, chosen: Chosen) -> Threshold:
    """What a document of the pool must reach to be chosen, for documents that are not in the index."""
    seed = chosen.facts["seed"]
    keys = _keys(index, chosen.weights, chosen.strength, seed)
    ratios = np.zeros(ngrams.NUM_BUCKETS) if chosen.ratios is None else chosen.ratios
    lowest = float(extremes(keys, chosen.mask, 1)[0][0])
    average = _average_ngrams(index, chosen.pool)
    return Threshold(np.rint(ratios).astype(np.int32), average, chosen.strength, seed, lowest)


def _average_ngrams(index: DocumentIndex, pool: np.ndarray) -> float:
    """N-grams in a document of the pool, on average."""
    num_ngrams = sum(
        int(np.maximum(1, 2 * index.num_tokens[piece][pool[piece]] - 1).sum()) for piece in pieces(len(pool))
    )
    return num_ngrams / max(1, int(np.count_nonzero(pool)))


def _keys(index: DocumentIndex, weights: np.ndarray, strength: float, seed: int) -> np.ndarray:
    """What documents are ordered by: the weight, as much as it counts, and a Gumbel variable."""
    keys = large_array(index.positions.shape, np.float64)
    for piece in pieces(len(keys)):
        keys[piece] = gumbel(index.hashes[piece], seed)
        if strength:
            keys[piece] += strength * weights[piece]
    return keys


def _divergences(
    index: DocumentIndex, of_target: np.ndarray, at_random: np.ndarray, chosen: np.ndarray, executor: Executor[Any, Any]
) -> dict[str, float]:
    """The divergence from the target, given by its counts, of two texts (masks of documents), in one pass over both."""
    part = _sampled(index, each(np.logical_or, at_random, chosen))
    groups = each(
        lambda own, first, second: np.where(own < 0, -1, np.where(first & second, 2, second)),
        *(part, at_random, chosen),
        dtype=np.int8,
    )
    only_random, only_chosen, both = _counts(index, groups, executor)
    counts = {"random": only_random + both, "chosen": only_chosen + both}
    return {name: ngrams.divergence(of_target, found) for name, found in counts.items()}


def _highest(
    keys: np.ndarray, pool: np.ndarray, num_tokens: np.ndarray, wanted: int, passes: Passes | None = None
) -> np.ndarray:
    """The documents of the pool with the highest keys that pass, as many as have the tokens that are wanted: bool."""
    mask = large_array(pool.shape, bool)
    for order in in_order(keys, pool, descending=True):
        while wanted > 0 and len(order):
            num_enough = 1 + int(np.searchsorted(np.cumsum(num_tokens[order]), wanted))
            own, order = np.split(order, [num_enough])
            taken = own if passes is None else own[passes(own)]
            mask[taken] = True
            wanted -= int(num_tokens[taken].sum())
        if wanted <= 0:
            break
    return mask


def _agreement(weights: np.ndarray, pool: np.ndarray) -> tuple[float, float]:
    """How far both halves of the target agree on the pool: the correlation of their weights, and the deviation.

    The weights have the shape (2, num_documents). The correlation is between 0 and 0.99, the standard deviation that of
    the mean of both.
    """
    number = max(1, int(np.count_nonzero(pool)))
    parts = [(weights[:, piece], pool[piece]) for piece in pieces(len(pool))]
    means = sum((own[:, mask].sum(axis=1) for own, mask in parts), np.zeros(2))[:, None] / number
    moments = np.zeros(3)
    for own, mask in parts:
        first, second = own[:, mask] - means
        moments += [(first * first).sum(), (second * second).sum(), (first * second).sum()]
    deviation = float(np.sqrt(max(0.0, moments[0] + moments[1] + 2 * moments[2]) / number)) / 2
    if number < 2 or not moments[:2].all():
        return 0.0, deviation
    return float(np.clip(moments[2] / np.sqrt(moments[0] * moments[1]), 0, 0.99)), deviation


def _shards(index: DocumentIndex, groups: np.ndarray, ratios: np.ndarray | None = None) -> Iterator[_Weighing]:
    for task, begin, end in index.shards():
        if (groups[begin:end] >= 0).any():
            yield _Weighing(task, np.array(index.num_tokens[begin:end]), groups[begin:end], ratios)


def _counts(index: DocumentIndex, groups: np.ndarray, executor: Executor[Any, Any]) -> np.ndarray:
    """The n-grams of the documents of each group (int8): int64, shape (NUM_GROUPS, NUM_BUCKETS)."""
    return np.asarray(sum(executor(count_shard, _shards(index, groups)), _no_counts()))


def _sampled(index: DocumentIndex, pool: np.ndarray) -> np.ndarray:
    """Group 2 for documents of the pool, of which a large one's hashes name a part, and none for the others."""
    bound = 2**32 * min(1.0, POOL_TOKENS / max(1, total(index.num_tokens, pool)))
    shift = np.uint64(32)
    return each(
        lambda own, hashes: np.where(own & (hashes >> shift < bound), 2, -1), pool, index.hashes[:, 1], dtype=np.int8
    )


def _no_counts() -> np.ndarray:
    return np.zeros((NUM_GROUPS, ngrams.NUM_BUCKETS), np.int64)


def _weights(index: DocumentIndex, pool: np.ndarray, ratios: np.ndarray, executor: Executor[Any, Any]) -> np.ndarray:
    """The log weights of each document by each model (`log_weights`), shape (num_models, num_documents)."""
    average = _average_ngrams(index, pool)
    result = large_array((len(ratios), len(pool)), np.float64)
    places = {task.shard.number: (begin, end) for task, begin, end in index.shards()}
    for number, found in executor(
        weigh_shard, _shards(index, each(lambda own: np.where(own, 0, -1), pool, dtype=np.int8), ratios)
    ):
        begin, end = places[number]
        result[:, begin:end] = log_weights(found, index.num_tokens[begin:end], average)
    return result


def count_shard(shard: _Weighing) -> np.ndarray:
    """The n-grams of a shard's documents by group: int64, shape (NUM_GROUPS, NUM_BUCKETS)."""
    counts = _no_counts()
    for documents, num_tokens, ids in _pieces(shard):
        of_pieces = shard.groups[documents]
        for group in range(NUM_GROUPS):
            own = of_pieces == group
            if own.any():
                counts[group] += ngrams.count(ids if own.all() else ids[np.repeat(own, num_tokens)], num_tokens[own])
    return counts


def weigh_shard(shard: _Weighing) -> tuple[int, np.ndarray]:
    """The number of a shard, and what `ngrams.log_likelihood_ratios` gives for all of its documents."""
    assert shard.ratios is not None
    sums = np.zeros((len(shard.ratios), len(shard.num_tokens)), np.int64)
    for documents, num_tokens, ids in _pieces(shard):
        for own, found in zip(sums, ngrams.log_likelihood_ratios(ids, num_tokens, shard.ratios), strict=True):
            np.add.at(own, documents, found)
    return shard.task.shard.number, sums


def _pieces(shard: _Weighing) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Documents, or pieces of long ones, about `PIECE_TOKENS` at a time: their numbers, lengths and joined ids."""
    num_pieces = np.maximum(1, -(-shard.num_tokens // PIECE_TOKENS))
    documents = np.repeat(np.arange(len(num_pieces)), num_pieces)
    lengths = np.full(len(documents), PIECE_TOKENS)
    lasts = np.cumsum(num_pieces) - 1
    lengths[lasts] = shard.num_tokens - PIECE_TOKENS * (num_pieces - 1)
    ids = shard_ids(shard.task)
    for own, place in spans(lengths, PIECE_TOKENS):
        yield documents[own], lengths[own], ids[place]


def _histogram(weights: np.ndarray, pool: np.ndarray, chosen: np.ndarray) -> dict[str, list[float]]:
    """Documents by weight; the outermost bins hold the few that are far from the others."""
    lowest, highest = np.quantile(weights[evenly(pool, PIECE)], [0.001, 0.999]).tolist()
    edges = np.round(np.linspace(lowest, highest, HISTOGRAM_BINS + 1), 1) + 0.0  # no minus zero
    low, high = extremes(weights, pool, 1)
    edges[0], edges[-1] = min(edges[0], low[0]), max(edges[-1], high[0])
    counts = np.zeros((2, HISTOGRAM_BINS), np.int64)
    for piece in pieces(len(pool)):
        counts += [np.histogram(weights[piece][mask[piece]], edges)[0] for mask in (pool, chosen)]
    return {"edges": edges.tolist(), "pool": counts[0].tolist(), "chosen": counts[1].tolist()}
