"""Hashed n-gram models over token ids: how much more likely a document is in one text than in another.

A document is its tokens and the pairs of neighbouring tokens, hashed into `NUM_BUCKETS` buckets, as in importance
resampling (Xie et al. 2023, arXiv:2302.03169), there with words. Ids are read, not text, so that nothing is split or
hashed twice (docs/log.md, experiment 37, compares both).
"""

from __future__ import annotations

import numpy as np

BUCKET_BITS = 14
NUM_BUCKETS = 1 << BUCKET_BITS
SMOOTHING = 0.2  # added to each bucket's count
FIXED_POINT = 1 << 20  # log ratios are whole multiples of its inverse: their sum depends on no order

_ODD = np.uint64(0x9E3779B97F4A7C15)
_PAIR = np.uint64(0x94D049BB133111EB)
_SHIFT = np.uint64(64 - BUCKET_BITS)


def buckets(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of each token and of each pair of neighbours: int64, shapes (num_tokens,) and (num_tokens - 1,)."""
    values = ids.astype(np.uint64) + np.uint64(1)
    singles = values * _ODD
    pairs = (singles[:-1] + values[1:] * _PAIR) * _ODD
    return (singles >> _SHIFT).astype(np.int64), (pairs >> _SHIFT).astype(np.int64)


def count(ids: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """How often each bucket occurs in documents that follow one another; a pair never spans two of them.

    Args:
        ids: Of all documents, shape (sum of num_tokens,).
        num_tokens: Of each document, int64.

    Returns:
        int64, shape (NUM_BUCKETS,).
    """
    singles, pairs = buckets(ids)
    spanning = pairs[_last_tokens(num_tokens, len(pairs))]
    counts = [np.bincount(found, minlength=NUM_BUCKETS) for found in (singles, pairs, spanning)]
    return np.asarray(counts[0] + counts[1] - counts[2], np.int64)


def log_ratios(target: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """The logarithm of each bucket's probability in the target over that in the pool, in `FIXED_POINT`: int64."""
    return np.asarray(np.rint((_logarithms(target) - _logarithms(pool)) * FIXED_POINT), np.int64)


def log_likelihood_ratios(ids: np.ndarray, num_tokens: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """The sum of the log ratios of each document's n-grams, in `FIXED_POINT`: int64, shape (num_documents,)."""
    singles, pairs = buckets(ids)
    values = ratios[singles]
    of_pairs = ratios[pairs]
    of_pairs[_last_tokens(num_tokens, len(pairs))] = 0
    values[: len(pairs)] += of_pairs
    sums = np.concatenate(([0], np.cumsum(values)))
    return np.asarray(np.diff(sums[np.concatenate(([0], np.cumsum(num_tokens)))]))


def divergence(target: np.ndarray, other: np.ndarray) -> float:
    """Kullback-Leibler divergence of the other model from the target's, in nats per n-gram, from counts."""
    target_logs = _logarithms(target)
    return float(np.exp(target_logs) @ (target_logs - _logarithms(other)))


def _logarithms(counts: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(counts + SMOOTHING) - np.log(counts.sum() + SMOOTHING * NUM_BUCKETS))


def _last_tokens(num_tokens: np.ndarray, num_pairs: int) -> np.ndarray:
    """The pairs that span two documents: the places of each document's last token, but the very last one's."""
    ends = np.unique(np.cumsum(num_tokens)) - 1
    return ends[(ends >= 0) & (ends < num_pairs)]
