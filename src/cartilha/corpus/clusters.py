"""Clusters of near-duplicates, out of core: signatures on the disk, grouped by DuckDB within a given memory.

    signature files -> a key for each band of values -> documents that share a key -> pairs -> compared -> joined

`near_duplicates` says what a pair is. Held in memory are eight bytes a document and what DuckDB is given; the rest it
spills.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cartilha.corpus.near_duplicates import MIN_SIMILARITY, NUM_BANDS, band_keys
from cartilha.corpus.signatures import NUM_VALUES
from cartilha.errors import missing_extra

PAIRS_AT_ONCE = 1 << 19  # their signatures take up to a quarter of a gigabyte


def cluster(files: Sequence[Path], *, memory_bytes: int = 1 << 30, scratch: Path | None = None) -> np.ndarray:
    """The cluster of each document, named by its first one: int64, shape (num_documents,).

    Args:
        files: What `save_signatures` wrote; documents are numbered through, file by file.
        memory_bytes: What DuckDB may hold before it spills.
        scratch: Where it spills to; default the system's temporary directory.

    Raises:
        UserError: The `text` extra is missing.
    """
    try:
        import duckdb
    except ImportError:
        raise missing_extra("The search for near-duplicates", "text") from None
    # Files are opened when they are read: there may be more of them than a process may hold open.
    starts = np.cumsum([0, *(np.load(file, mmap_mode="r").shape[1] for file in files)])
    parents = np.arange(starts[-1])
    with tempfile.TemporaryDirectory(dir=scratch) as spill, duckdb.connect() as database:
        database.execute("SET memory_limit = ?", [f"{memory_bytes}B"])
        database.execute("SET temp_directory = ?", [spill])
        database.execute("SET preserve_insertion_order = false")
        for pairs in _candidates(database, files, starts):
            alike = _similarity(files, starts, pairs) >= MIN_SIMILARITY
            for first, second in pairs[alike].tolist():
                _join(parents, first, second)
    # Each parent comes before its child, so that one pass in order resolves all.
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
            pa.record_batch([band_keys(np.load(file, mmap_mode="r"), band), np.arange(start, end)], schema=schema)
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


def _join(parents: np.ndarray, first: int, second: int) -> None:
    """Union-find: the later of the two roots is put below the earlier."""
    roots = []
    for node in (first, second):
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = int(parents[node])
        roots.append(node)
    parents[max(roots)] = min(roots)
