"""What a text costs under a tokenizer: tokens per word, bytes per token, words in many pieces, letters cut apart.

Tokens per word (fertility) are the tokens of whole texts divided by the number of words that white space separates.
Pieces of a single word are counted on words of letters alone, as they stand after a space.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cartilha.corpus.document import Document
from cartilha.tokens.tokenizer import TextTokenizer

MANY_PIECES = 3
NUM_LISTED = 20  # of the costliest words, and of letters
WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Fertility:
    """Figures of one domain or of the whole text; words of letters are in pieces if they take three tokens or more."""

    num_documents: int
    num_words: int
    num_bytes: int
    num_tokens: int
    share_in_pieces: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the two ratios."""
        return {
            **asdict(self),
            "tokens_per_word": self.num_tokens / max(1, self.num_words),
            "bytes_per_token": self.num_bytes / max(1, self.num_tokens),
        }


@dataclass(frozen=True)
class CostlyWord:
    """A word and the texts of its tokens (a part of a character shows as U+FFFD)."""

    word: str
    count: int
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class CostlyLetter:
    """A letter beyond a to z, with the mean of the tokens per word over the words that have it, by occurrence.

    It is apart where it is a token of its own, or its bytes are in two tokens.
    """

    letter: str
    count: int
    share_apart: float
    tokens_per_word: float


class FertilityCounter:
    """Counts documents as they are added; ask for its figures after the last one."""

    def __init__(self, tokenizer: TextTokenizer, *, after_space: bool) -> None:
        self._tokenizer = tokenizer
        self._prefix = " " if after_space else ""
        self._words: dict[str, Counter[str]] = defaultdict(Counter)
        self._sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(4, np.int64))
        self.id_counts = np.zeros(tokenizer.num_ids, np.int64)

    def add(self, documents: Sequence[Document]) -> None:
        """Count some documents."""
        encoded = self._tokenizer.encode([document.text for document in documents])
        for document, ids in zip(documents, encoded, strict=True):
            text = document.text
            self._sums[document.domain] += (1, len(text.split()), len(text.encode("utf-8")), len(ids))
            self._words[document.domain].update(WORD.findall(text))
            self.id_counts += np.bincount(ids, minlength=len(self.id_counts))

    def by_domain(self) -> dict[str, Fertility]:
        """The figures of each domain, by name."""
        return {name: self._fertility(self._sums[name], self._words[name]) for name in sorted(self._sums)}

    def total(self) -> Fertility:
        """The figures of the whole text."""
        return self._fertility(sum(self._sums.values(), np.zeros(4, np.int64)), self._all_words)

    def costliest_words(self) -> list[CostlyWord]:
        """The words that cost the most tokens beyond one each, over all of their occurrences."""
        words, num_pieces = self._all_words, self._num_pieces
        order = sorted(words, key=lambda word: (-words[word] * (num_pieces[word] - 1), word))[:NUM_LISTED]
        encoded = self._tokenizer.encode([self._prefix + word for word in order])
        pieces = [tuple(self._tokenizer.decode_each(ids)) for ids in encoded]
        return [CostlyWord(word, words[word], own) for word, own in zip(order, pieces, strict=True)]

    def costliest_letters(self) -> list[CostlyLetter]:
        """The letters beyond ASCII that are cut apart most often."""
        words = {self._prefix + word: count for word, count in self._all_words.items() if not word.isascii()}
        encodings = self._tokenizer.backend.encode_batch(list(words), add_special_tokens=False)
        seen, apart, tokens, in_words = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        for (word, count), encoding in zip(words.items(), encodings, strict=True):
            for place, letter in enumerate(word):
                if letter.isascii():
                    continue
                inside = [(a, b) for a, b in encoding.offsets if a <= place < b]
                seen[letter] += count
                apart[letter] += count * (len(inside) > 1 or inside == [(place, place + 1)])
            for letter in {letter for letter in word if not letter.isascii()}:
                tokens[letter] += count * len(encoding.ids)
                in_words[letter] += count
        order = sorted(seen, key=lambda letter: (-apart[letter], letter))[:NUM_LISTED]
        return [CostlyLetter(x, seen[x], apart[x] / seen[x], tokens[x] / in_words[x]) for x in order]

    @cached_property
    def _all_words(self) -> Counter[str]:
        words = Counter[str]()
        for own in self._words.values():  # `sum` would copy all words once per domain
            words.update(own)
        return words

    @cached_property
    def _num_pieces(self) -> dict[str, int]:
        encoded = self._tokenizer.encode([self._prefix + word for word in self._all_words])
        return dict(zip(self._all_words, map(len, encoded), strict=True))

    def _fertility(self, sums: np.ndarray, words: Counter[str]) -> Fertility:
        in_pieces = sum(count for word, count in words.items() if self._num_pieces[word] >= MANY_PIECES)
        num_documents, num_words, num_bytes, num_tokens = map(int, sums)
        return Fertility(num_documents, num_words, num_bytes, num_tokens, in_pieces / max(1, words.total()))
