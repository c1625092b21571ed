"""Which documents are held out: fixed by hash and seed, in the wanted share, and never all or none of them."""

from __future__ import annotations

import pytest

from cartilha.corpus.document import Document
from cartilha.corpus.splits import SplitRule, choose_split, split_position
from splitting import split


def text_hash(text: str) -> str:
    return Document(text, id="1", source="teste", domain="teste").text_hash


HASHES = [text_hash(f"Texto número {i}.") for i in range(1000)]


def fraction_used(hashes: list[str], fraction: float, seed: int = 0) -> float:
    return split(hashes, SplitRule(fraction, seed=seed)).fraction_used


def held_out(hashes: list[str], fraction: float, seed: int) -> set[str]:
    return {h for h in hashes if choose_split(h, fraction, seed) == "validation"}


def test_positions_are_the_same_in_every_version():
    # SHA-256 of "seed:hash", first 56 bits, by hand: another value would put documents of old stores on the other side.
    assert split_position("0" * 32, 0) == 0.8691887734093187
    assert split_position("0" * 32, 1) == 0.9429072999388886
    assert split_position(text_hash("A raposa e as uvas."), 0) == 0.4107499062329058


def test_the_position_is_compared_with_the_fraction():
    position = split_position(HASHES[0], 0)
    assert choose_split(HASHES[0], position + 1e-9, 0) == "validation"
    assert choose_split(HASHES[0], position, 0) == "train"


@pytest.mark.parametrize("seed", [0, 1, 2**40])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.9])
def test_the_share_is_near_the_fraction(fraction, seed):
    four_deviations = 4 * (1000 * fraction * (1 - fraction)) ** 0.5
    assert abs(len(held_out(HASHES, fraction, seed)) - 1000 * fraction) < four_deviations


def test_the_promise_of_the_docstring():
    assert all(175 <= len(held_out(HASHES, 0.2, seed)) <= 225 for seed in range(3))


def test_another_seed_is_another_split():
    first, second = held_out(HASHES, 0.5, 0), held_out(HASHES, 0.5, 1)
    assert 200 < len(first & second) < 300  # a quarter: the two are independent


def test_adding_documents_moves_none():
    few, many = held_out(HASHES[:300], 0.2, 7), held_out(HASHES, 0.2, 7)
    assert many & set(HASHES[:300]) == few
    assert few < many  # not vacuous: some of the new ones are held out


def test_of_two_documents_one_is_on_each_side():
    pair = HASHES[:2]
    for wanted in (1e-9, 0.2, 0.5, 1 - 1e-9):
        assert len(held_out(pair, fraction_used(pair, wanted), 0)) == 1
    with pytest.raises(AssertionError, match="cannot be split"):
        fraction_used(HASHES[:1], 0.2)


def test_the_fraction_used_moves_as_few_documents_as_it_can():
    handful = HASHES[:9]
    assert len(held_out(handful, fraction_used(handful, 1e-9), 0)) == 1
    assert len(held_out(handful, fraction_used(handful, 1 - 1e-9), 0)) == 8
    # Not vacuous: those fractions do leave a side empty.
    assert held_out(handful, 1e-9, 0) == set() and held_out(handful, 1 - 1e-9, 0) == set(handful)


def test_a_fraction_that_will_do_is_used():
    assert fraction_used(HASHES, 0.2) == 0.2
