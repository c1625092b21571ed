"""N-gram models over ids: what they count and weigh, against the same done token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cartilha.tokens import ngrams

DOCUMENTS = st.lists(st.lists(st.integers(0, 49_151), max_size=12), min_size=1, max_size=6)


def one_by_one(document: list[int]) -> list[int]:
    singles = [int(ngrams.token_buckets(np.array([token]))[0]) for token in document]
    return singles + [int(ngrams.pair_buckets(np.array(pair))[0]) for pair in pairwise(document)]


def joined(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(chain(*documents)), np.uint16), np.array(list(map(len, documents)), np.int64)


@pytest.fixture(autouse=True, scope="module")
def chunks_of_three_tokens() -> Iterator[None]:
    """So that chunks begin inside documents and pairs span them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "CHUNK_TOKENS", 3)
        yield


@given(DOCUMENTS)
def test_no_pair_spans_two_documents(documents):
    grams = list(chain(*map(one_by_one, documents)))
    assert ngrams.count(*joined(documents)).tolist() == np.bincount(grams, minlength=ngrams.NUM_BUCKETS).tolist()


@given(DOCUMENTS, st.integers(0, 2**32))
def test_a_document_weighs_what_its_ngrams_do(documents, seed):
    ratios = np.random.default_rng(seed).integers(-(2**23), 2**23, ngrams.NUM_BUCKETS)
    found = ngrams.log_likelihood_ratios(*joined(documents), np.stack([ratios, -ratios]))
    expected = [int(sum(ratios[gram] for gram in one_by_one(document))) for document in documents]
    assert found.tolist() == [expected, [-value for value in expected]]


def test_a_target_drawn_from_the_pool_has_ratios_of_mean_zero():
    rng = np.random.default_rng(0)
    pool = np.rint(1e8 / np.arange(1, ngrams.NUM_BUCKETS + 1)).astype(np.int64)  # as Zipf has it: most buckets are rare
    expected = pool / pool.sum() * 50_000
    ratios = np.mean([ngrams.log_ratios(rng.poisson(expected), pool) for _ in range(300)], axis=0) / ngrams.FIXED_POINT
    assert expected.min() < 0.5 and expected.max() > 10 * ngrams.FEW
    assert abs(ratios.mean()) < 2e-3 and abs(ratios @ pool / pool.sum()) < 2e-3
    assert np.abs(ratios).max() < 0.25  # of 300 draws, for the rarest


def test_what_the_target_has_more_of_counts_for_a_document():
    pool = np.full(ngrams.NUM_BUCKETS, 1000)
    target = pool.copy()
    target[7], target[8] = 4000, 0
    ratios = ngrams.log_ratios(target, pool) / ngrams.FIXED_POINT
    # With as much text of the pool beside it: (4 + 1) / 2 and (0 + 1) / 2.
    assert ratios[7] == pytest.approx(math.log(2.5), abs=1e-3) and ratios[8] == pytest.approx(math.log(0.5), abs=1e-3)
    assert ngrams.divergence(target, target) == 0 < ngrams.divergence(target, pool)
