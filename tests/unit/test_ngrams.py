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
    found = ngrams.log_likelihood_ratios(*joined(documents), ratios)
    assert found.tolist() == [int(sum(ratios[gram] for gram in one_by_one(document))) for document in documents]


def test_ratios_and_divergence_are_those_of_smoothed_counts():
    target, pool = np.zeros(ngrams.NUM_BUCKETS, np.int64), np.ones(ngrams.NUM_BUCKETS, np.int64)
    target[7] = 1000
    smoothed = (1000 + ngrams.SMOOTHING) / (1000 + ngrams.SMOOTHING * ngrams.NUM_BUCKETS)
    ratios = ngrams.log_ratios(target, pool) / ngrams.FIXED_POINT
    assert ratios[7] == pytest.approx(math.log(smoothed * ngrams.NUM_BUCKETS), abs=1e-5) and (ratios < 0).sum() > 16_000
    assert ngrams.divergence(target, target) == 0 < ngrams.divergence(target, pool)
