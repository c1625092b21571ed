"""Clusters of near-duplicates, out of core: signatures on the disk, grouped by DuckDB within a given memory.

    signature files -> a key for each band of values -> documents that share a key -> pairs -> compared -> joined

Bands propose (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3): documents whose values agree in
a whole band. The share of all values in which a pair agrees decides. Held in memory are eight bytes a document and what
DuckDB is given; the rest it spills.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cartilha.corpus.signatures import NUM_VALUES
from cartilha.errors import UserError

BAND_VALUES = 3
NUM_BANDS = NUM_VALUES // BAND_VALUES
MIN_SIMILARITY = 0.3
PAIRS_AT_ONCE = 1 << 22


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
        raise UserError('Near-duplicates need an extra: pip install "cartilha[text]"') from None
    values = [np.load(file, mmap_mode="r") for file in files]
    starts = np.cumsum([0, *(part.shape[1] for part in values)])
    parents = np.arange(starts[-1])
    with tempfile.TemporaryDirectory(dir=scratch) as spill, duckdb.connect() as database:
        database.execute("SET memory_limit = ?", [f"{memory_bytes}B"])
        database.execute("SET temp_directory = ?", [spill])
        database.execute("SET preserve_insertion_order = false")
        for pairs in _candidates(database, values, starts):
            alike = _similarity(values, starts, pairs) >= MIN_SIMILARITY
            for first, second in pairs[alike].tolist():
                _join(parents, first, second)
    # Each parent comes before its child, so that one pass in order resolves all.
    while not np.array_equal(parents, parents[parents]):
        parents = parents[parents]
    return parents


def _candidates(database: Any, values: list[np.ndarray], starts: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs that share a band's key, each once: int64, shape (at most PAIRS_AT_ONCE, 2)."""
    import pyarrow as pa

    schema = pa.schema([("key", pa.uint64()), ("document", pa.int64())])
    database.execute("CREATE TEMP TABLE pairs (first BIGINT, second BIGINT)")
    for band in range(NUM_BANDS):
        batches = (
            pa.record_batch([_keys(part, band), np.arange(start, start + part.shape[1])], schema=schema)
            for part, start in zip(values, starts, strict=False)
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
    while len(columns := result.fetch_df_chunk(PAIRS_AT_ONCE // 2048)):
        yield columns.to_numpy()


def _keys(part: np.ndarray, band: int) -> np.ndarray:
    """A band's values side by side in one number: uint64, shape (num_documents,)."""
    keys = np.zeros(part.shape[1], np.uint64)
    for value in part[band * BAND_VALUES : (band + 1) * BAND_VALUES]:
        keys = (keys << np.uint64(16)) | value.astype(np.uint64)
    return keys


def _similarity(values: list[np.ndarray], starts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The share of values in which the documents of each pair agree: float64, shape (num_pairs,)."""
    agree = np.zeros(len(pairs))
    for number in range(NUM_VALUES):
        column = np.concatenate([part[number] for part in values])
        agree += column[pairs[:, 0]] == column[pairs[:, 1]]
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
