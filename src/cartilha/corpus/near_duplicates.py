"""Near-duplicates: documents that share most of their word trigrams, as their signatures tell.

The share of equal values in two signatures estimates the Jaccard similarity of the trigrams within about 0.04. Only
documents whose values agree in a whole band are compared (Broder 1997; Leskovec, Rajaraman and Ullman, chapter 3).
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cartilha.corpus.signatures import NUM_VALUES, signatures
from cartilha.errors import import_extra

MIN_SIMILARITY = 0.3  # changing 15 % of a text's words leaves about 0.44, which is 0.85^3 / (2 - 0.85^3)
BAND_VALUES = 3
NUM_BANDS = NUM_VALUES // BAND_VALUES
DOCUMENTS_AT_ONCE = 256
PAIRS_AT_ONCE = 1 << 19  # their signatures take up to a quarter of a gigabyte


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


def cluster(files: Sequence[Path], *, memory_bytes: int = 1 << 30, scratch: Path | None = None) -> np.ndarray:
    """The cluster of each document, as the number of the cluster's first document: int64, shape (num_documents,).

    Documents are numbered consecutively, file by file, as `save_signatures` wrote them. Memory holds eight bytes per
    document and the `memory_bytes` that DuckDB may use; the rest goes to the directory `scratch` (by default the
    system's). A UserError says that the extra `text` is missing.
    """
    duckdb = import_extra("duckdb", "The search for near-duplicates", "text")
    # Files are opened only while they are read: there may be more than a process may hold open.
    starts = np.cumsum([0, *(np.load(file, mmap_mode="r").shape[1] for file in files)])
    parents = np.arange(starts[-1])
    with tempfile.TemporaryDirectory(dir=scratch) as spill, duckdb.connect() as database:
        database.execute("SET memory_limit = ?", [f"{memory_bytes}B"])
        database.execute("SET temp_directory = ?", [spill])
        database.execute("SET preserve_insertion_order = false")
        for pairs in _candidates(database, files, starts):
            alike = _similarity(files, starts, pairs) >= MIN_SIMILARITY
            for pair in pairs[alike].tolist():
                first, second = sorted(_root(parents, document) for document in pair)
                parents[second] = first
    # Follow parents until each document has its root.
    while not np.array_equal(parents, parents[parents]):
        parents = parents[parents]
    return parents


def _candidates(database: Any, files: Sequence[Path], starts: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs that share a band's key, each once: int64, shape (at most PAIRS_AT_ONCE, 2)."""
    import pyarrow as pa

    schema = pa.schema([("key", pa.uint64()), ("document", pa.int64())])
    database.execute("CREATE TEMP TABLE pairs (first BIGINT, second BIGINT)")
    for band in range(NUM_BANDS):
        batches = (
            pa.record_batch([_band_keys(np.load(file, mmap_mode="r"), band), np.arange(start, end)], schema=schema)
            for file, start, end in zip(files, starts, starts[1:], strict=False)
        )
        keys = pa.RecordBatchReader.from_batches(schema, batches)  # noqa: F841 DuckDB finds it by its name
        database.execute("CREATE OR REPLACE TEMP TABLE band AS SELECT * FROM keys WHERE key <> 0")
        # A group of n gives n - 1 pairs, not n squared: each document with the group's first.
        database.execute(
            "INSERT INTO pairs SELECT first, document FROM band JOIN"
            " (SELECT key, min(document) AS first FROM band GROUP BY key HAVING count(*) > 1) USING (key)"
            " WHERE document <> first"
        )
    result = database.execute("SELECT DISTINCT first, second FROM pairs ORDER BY first, second")
    while rows := result.fetchmany(PAIRS_AT_ONCE):
        yield np.array(rows)


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


def _root(parents: np.ndarray, document: int) -> int:
    """The first document of a cluster; on the way, every other document is put below its grandparent."""
    while parents[document] != document:
        parents[document] = parents[parents[document]]
        document = int(parents[document])
    return document
