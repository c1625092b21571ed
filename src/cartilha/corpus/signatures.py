"""MinHash signatures: a few numbers per document that tell the share of word trigrams two documents have in common.

The words of many documents are hashed at once from their UTF-8 bytes; the MinHash is rensa's (Broder 1997).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence, Sized
from itertools import pairwise
from pathlib import Path

import numpy as np

from cartilha.errors import import_extra

SHINGLE_WORDS = 3
NUM_VALUES = 128
SEED = 0
VALUES_AT_ONCE = 8  # written
BLOCK_BYTES = 1 << 16  # hashed at once; the arrays stay in the processor's cache

WORD_BYTES = 24  # a longer word counts as its length and its first bytes
RUN_BYTES = 32

ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 by the golden ratio: a product with it has other high bits
_IN_WORD = bytes(byte >= 128 or chr(byte).isalnum() for byte in range(256))
_MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)  # the first bytes of eight


def signatures(texts: Sequence[str]) -> np.ndarray:
    """The signatures of texts: uint16, shape (num_texts, NUM_VALUES); zeros for a text without words.

    The share of values in which two texts agree estimates the Jaccard similarity of their trigrams. Words are runs of
    letters and digits in lower case and NFC (every character beyond ASCII counts as a letter, except the punctuation of
    Western text); a text of fewer than three words is one shingle. A UserError says that the extra `text` is missing.
    """
    rensa = import_extra("rensa", "The search for near-duplicates", "text")
    lowered = lower_case(texts)
    result = np.zeros((len(texts), NUM_VALUES), np.uint16)
    for begin, end in blocks(lowered, BLOCK_BYTES):
        hashes, counts = _shingle_hashes(lowered[begin:end])
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
        rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, NUM_VALUES, SEED).to_rows()
        result[begin:end] = np.asarray(rows, np.uint32).astype(np.uint16)
        result[begin:end][counts == 0] = 0
    return result


def blocks(texts: Sequence[Sized], size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of consecutive texts that are about so long together."""
    sizes = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    cuts = np.flatnonzero(np.diff(sizes // size)) + 1
    return pairwise(sorted({0, *cuts.tolist(), len(texts)}))


def lower_case(texts: Sequence[str]) -> list[bytes]:
    """Texts in NFC and lower case, as UTF-8: the form in which words are compared."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # Several times as fast as `str.lower`; the two differ in a final sigma and the Turkish capital I with a dot.
    composed = [unicodedata.normalize("NFC", text) for text in texts]
    lowered: list[bytes] = pc.utf8_lower(pa.array(composed, pa.large_string())).cast(pa.large_binary()).to_pylist()
    return lowered


def save_signatures(path: Path, values: np.ndarray) -> None:
    """Write signatures to a `.npy` file as `cluster` reads them: uint16, shape (NUM_VALUES, num_documents).

    They may be mapped: a few values of all documents are in memory at a time.
    """
    with path.open("wb") as file:
        # Unlike np.save, this reports why a disk took less than it was given.
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": values.T.shape})
        for begin in range(0, NUM_VALUES, VALUES_AT_ONCE):
            file.write(np.ascontiguousarray(values.T[begin : begin + VALUES_AT_ONCE], "<u2").data)


def run_hashes(text: bytes) -> np.ndarray:
    """Hashes of the `RUN_BYTES` that begin at each word of a text but the first, about five words each: uint64."""
    inside = np.frombuffer(text.translate(_IN_WORD), bool)
    starts = np.flatnonzero(inside[1:] > inside[:-1]) + 1
    starts = starts[: np.searchsorted(starts, len(text) - RUN_BYTES, side="right")]
    eights = _eights(text, starts, RUN_BYTES)
    hashes = eights[:, 0]
    for column in range(1, RUN_BYTES // 8):
        hashes = hashes * ODD + eights[:, column]
    return hashes


def _shingle_hashes(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the shingles of all texts, one text after the other, and their number in each: uint64 and int64."""
    starts, _, words = word_hashes(b"\n".join(texts))
    bounds = np.cumsum([0, *(len(text) + 1 for text in texts)])
    first = np.searchsorted(starts, bounds)  # each text's first word
    num_words = np.diff(first)
    counts = np.where(num_words >= SHINGLE_WORDS, num_words - SHINGLE_WORDS + 1, np.minimum(num_words, 1))
    padded = np.concatenate([words, np.zeros(SHINGLE_WORDS - 1, np.uint64)])
    hashes = mixed(padded[:-2] * np.uint64(3) + padded[1:-1] * np.uint64(0x94D049BB133111EB) + padded[2:])
    shingle = np.arange(len(words)) - np.repeat(first[:-1], num_words)  # its number within the text
    kept = shingle < np.repeat(counts, num_words)
    for text in np.flatnonzero((num_words > 0) & (num_words < SHINGLE_WORDS)):  # other words belong to the next text
        hashes[first[text]] = mixed(words[first[text] : first[text + 1]].sum(keepdims=True))[0]
    return hashes[kept], counts


def word_hashes(text: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each word of a text begins and ends, and a hash of its length and first bytes: int64, int64, uint64."""
    starts, ends = word_bounds(text)
    lengths = ends - starts
    eights = _eights(text + bytes(WORD_BYTES), starts, WORD_BYTES)
    hashes = lengths.astype(np.uint64) * ODD + (eights[:, 0] & _MASKS[np.minimum(lengths, 8)])
    for column in range(1, WORD_BYTES // 8):
        offset = 8 * column
        longer = np.flatnonzero(lengths > offset)  # a few words
        part = eights[longer, column] & _MASKS[np.minimum(lengths[longer] - offset, 8)]
        hashes[longer] = hashes[longer] * ODD + part
    return starts, ends, mixed(hashes)


def word_bounds(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of letters and digits begins and ends: int64, shape (num_words,) each."""
    inside = np.zeros(len(text) + 2, bool)
    inside[1:-1] = np.frombuffer(text.translate(_IN_WORD), bool)
    for place, num_bytes in _punctuation(np.frombuffer(text, np.uint8)):
        inside[1 + place[:, None] + np.arange(num_bytes)] = False
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return edges[::2], edges[1::2]


def _punctuation(text: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Where the signs beyond ASCII are that Western text has between words, and how many bytes each has."""
    place = np.flatnonzero(text == 0xE2)
    yield place[(text[place + 1] | 1) == 0x81], 3  # U+2000 to U+207F: quotes, dashes, the ellipsis, spaces
    place = np.flatnonzero(text == 0xC2)
    second = text[place + 1]  # U+00A0 to U+00BF but for the letters U+00AA, U+00B5 and U+00BA
    yield place[(second >= 0xA0) & (second != 0xAA) & (second != 0xB5) & (second != 0xBA)], 2


def _eights(text: bytes, starts: np.ndarray, num_bytes: int) -> np.ndarray:
    """The bytes that begin at each place, eight to a number: uint64, shape (num_starts, num_bytes // 8)."""
    # The bytes of a place are copied together; reading them as unaligned numbers takes five times as long.
    pieces = np.ndarray(max(0, len(text) - num_bytes + 1), f"V{num_bytes}", text, strides=(1,))[starts]
    return np.asarray(pieces.view("<u8").reshape(-1, num_bytes // 8))


def mixed(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all (the finalizer of SplitMix64 without its last step)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray(values ^ (values >> np.uint64(27)))
