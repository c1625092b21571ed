"""What is found piece by piece in arrays over all documents is what the whole array would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cartilha.corpus import pieces as module
from cartilha.corpus.pieces import at_the_ends, descending, evenly, extremes, nth_true
from cartilha.corpus.splits import SplitRule, split_documents, split_singly
from cartilha.errors import UserError
from cartilha.preparation import index as index_module
from cartilha.preparation.index import first_of_each

VALUES = arrays.arrays(np.float64, st.integers(1, 60), elements=st.sampled_from([-2.5, -1.0, 0.0, 0.5, 3.0, 1e9]))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 7)
    monkeypatch.setattr(module, "NUM_BINS", 5)
    monkeypatch.setattr(index_module, "SORTED_DOCUMENTS", 10)


@given(VALUES, st.data())
def test_order_ends_and_ranks_are_those_of_the_whole_array(values, data):
    mask = data.draw(arrays.arrays(bool, len(values)))
    places = np.flatnonzero(mask)
    order = places[np.argsort(-values[places], kind="stable")]
    assert np.concatenate([np.zeros(0, np.int64), *descending(values, mask)]).tolist() == order.tolist()
    low, high = extremes(values, mask, 3)
    assert low.tolist() == sorted(values[mask])[:3] and high.tolist() == sorted(values[mask])[-3:]
    lowest, highest = at_the_ends(values, mask, 3)
    assert highest.tolist() == order[:3].tolist()
    assert lowest.tolist() == places[np.argsort(values[places], kind="stable")][:3].tolist()
    assert nth_true(mask, np.arange(len(places))).tolist() == places.tolist()
    assert len(evenly(mask, 4)) == min(4, len(places)) and set(evenly(mask, 4)) <= set(places)


@given(
    arrays.arrays(np.uint64, st.tuples(st.integers(0, 60), st.just(2)), elements=st.integers(0, 3)), st.integers(0, 9)
)
def test_the_first_of_equal_hashes_is_found_in_parts(hashes, seed):
    spread = np.random.default_rng(seed).integers(0, 2**64, (4, 4), np.uint64)  # hashes lie anywhere
    wide = np.stack([spread[hashes[:, 0].astype(int), 0], hashes[:, 1]], axis=1)
    seen: set[tuple[int, ...]] = set()
    expected = []
    for row in wide.tolist():
        expected.append(tuple(row) not in seen)
        seen.add(tuple(row))
    assert first_of_each(wide).tolist() == expected


RULES = [SplitRule(0.2), SplitRule(0.001), SplitRule(documents=3), SplitRule(first=4), SplitRule(documents=99)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("number", [2, 5, 40])
def test_documents_are_split_as_if_all_were_there_at_once(rule, number):
    generator = np.random.default_rng(number)
    positions, stays = generator.random(2 * number), np.zeros(2 * number, bool)
    stays[generator.permutation(2 * number)[:number]] = True
    hashes = [f"{i:032x}" for i in range(number)]
    try:
        expected = split_documents(hashes, rule, own=positions[stays])
    except UserError as error:
        with pytest.raises(UserError, match=str(error).split(";")[0]):
            split_singly(positions, stays, rule, None)
        return
    found = split_singly(positions, stays, rule, None)
    assert found.validation[stays].tolist() == expected.validation.tolist() and not found.validation[~stays].any()
    assert (found.fraction_used, found.notes, found.leak_rate) == (expected.fraction_used, expected.notes, 0.0)
