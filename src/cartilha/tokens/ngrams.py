"""Hashed n-gram models over token ids: how much more likely a document is in one text than in another.

A document is its tokens and the pairs of neighbouring tokens, hashed into `NUM_BUCKETS` buckets, as in importance
resampling (Xie et al. 2023, arXiv:2302.03169), there with words. Ids are read, not text, so that nothing is split or
hashed twice (docs/log.md, experiment 37, compares both).
"""

from __future__ import annotations

import numpy as np

BUCKET_BITS = 14
NUM_BUCKETS = 1 << BUCKET_BITS
SMOOTHING = 0.2  # added to each bucket's count in a divergence
PRIOR = 0.5  # added to each of the pool's counts
FEW = 40  # mean counts from here on are treated as large
FIXED_POINT = 1 << 20  # log ratios are whole multiples of its inverse: their sum depends on no order

CHUNK_TOKENS = 1 << 16  # arrays over a chunk stay in a core's cache

# Odd 32-bit constants: a product's high bits depend on all bits of its factors, and 32-bit products are vectorised.
_MIX, _FIRST, _SECOND = np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_SHIFT = np.uint32(32 - BUCKET_BITS)


def token_buckets(ids: np.ndarray) -> np.ndarray:
    """The bucket of each token: uint32, shape (num_tokens,)."""
    return np.asarray((ids.astype(np.uint32) + np.uint32(1)) * _MIX >> _SHIFT)


def pair_buckets(ids: np.ndarray) -> np.ndarray:
    """The bucket of each pair of neighbouring tokens: uint32, shape (num_tokens - 1,)."""
    values = ids.astype(np.uint32) + np.uint32(1)
    pairs = values[:-1] * _FIRST
    pairs ^= values[1:] * _SECOND
    return np.asarray(pairs * _MIX >> _SHIFT)


def count(ids: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """How often each bucket occurs in documents that follow one another; a pair never spans two of them.

    Args:
        ids: Of all documents, shape (sum of num_tokens,).
        num_tokens: Of each document, int64.

    Returns:
        int64, shape (NUM_BUCKETS,).
    """
    counts = np.zeros(NUM_BUCKETS, np.int64)
    by_id = np.bincount(ids)
    np.add.at(counts, token_buckets(np.arange(len(by_id))), by_id)
    for begin in range(0, len(ids), CHUNK_TOKENS):
        counts += np.bincount(pair_buckets(ids[begin : begin + CHUNK_TOKENS + 1]), minlength=NUM_BUCKETS)
    lasts = _last_tokens(num_tokens, len(ids))
    spanning = pair_buckets(np.stack([ids[lasts], ids[lasts + 1]], axis=1).ravel())[::2]
    return np.asarray(counts - np.bincount(spanning, minlength=NUM_BUCKETS))


def log_ratios(target: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """The logarithm of each bucket's probability in the target over that in the pool, in `FIXED_POINT`: int32.

    As much text of the pool is added to the target as it has itself. The mean that this logarithm would have if the
    target had been drawn from the pool (its counts Poisson) is subtracted: a target of the same kind as the pool then
    gives a document zero on average, instead of less the rarer its n-grams are.
    """
    expected = (pool + PRIOR) / (pool.sum() + PRIOR * NUM_BUCKETS) * target.sum()
    ratios = np.log(target + expected) - _mean_log(expected)
    return np.asarray(np.rint(ratios * FIXED_POINT), np.int32)


def _mean_log(expected: np.ndarray) -> np.ndarray:
    """The mean of log(x + m) for x Poisson of mean m, of each m above 0: float64."""
    counts = np.arange(2 * FEW)
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(counts[1:]))))
    few = expected[expected < FEW, None]
    likelihoods = np.exp(counts * np.log(few) - few - log_factorials)
    result = np.log(2 * expected) - 1 / (8 * expected)  # to the second order, for large means
    result[expected < FEW] = (likelihoods * np.log(counts + few)).sum(axis=1)
    return np.asarray(result)


def log_likelihood_ratios(ids: np.ndarray, num_tokens: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Sums of the log ratios of each document's n-grams, in `FIXED_POINT`: int64, shape (num_models, num_documents).

    Args:
        ids: Of all documents, shape (sum of num_tokens,).
        num_tokens: Of each document, int64.
        ratios: `log_ratios` of several targets, shape (num_models, NUM_BUCKETS).
    """
    values = np.empty((len(ratios), len(ids)), np.int32)
    for begin in range(0, len(ids), CHUNK_TOKENS):
        part = ids[begin : begin + CHUNK_TOKENS + 1]
        singles, pairs = token_buckets(part[:CHUNK_TOKENS]), pair_buckets(part)
        for own, model in zip(values[:, begin : begin + CHUNK_TOKENS], ratios, strict=True):
            own[:] = model[singles]
            own[: len(pairs)] += model[pairs]
    lasts = _last_tokens(num_tokens, len(ids))
    values[:, lasts] = ratios[:, token_buckets(ids[lasts])]  # without the pair that spans two documents
    sums = np.concatenate([np.zeros((len(ratios), 1), np.int64), np.cumsum(values, axis=1, dtype=np.int64)], axis=1)
    return np.asarray(np.diff(sums[:, np.concatenate(([0], np.cumsum(num_tokens)))]))


def divergence(target: np.ndarray, other: np.ndarray) -> float:
    """Kullback-Leibler divergence of the other model from the target's, in nats per n-gram, from counts."""
    target_logs = _logarithms(target)
    return float(np.exp(target_logs) @ (target_logs - _logarithms(other)))


def _logarithms(counts: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(counts + SMOOTHING) - np.log(counts.sum() + SMOOTHING * NUM_BUCKETS))


def _last_tokens(num_tokens: np.ndarray, num_ids: int) -> np.ndarray:
    """The places of each document's last token, but the very last one's: of the pairs that span two documents."""
    ends = np.unique(np.cumsum(num_tokens)) - 1
    return ends[(ends >= 0) & (ends < num_ids - 1)]
