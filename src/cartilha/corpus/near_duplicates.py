"""Near-duplicates: documents that share most of their word trigrams, as their signatures tell.

The share of equal values in two signatures estimates the Jaccard similarity of the trigrams within about 0.04. Only
documents whose values agree in a whole band are compared (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from cartilha.corpus.pieces import large_array, pieces
from cartilha.corpus.signatures import NUM_VALUES, mixed, signatures

MIN_SIMILARITY = 0.3  # changing 15 % of a text's words leaves about 0.44, which is 0.85^3 / (2 - 0.85^3)
BAND_VALUES = 3
NUM_BANDS = NUM_VALUES // BAND_VALUES
DOCUMENTS_AT_ONCE = 256
KEYS_AT_ONCE = 1 << 21  # sorted at a time: some 150 MB
PAIRS_AT_ONCE = 1 << 17  # their signatures take up to 67 MB


def _band_keys(values: np.ndarray, band: int) -> np.ndarray:
    """A band of the signatures (in columns) joined into one number: uint64, shape (num_documents,); 0 without words."""
    keys = np.zeros(values.shape[1], np.uint64)
    for value in values[band * BAND_VALUES : (band + 1) * BAND_VALUES]:
        keys = (keys << np.uint64(16)) | value.astype(np.uint64)
    return keys


def has_near_duplicate(texts: Sequence[str], known: Iterable[str]) -> np.ndarray:
    """Which texts have a near-duplicate (or themselves) among the known ones, which are streamed: bool."""
    own = signatures(texts)
    by_key: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(NUM_BANDS)]
    for band, numbers in enumerate(by_key):
        for number, key in enumerate(_band_keys(own.T, band).tolist()):
            numbers[key].append(number)
        numbers.pop(0, None)  # texts without words
    result = np.zeros(len(texts), bool)
    stream = iter(known)
    while batch := list(islice(stream, DOCUMENTS_AT_ONCE)):
        others = signatures(batch)
        for band, numbers in enumerate(by_key):
            for row, key in enumerate(_band_keys(others.T, band).tolist()):
                for number in numbers.get(key, ()):
                    result[number] |= (own[number] == others[row]).mean() >= MIN_SIMILARITY
    return result


def cluster(files: Sequence[Path]) -> np.ndarray:
    """The cluster of each document, as the number of the cluster's first document: int64, shape (num_documents,).

    Documents are numbered consecutively, file by file, as `save_signatures` wrote them.
    """
    # Files are opened only while they are read: there may be more than a process may hold open.
    starts = np.cumsum([0, *(np.load(file, mmap_mode="r").shape[1] for file in files)])
    parents = large_array((int(starts[-1]),), np.int64)
    for piece in pieces(len(parents)):
        parents[piece] = np.arange(piece.start, piece.stop)
    for pairs in _apart(_candidates(files, starts), parents):
        alike = _similarity(files, starts, pairs) >= MIN_SIMILARITY
        for pair in pairs[alike].tolist():
            first, second = sorted(_root(parents, document) for document in pair)
            parents[second] = first
    for piece in pieces(len(parents)):
        parents[piece] = _roots(parents, parents[piece])
    return parents


def _apart(found: Iterable[tuple[np.ndarray, np.ndarray]], parents: np.ndarray) -> Iterator[np.ndarray]:
    """The pairs that are in different clusters so far, most of them once: int64, shape (at most PAIRS_AT_ONCE, 2)."""
    held = np.zeros(0, np.int64)  # first document times the number of documents, plus the other one
    for first, other in chain(found, [(held, held)]):
        apart = _roots(parents, first) != _roots(parents, other)
        held = np.concatenate([held, first[apart] * len(parents) + other[apart]])
        if len(held) >= PAIRS_AT_ONCE or not len(first):
            held = np.unique(held)
            for begin in range(0, len(held), PAIRS_AT_ONCE):
                yield np.stack(np.divmod(held[begin : begin + PAIRS_AT_ONCE], len(parents)), axis=1)
            held = held[:0]


def _candidates(files: Sequence[Path], starts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs that share a band's key: the first document that has the key, and each other one, int64 both.

    A group of n gives n - 1 pairs, not n squared.
    """
    keys = large_array((int(starts[-1]),), np.uint64)
    num_parts = 1 + len(keys) // KEYS_AT_ONCE
    for band in range(NUM_BANDS):
        for file, start, end in zip(files, starts, starts[1:], strict=False):
            keys[start:end] = _band_keys(np.load(file, mmap_mode="r"), band)
        for part in range(num_parts):
            yield from _same_keys(_part_of(keys, part, num_parts))


def _part_of(keys: np.ndarray, part: int, num_parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents whose keys are in this part of all keys, ascending, and the keys; mostly all of them at once."""
    documents, own = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for piece in pieces(len(keys)):
        of_piece = keys[piece]
        wanted = of_piece != 0
        if num_parts > 1:
            wanted &= (mixed(of_piece) >> np.uint64(32)) * np.uint64(num_parts) >> np.uint64(32) == part
        documents.append(piece.start + np.flatnonzero(wanted))
        own.append(of_piece[wanted])
        if sum(map(len, own)) > 2 * KEYS_AT_ONCE or piece.stop == len(keys):  # many have the same key
            yield np.concatenate(documents), np.concatenate(own)
            documents, own = documents[:1], own[:1]


def _same_keys(chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first document of each key with every other one that has it; documents ascend from chunk to chunk."""
    known, firsts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    own, first = known, firsts
    for documents, keys in chunks:
        if len(own):  # of the chunk before
            known, firsts = np.concatenate([known, own]), np.concatenate([firsts, first])
            order = np.argsort(known, kind="stable")
            known, firsts = known[order], firsts[order]
        order = np.argsort(keys)
        documents, keys = documents[order], keys[order]
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
        own, first = keys[begins], np.minimum.reduceat(documents, begins) if len(begins) else documents
        if len(known):
            places = np.minimum(np.searchsorted(known, own), len(known) - 1)
            first = np.where(known[places] == own, firsts[places], first)
        of_each = np.repeat(first, np.diff(begins, append=len(keys)))
        again = of_each != documents
        if again.any():
            yield of_each[again], documents[again]


def _similarity(files: Sequence[Path], starts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The share of values in which the documents of each pair agree: float64, shape (num_pairs,)."""
    documents, places = np.unique(pairs, return_inverse=True)
    values = np.empty((NUM_VALUES, len(documents)), np.uint16)
    bounds = np.searchsorted(documents, starts)
    for number, file in enumerate(files):
        rows = slice(bounds[number], bounds[number + 1])
        if rows.start < rows.stop:
            values[:, rows] = np.load(file, mmap_mode="r")[:, documents[rows] - starts[number]]
    first, second = places.reshape(-1, 2).T
    agree = np.zeros(len(pairs), np.int64)
    for value in values:
        agree += value[first] == value[second]
    return agree / NUM_VALUES


def _roots(parents: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The first document of the cluster of each document, so far."""
    roots = parents[documents]
    while not np.array_equal(roots, above := parents[roots]):
        roots = above
    return np.asarray(roots)


def _root(parents: np.ndarray, document: int) -> int:
    """The first document of a cluster; on the way, every other document is put below its grandparent."""
    while parents[document] != document:
        parents[document] = parents[parents[document]]
        document = int(parents[document])
    return document
