"""Counts words, code points and rare characters of many texts at once, from their UTF-8 bytes.

`len(text.split())` costs as much as tokenizing the text; lookups on bytes and code points are several times as fast.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_SPACE, _RARE, _NUMBER, _UNKNOWN = 1, 2, 4, 128
_ASCII_SPACES = [byte for byte in range(0x80) if chr(byte).isspace()]


@dataclass(frozen=True)
class TextCounts:
    """One entry per text: bytes of UTF-8, code points, words (`str.split`), each int64; whether it has rare ones."""

    num_bytes: np.ndarray
    num_chars: np.ndarray
    num_words: np.ndarray
    is_rare: np.ndarray


class CharacterClasses:
    """The classes of code points, looked up once and remembered; `more_rare` has ranges (first, last) beyond ASCII.

    A code point is rare if this Python's Unicode tables do not know it: libraries of another age class it differently.
    `kinds` is for `bytes.translate`: 1 for ASCII whitespace, 2 for a first byte of characters that may have a class.
    """

    def __init__(self, more_rare: tuple[tuple[int, int], ...] = ()) -> None:
        self._classes = np.full(0x110000, _UNKNOWN, np.uint8)
        for first, last in more_rare:
            self._classes[first : last + 1] = [_RARE | _class(i) for i in range(first, last + 1)]
        # The letters U+00C0 to U+00FF, which all begin with the byte 0xC3, are skipped: usually none has a class.
        plain = () if self.of(np.arange(0xC0, 0x100)).any() else (0xC3,)
        leads = [byte for byte in range(0xC2, 0xF5) if byte not in plain]
        self.kinds = bytes(1 if byte in _ASCII_SPACES else 2 * (byte in leads) for byte in range(256))

    def of(self, code_points: np.ndarray) -> np.ndarray:
        """The class of each code point, uint8: bit 1 is whitespace to `str.split`, bit 2 rare, bit 3 a number."""
        found: np.ndarray = self._classes[code_points]
        new = np.unique(code_points[found == _UNKNOWN])
        if len(new):
            self._classes[new] = [_class(code_point) for code_point in new.tolist()]
            found = self._classes[code_points]
        return found


def _class(code_point: int) -> int:
    category = unicodedata.category(chr(code_point))
    is_number = _NUMBER if category[0] == "N" else 0
    return int(chr(code_point).isspace()) | is_number | (_RARE if category == "Cn" else 0)


def count_texts(texts: Sequence[bytes], classes: CharacterClasses) -> TextCounts:
    """Count texts in valid UTF-8."""
    num_bytes = np.fromiter(map(len, texts), np.int64, len(texts))
    if not len(texts):
        return TextCounts(num_bytes, num_bytes, num_bytes, np.zeros(0, bool))
    joined = b" ".join((b"", *texts, b""))  # a space before each text, so that its first word begins like the others
    starts = np.concatenate(([0], np.cumsum(num_bytes + 1)))  # of these spaces, and of the one after the last text
    data = np.frombuffer(joined, np.uint8)
    kinds = np.frombuffer(joined.translate(classes.kinds), np.uint8)
    is_space = kinds == 1
    leads = np.flatnonzero(kinds == 2)
    code_points, widths = _decode(data, leads)
    found = classes.of(code_points)
    wide = np.flatnonzero(found & _SPACE)
    for column in range(3):  # all bytes of a whitespace character; none has four
        is_space[leads[wide[widths[wide] > column]] + column] = True
    word_begins = is_space[:-1] > is_space[1:]
    continues = data.view(np.int8) < -64  # the bytes 0x80 to 0xBF
    is_rare = np.zeros(len(texts), bool)
    is_rare[np.searchsorted(starts, leads[np.flatnonzero(found & _RARE)], side="right") - 1] = True
    return TextCounts(num_bytes, num_bytes - _sums(continues, starts), _sums(word_begins, starts), is_rare)


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many values are true from each start to the next: int64, one fewer than the starts."""
    return np.add.reduceat(values.view(np.uint8), starts[:-1], dtype=np.int32).astype(np.int64)


def _decode(data: np.ndarray, leads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The code points, and their numbers of bytes, of the characters that begin at `leads` (not ASCII)."""
    first = data[leads].astype(np.int32)
    second = data[leads + 1].astype(np.int32) & 0x3F
    code_points = (first & 0x1F) << 6 | second
    widths = np.full(len(leads), 2, np.int8)
    wide = np.flatnonzero(first >= 0xE0)
    third = data[leads[wide] + 2].astype(np.int32) & 0x3F
    code_points[wide] = (first[wide] & 0x0F) << 12 | second[wide] << 6 | third
    widths[wide] = 3
    widest = wide[first[wide] >= 0xF0]
    fourth = data[leads[widest] + 3].astype(np.int32) & 0x3F
    last_two = (data[leads[widest] + 2].astype(np.int32) & 0x3F) << 6 | fourth
    code_points[widest] = (first[widest] & 0x07) << 18 | second[widest] << 12 | last_two
    widths[widest] = 4
    return code_points, widths


def number_boundaries(joined: bytes, classes: CharacterClasses) -> np.ndarray:
    """The bytes where each numeric character (Unicode's Nd, Nl and No) begins and ends in joined texts, unordered."""
    data = np.frombuffer(joined + b"    ", np.uint8)
    leads = np.flatnonzero(data >= 0xC2)
    code_points, widths = _decode(data, leads)
    is_number = np.flatnonzero(classes.of(code_points) & _NUMBER)
    digits = np.flatnonzero(data - np.uint8(0x30) < 10)  # bytes below the digit 0 wrap around
    return np.concatenate((digits, digits + 1, leads[is_number], (leads + widths)[is_number]))


def ranges(code_points: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Code points as ranges (first, last)."""
    ordered = np.unique(np.fromiter(code_points, np.int64))
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1)
    return tuple((int(run[0]), int(run[-1])) for run in runs if len(run))
