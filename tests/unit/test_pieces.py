"""What is found piece by piece in arrays over all documents is what the whole array would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cartilha.corpus import pieces as module
from cartilha.corpus.pieces import at_the_ends, evenly, extremes, in_order, nth_true
from cartilha.corpus.splits import SplitRule, split_documents
from cartilha.errors import UserError
from cartilha.preparation import assembly
from cartilha.preparation import index as index_module
from cartilha.preparation.index import first_of_each
from splitting import clusters_of, split_plainly

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
    assert np.concatenate([np.zeros(0, np.int64), *in_order(values, mask, descending=True)]).tolist() == order.tolist()
    up = places[np.argsort(values[places], kind="stable")]
    assert np.concatenate([np.zeros(0, np.int64), *in_order(values, mask)]).tolist() == up.tolist()
    low, high = extremes(values, mask, 3)
    assert low.tolist() == sorted(values[mask])[:3] and high.tolist() == sorted(values[mask])[-3:]
    lowest, highest = at_the_ends(values, mask, 3)
    assert highest.tolist() == order[:3].tolist()
    assert lowest.tolist() == up[:3].tolist()
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


RULES = st.one_of(
    st.builds(SplitRule, fraction=st.sampled_from([0.001, 0.2, 0.5, 0.99])),
    st.builds(SplitRule, documents=st.integers(1, 50)),
    st.builds(SplitRule, first=st.integers(1, 50)),
)


@given(st.integers(2, 50), RULES, st.integers(0, 2**32), st.sampled_from([0, 1, 3, 20, 60]))
def test_documents_are_split_as_if_all_were_there_at_once(number, rule, seed, num_clusters):
    generator = np.random.default_rng(seed)
    size = number + int(generator.integers(0, 20))
    stays, positions = np.zeros(size, bool), generator.random(size)
    stays[generator.permutation(size)[:number]] = True
    hashes = [f"{one:032x}" for one in generator.permutation(size).tolist()]
    numbers = generator.integers(0, num_clusters, size) if num_clusters else np.arange(size)
    clusters = clusters_of(hashes, numbers) if num_clusters else None
    own = np.flatnonzero(stays)
    if (rule.documents or rule.first or 0) >= number:
        with pytest.raises(UserError):
            split_documents(positions, stays, rule, None, clusters)
        return
    if rule.first is not None:
        given_ones, alike = own[: rule.first], set(numbers[own[: rule.first]].tolist())
        left_out = [one for one in own[rule.first :].tolist() if numbers[one] in alike]
        if len(given_ones) + len(left_out) == number:
            with pytest.raises(UserError):
                split_documents(positions, stays, rule, None, clusters)
            return
        found = split_documents(positions, stays, rule, None, clusters)
        assert np.flatnonzero(found.validation).tolist() == given_ones.tolist()
        assert np.flatnonzero(found.left_out).tolist() == left_out
        return
    found = split_documents(positions, stays, rule, None, clusters)
    of_own = positions[own].tolist(), [hashes[one] for one in own.tolist()], numbers[own].tolist()
    assert set(np.flatnonzero(found.validation).tolist()) == set(own[sorted(split_plainly(*of_own, rule))].tolist())
    train = {numbers[one] for one in own.tolist() if not found.validation[one]}
    leaks = [numbers[one] in train for one in np.flatnonzero(found.validation).tolist()]
    assert found.leak_rate == np.mean(leaks) and not found.left_out.any()
    plain = set(split_plainly(*of_own[:2], list(range(number)), rule))
    others = {of_own[2][one] for one in range(number) if one not in plain}
    assert found.plain_leak_rate == np.mean([of_own[2][one] in others for one in sorted(plain)])


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_clusters_are_numbered_and_taken_once_among_what_is_kept(seed, number):
    generator = np.random.default_rng(seed)
    stays, pool, target = generator.random((3, number)) < [[0.7], [0.6], [0.1]]
    clusters = clusters_of([f"{one:032x}" for one in range(number)], generator.integers(0, 9, number))
    kept = np.flatnonzero(stays).tolist()
    firsts = {
        one: next(i for i, other in enumerate(kept) if clusters.firsts[other] == first)
        for one in kept
        if (first := clusters.firsts[one]) >= 0
    }
    assert assembly._among_kept(clusters, stays)[kept].tolist() == list(firsts.values())
    before, wanted = pool.copy(), set(clusters.firsts[target].tolist())
    assembly._take_once(pool, target, clusters)
    for first in set(clusters.firsts.tolist()):
        members = np.flatnonzero(before & (clusters.firsts == first)).tolist()
        assert np.flatnonzero(pool & (clusters.firsts == first)).tolist() == (
            members[:1] if first in wanted else members
        )
