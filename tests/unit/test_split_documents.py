"""Splits of a whole corpus: by fraction, number, the first ones or given files, and by cluster where there are any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cartilha.corpus.document import Document
from cartilha.corpus.splits import SplitRule, choose_split, leak_rate
from cartilha.errors import UserError
from splitting import clusters_of, split

HASHES = [Document(f"Texto número {i}.", "1", "s", "d").text_hash for i in range(1000)]
PAIRS = np.arange(1000) // 2  # 500 clusters of two


def test_without_clusters_it_is_the_split_of_each_document():
    result = split(HASHES, SplitRule(0.2, seed=3))
    assert result.validation.tolist() == [choose_split(h, 0.2, 3) == "validation" for h in HASHES]
    assert (result.fraction_used, result.notes, result.leak_rate, result.plain_leak_rate) == (0.2, (), 0.0, 0.0)
    assert not result.left_out.any()


def test_a_cluster_is_on_one_side_and_the_plain_split_leaks():
    result = split(HASHES, SplitRule(0.2), PAIRS)
    sides = result.validation.reshape(-1, 2)
    assert (sides[:, 0] == sides[:, 1]).all() and 140 < result.validation.sum() < 260
    assert result.leak_rate == 0.0
    assert abs(result.plain_leak_rate - 0.8) < 0.1  # the other of a pair is in training with probability 0.8
    plain = np.array([choose_split(h, 0.2, 0) == "validation" for h in HASHES])
    assert result.plain_leak_rate == leak_rate(clusters_of(HASHES, PAIRS), plain, ~plain)


def test_leak_rate_by_hand():
    clusters = clusters_of(HASHES[:6], [0, 0, 1, 1, 2, 3])
    held_out = np.array([1, 0, 1, 1, 1, 0], bool)
    assert leak_rate(clusters, held_out, ~held_out) == 1 / 4
    assert leak_rate(clusters, np.zeros(6, bool), held_out) == 0.0


def test_the_place_of_a_cluster_is_that_of_its_smallest_hash():
    result = split(HASHES, SplitRule(0.2), PAIRS)
    for number in range(500):
        smallest = min(HASHES[2 * number : 2 * number + 2])
        assert result.validation[2 * number] == (choose_split(smallest, 0.2, 0) == "validation")


@settings(max_examples=50)
@given(st.data())
def test_order_and_numbers_of_clusters_do_not_matter(data):
    clusters = np.array(data.draw(st.lists(st.integers(0, 30), min_size=60, max_size=60)))
    rule = data.draw(st.sampled_from([SplitRule(0.3, seed=1), SplitRule(documents=20, seed=1)]))
    before = split(HASHES[:60], rule, clusters)
    order = np.array(data.draw(st.permutations(range(60))))
    after = split([HASHES[i] for i in order], rule, clusters[order] * 7 + 100)
    assert (after.validation == before.validation[order]).all()
    assert before.leak_rate == after.leak_rate == (len(set(clusters.tolist())) == 1)  # all alike cannot be kept apart
    assert before.validation.any() and not before.validation.all()


def test_adding_documents_moves_none_but_those_that_become_near_duplicates():
    few = split(HASHES[:600], SplitRule(0.2), PAIRS[:600])
    many = split(HASHES, SplitRule(0.2), PAIRS)
    assert (many.validation[:600] == few.validation).all()


def test_a_number_of_documents_is_met_exactly():
    result = split(HASHES, SplitRule(documents=37))
    assert result.validation.sum() == 37 and result.notes == () and result.fraction_used is None
    more = split(HASHES[:900], SplitRule(documents=37))
    assert (result.validation[:900] & more.validation).sum() > 30  # adding some displaces few
    assert (split(HASHES, SplitRule(documents=37, seed=1)).validation != result.validation).any()
    with pytest.raises(UserError, match="1,000 of 1,000 documents cannot"):
        split(HASHES, SplitRule(documents=1000))


def test_clusters_are_not_cut_for_a_number():
    result = split(HASHES, SplitRule(documents=37), PAIRS)
    assert result.validation.sum() == 36 and "36 documents are held out instead of 37" in result.notes[0]
    assert result.plain_leak_rate > 0.9
    whole = split(HASHES[:4], SplitRule(documents=1), np.array([0, 0, 0, 1]))
    assert whole.validation.tolist() == [False, False, False, True]
    smallest = split(HASHES[:5], SplitRule(documents=1), np.array([0, 0, 0, 1, 1]))
    assert smallest.validation.tolist() == [False, False, False, True, True] and "2 documents" in smallest.notes[0]


def test_the_first_ones_and_their_near_duplicates():
    result = split(HASHES[:10], SplitRule(first=3), np.array([0, 1, 2, 2, 3, 0, 0, 4, 5, 6]))
    assert result.validation.tolist() == [True] * 3 + [False] * 7
    assert np.flatnonzero(result.left_out).tolist() == [3, 5, 6]
    assert result.leak_rate == 0.0 and result.plain_leak_rate == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="to train on"):
        split(HASHES[:10], SplitRule(first=10))


def test_given_documents_are_held_out_whatever_the_rule():
    given_files = np.array([0, 0, 1, 1], bool)
    result = split(HASHES[:4], SplitRule(0.9), np.array([0, 1, 1, 2]), given_files)
    assert (result.validation == given_files).all() and result.left_out.tolist() == [False, True, False, False]
    for wrong in ([0, 0, 0, 0], [1, 1, 1, 1]):
        with pytest.raises(UserError, match="No document is left"):
            split(HASHES[:4], SplitRule(), None, np.array(wrong, bool))


def test_a_cluster_larger_than_the_side_held_out_stays_in_training():
    for seed in range(20):  # wherever its smallest hash puts it
        clusters = np.where(np.arange(100) < 60, 0, np.arange(100))
        result = split(HASHES[:100], SplitRule(0.2, seed=seed), clusters)
        assert not result.validation[:60].any() and result.validation.any()
        assert "1 cluster of" in result.notes[0] and "60 documents" in result.notes[0]
        assert result.leak_rate == 0.0 < result.plain_leak_rate


def test_nothing_but_large_clusters_is_no_reason_for_an_empty_side():
    two = split(HASHES[:10], SplitRule(0.2), np.array([0] * 6 + [1] * 4))
    assert two.validation.tolist() == [False] * 6 + [True] * 4 and "smallest" in two.notes[-1]
    one = split(HASHES[:10], SplitRule(0.2), np.zeros(10, int))
    assert 0 < one.validation.sum() < 10 and "one by one" in one.notes[0]
    assert one.leak_rate == one.plain_leak_rate == 1.0


def test_few_documents_get_another_fraction_that_is_named():
    result = split(HASHES[:3], SplitRule(1e-6))
    assert result.validation.sum() == 1 and result.fraction_used != 1e-6 and "is used instead" in result.notes[0]
    mixed = split(HASHES[:9], SplitRule(0.12), np.array([0] * 7 + [1, 2]))
    assert mixed.validation[7:].sum() in (1, 2) and not mixed.validation[:7].any()


@pytest.mark.parametrize(
    "wrong", [{"fraction": 0.0}, {"fraction": 1.0}, {"documents": 0}, {"first": 1, "documents": 1}]
)
def test_rules_that_make_no_sense(wrong):
    with pytest.raises(UserError):
        SplitRule(**wrong)
