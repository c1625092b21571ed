"""Arrays over all documents, looked at piece by piece: the cuts do not depend on how the work was shared out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

PIECE = 1 << 20  # documents
NUM_BINS = 4096
IN_MEMORY_BYTES = 1 << 20  # larger arrays are files


_folder: Path | None = None  # where large arrays are files


@contextmanager
def large_arrays_in(folder: Path) -> Iterator[None]:
    """Have `large_array` make files in a folder: the system can drop their pages when memory is short."""
    global _folder
    before, _folder = _folder, folder
    try:
        yield
    finally:
        _folder = before


def large_array(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of zeros: in memory if it is small, or without `large_arrays_in`; else a mapped file without a name."""
    num_bytes = np.dtype(dtype).itemsize * math.prod(shape)
    if _folder is None or num_bytes <= IN_MEMORY_BYTES:
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile(dir=_folder) as file:  # gone with the last reference to the array
        file.truncate(num_bytes)
        return np.memmap(file, dtype, "r+", shape=shape).view(np.ndarray)


def pieces(num_documents: int) -> Iterator[slice]:
    """Consecutive slices that make up so many documents."""
    return (slice(begin, min(begin + PIECE, num_documents)) for begin in range(0, num_documents, PIECE))


def each(function: Callable[..., np.ndarray], *arrays: np.ndarray, dtype: DTypeLike = bool) -> np.ndarray:
    """What an elementwise function gives of arrays over all documents, computed piece by piece."""
    result = large_array((len(arrays[0]),), dtype)
    for piece in pieces(len(result)):
        result[piece] = function(*(array[piece] for array in arrays))
    return result


def without(mask: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """The documents of a mask that are in none of the other masks: bool."""
    return each(lambda own, *left_out: own & ~np.logical_or.reduce(left_out), mask, *others)


def total(values: np.ndarray, mask: np.ndarray) -> int:
    """The sum of the values under a mask, or of the products with other whole numbers."""
    return sum(int(values[piece].astype(np.int64) @ mask[piece]) for piece in pieces(len(values)))


def nth_true(mask: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The places of the true values with these numbers (from 0, ascending) in a mask: int64."""
    found, before = [np.zeros(0, np.int64)], 0
    for piece in pieces(len(mask)):
        num_true = int(np.count_nonzero(mask[piece]))
        own = ranks[(ranks >= before) & (ranks < before + num_true)]
        if len(own):
            found.append(piece.start + np.flatnonzero(mask[piece])[own - before])
        before += num_true
    return np.concatenate(found)


def extremes(values: np.ndarray, mask: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest of the values under a mask, at most so many of each, ascending."""
    low = high = values[:0]
    for piece in pieces(len(values)):
        own = values[piece][mask[piece]]
        low = np.sort(_lowest(np.concatenate([low, own]), number))
        high = -np.sort(_lowest(-np.concatenate([high, own]), number))[::-1]
    return low, high


def _lowest(values: np.ndarray, number: int) -> np.ndarray:
    return np.asarray(np.partition(values, number - 1)[:number] if len(values) > number else values)


def evenly(mask: np.ndarray, number: int) -> np.ndarray:
    """The places of about so many of the true values in a mask, at even distances: int64, ascending."""
    num_true = int(np.count_nonzero(mask))
    return nth_true(mask, np.unique(np.linspace(0, num_true - 1, min(number, num_true)).astype(np.int64)))


def at_the_ends(values: np.ndarray, mask: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of the lowest values under a mask, from the lowest, and of the highest, from the highest: int64."""
    low, high = extremes(values, mask, number)
    found: list[np.ndarray] = []
    for sign, bound in ((1, low[-1:]), (-1, high[:1])):
        parts = [np.zeros(0, np.int64)]
        for piece in pieces(len(values)) if len(bound) else ():
            parts.append(piece.start + np.flatnonzero(mask[piece] & (sign * values[piece] <= sign * bound)))
        places = np.concatenate(parts)
        found.append(places[np.argsort(sign * values[places], kind="stable")][:number])
    return found[0], found[1]


def in_order(values: np.ndarray, mask: np.ndarray, *, descending: bool = False) -> Iterator[np.ndarray]:
    """The places of the values under a mask from the lowest on, or from the highest, some at a time: int64.

    Places of equal values ascend in either order.
    """
    sign = -1 if descending else 1
    low, high = extremes(values, mask, 1)
    if not len(low):
        return
    edges = np.linspace(low[0], high[0], NUM_BINS + 1)[1:-1]  # bin b holds what is from edges[b - 1] to below edges[b]
    counts = np.zeros(NUM_BINS, np.int64)
    for piece in pieces(len(values)):
        bins = np.searchsorted(edges, values[piece][mask[piece]], side="right")
        counts += np.bincount(bins, minlength=NUM_BINS)
    in_turn, begin = counts[::sign], 0
    while begin < NUM_BINS:
        end = begin + 1
        while end < NUM_BINS and in_turn[begin : end + 1].sum() <= PIECE:
            end += 1
        first, past = (begin, end) if sign > 0 else (NUM_BINS - end, NUM_BINS - begin)
        lower = edges[first - 1] if first else -np.inf
        upper = edges[past - 1] if past < NUM_BINS else np.inf
        parts = [np.zeros(0, np.int64)]
        for piece in pieces(len(values)):
            own = values[piece]
            parts.append(piece.start + np.flatnonzero(mask[piece] & (own >= lower) & (own < upper)))
        places = np.concatenate(parts)
        yield places[np.argsort(sign * values[places], kind="stable")]
        begin = end
