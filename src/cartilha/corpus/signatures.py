"""MinHash signatures: a few numbers a document, from which the share of word trigrams that two have in common is told.

The words of many documents are hashed at once, as bytes, without making a string of any: with prefix sums of
`byte * BASE^position` modulo 2^64, a word's hash is a difference of two of them, brought back to position 0. The
MinHash itself is rensa's (R-MinHash; Broder 1997 for the principle).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cartilha.errors import UserError

SHINGLE_WORDS = 3
NUM_VALUES = 128
SEED = 0
BLOCK_BYTES = 1 << 18  # bytes hashed at once: its arrays of 8 bytes each stay in the processor's cache

_BASE = 0x9E3779B97F4A7C15


def signatures(texts: Sequence[str]) -> np.ndarray:
    """The signatures of texts: uint16, shape (num_texts, NUM_VALUES); zeros where a text has no word.

    Two texts agree in about that share of the values that is the Jaccard similarity of their trigrams. Words are runs
    of letters and digits in lower case (any character beyond ASCII counts as a letter); a text of fewer than three
    words is one shingle.

    Raises:
        UserError: The `text` extra is missing.
    """
    try:
        from rensa import RMinHash
    except ImportError:
        raise UserError('Near-duplicates need an extra: pip install "cartilha[text]"') from None
    result = np.zeros((len(texts), NUM_VALUES), np.uint16)
    begin = 0
    while begin < len(texts):
        end, num_bytes = begin, 0
        encoded: list[bytes] = []
        while end < len(texts) and (not encoded or num_bytes < BLOCK_BYTES):
            encoded.append(texts[end].lower().encode("utf-8"))
            num_bytes += len(encoded[-1])
            end += 1
        hashes, counts = _shingle_hashes(encoded)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
        rows = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, NUM_VALUES, SEED).to_rows()
        result[begin:end] = np.asarray(rows, np.uint32).astype(np.uint16)
        result[begin:end][counts == 0] = 0
        begin = end
    return result


def save_signatures(path: Path, values: np.ndarray) -> None:
    """Write signatures as `cluster` reads them: one value of all documents after the other.

    Args:
        path: A `.npy` file.
        values: uint16, shape (num_documents, NUM_VALUES).
    """
    with path.open("wb") as file:
        np.save(file, np.ascontiguousarray(values.T))


def _powers(base: int, count: int) -> np.ndarray:
    """Powers of `base` modulo 2^64 from the 0th: uint64, shape (count,)."""
    result = np.ones(count, np.uint64)
    known = 1
    while known < count:
        more = min(known, count - known)
        result[known : known + more] = result[:more] * np.uint64(pow(base, known, 1 << 64))
        known += more
    return result


class _Powers:
    """Powers of the base and of its inverse, for texts as long as any that came so far."""

    def __init__(self) -> None:
        self.up = self.down = np.ones(0, np.uint64)

    def reach(self, count: int) -> None:
        if len(self.up) < count:
            self.up = _powers(_BASE, 2 * count)
            self.down = _powers(pow(_BASE, -1, 1 << 64), 2 * count)


_POWERS = _Powers()


def _letter_table() -> np.ndarray:
    """What each byte counts as: itself within a word, in lower case; 0 outside."""
    table = np.zeros(256, np.uint8)
    for byte in range(256):
        if byte >= 128 or chr(byte).isalnum():
            table[byte] = ord(chr(byte).lower()) if byte < 128 else byte
    return table


_LETTERS = _letter_table()


def _shingle_hashes(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the shingles of all texts, one text after the other, and how many each has: uint64 and int64."""
    starts, words = _word_hashes(b"\n".join(texts))
    bounds = np.cumsum([0, *(len(text) + 1 for text in texts)])
    first = np.searchsorted(starts, bounds)  # each text's first word
    num_words = np.diff(first)
    counts = np.where(num_words >= SHINGLE_WORDS, num_words - SHINGLE_WORDS + 1, np.minimum(num_words, 1))
    padded = np.concatenate([words, np.zeros(SHINGLE_WORDS - 1, np.uint64)])
    hashes = _mixed(padded[:-2] * np.uint64(3) + padded[1:-1] * np.uint64(0x94D049BB133111EB) + padded[2:])
    shingle = np.arange(len(words)) - np.repeat(first[:-1], num_words)  # its number within the text
    kept = shingle < np.repeat(counts, num_words)
    short = np.flatnonzero((num_words > 0) & (num_words < SHINGLE_WORDS))
    for text in short:  # what follows belongs to the next text
        hashes[first[text]] = _mixed(words[first[text] : first[text + 1]].sum(keepdims=True))[0]
    return hashes[kept], counts


def _word_hashes(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each word of the text begins, and its hash: int64 and uint64."""
    _POWERS.reach(len(data) + 1)
    letters = _LETTERS[np.frombuffer(data, np.uint8)]
    inside = np.zeros(len(data) + 2, bool)
    inside[1:-1] = letters != 0
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(letters * _POWERS.up[: len(data)], out=sums[1:])
    return starts, _mixed((sums[ends] - sums[starts]) * _POWERS.down[starts])


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spreads every bit over all (the finalizer of SplitMix64, but for its last step)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray(values ^ (values >> np.uint64(27)))
