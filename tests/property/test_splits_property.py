"""The split of any texts: equal texts stay together, growth moves none, and neither side stays empty."""

from __future__ import annotations

import string

from hypothesis import example, given
from hypothesis import strategies as st

from cartilha.corpus.document import Document
from cartilha.corpus.splits import SplitRule, choose_split, split_position
from splitting import split

TEXTS = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=12, unique=True)
FRACTIONS = st.floats(0, 1, exclude_min=True, exclude_max=True)
SEEDS = st.integers(-(2**31), 2**63)


def documents(texts: list[str], source: str = "um.txt") -> list[Document]:
    return [Document(text, f"{source}:{i}", source, source) for i, text in enumerate(texts)]


def held_out(documents: list[Document], fraction: float, seed: int) -> set[str]:
    return {d.text for d in documents if choose_split(d.text_hash, fraction, seed) == "validation"}


@given(st.text(max_size=20), SEEDS)
def test_positions_lie_between_0_and_1(text, seed):
    assert 0 <= split_position(documents([text])[0].text_hash, seed) < 1


@given(TEXTS, TEXTS, FRACTIONS, SEEDS)
def test_adding_documents_moves_none_and_equal_texts_stay_together(texts, more, fraction, seed):
    # The same texts come again, as records of another file, at other places.
    whole = documents([*more, *reversed(texts)], "dois.txt") + documents(texts)
    assert held_out(whole, fraction, seed) & set(texts) == held_out(documents(texts), fraction, seed)
    sides = {(d.text, choose_split(d.text_hash, fraction, seed)) for d in whole}
    assert len(sides) == len({d.text for d in whole})


@given(TEXTS, FRACTIONS, FRACTIONS, SEEDS)
def test_a_larger_fraction_only_adds(texts, one, other, seed):
    smaller, larger = sorted([one, other])
    assert held_out(documents(texts), smaller, seed) <= held_out(documents(texts), larger, seed)


@given(TEXTS, FRACTIONS, SEEDS)
@example(list(string.ascii_letters), 1e-300, 0)
@example(list(string.ascii_letters), 1 - 2**-53, 0)
@example(["a", "b"], 0.5, 0)
def test_the_fraction_used_leaves_neither_side_empty_and_changes_no_good_split(texts, wanted, seed):
    corpus = documents(texts)
    by_wanted = held_out(corpus, wanted, seed)
    result = split([d.text_hash for d in corpus], SplitRule(wanted, seed=seed))
    by_nearest = held_out(corpus, result.fraction_used, seed)
    assert by_nearest == {d.text for d, chosen in zip(corpus, result.validation, strict=True) if chosen}
    if not by_wanted:
        assert len(by_nearest) == 1
    elif len(by_wanted) == len(texts):
        assert len(by_nearest) == len(texts) - 1
    else:
        assert by_nearest == by_wanted
