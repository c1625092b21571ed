"""Counting on bytes gives what Python's own methods give, for any text."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from cartilha.tokens.text_counts import CharacterClasses, count_texts, number_boundaries, ranges

CLASSES = CharacterClasses()
SPACES = [chr(i) for i in range(0x3001) if chr(i).isspace()]
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from([*SPACES, *"aéã1²Ⅷ٣五.😀\u0378\U0001fae9"])
)
TEXTS = st.lists(st.text(CHARACTERS, max_size=12), max_size=6)


@given(TEXTS)
@example([])
@example(["", " ", "\u3000", "a\u2003b", "\xa0é\xa0", "\U0010ffff\u0085"])
def test_counts_are_those_of_python(texts):
    counts = count_texts([text.encode("utf-8") for text in texts], CLASSES)
    assert counts.num_bytes.tolist() == [len(text.encode("utf-8")) for text in texts]
    assert counts.num_chars.tolist() == [len(text) for text in texts]
    assert counts.num_words.tolist() == [len(text.split()) for text in texts]
    assert counts.is_rare.tolist() == [any(unicodedata.category(c) == "Cn" for c in text) for text in texts]


@given(st.text(CHARACTERS, max_size=20))
def test_numbers_are_found_where_they_are(text):
    pieces = [character for character in text if unicodedata.category(character)[0] == "N"]
    joined = text.encode("utf-8")
    found = number_boundaries(joined, CLASSES)
    inside = [joined[a:b].decode("utf-8") for a, b in pairwise(np.unique(found).tolist())]
    assert len(found) == 2 * len(pieces)
    assert [piece for piece in inside if len(piece) == 1 and unicodedata.category(piece)[0] == "N"] == pieces


def test_more_characters_can_be_rare():
    classes = CharacterClasses(ranges([ord("é"), ord("ê"), 0x2003]))
    counts = count_texts(["é".encode(), b"e", "a\u2003b".encode()], classes)
    assert counts.is_rare.tolist() == [True, False, True]
    assert counts.num_words.tolist() == [1, 1, 2]


def test_ranges():
    assert ranges([5, 3, 4, 9, 3]) == ((3, 5), (9, 9))
    assert ranges([]) == ()
