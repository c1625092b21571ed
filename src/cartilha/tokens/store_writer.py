"""Writes a token store, whose bytes depend on the documents and their order, not on how many are added at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartilha.corpus.splits import SPLITS, Split
from cartilha.storage import file_sha256, new_directory, write_sealed_json
from cartilha.tokens.store import SplitCounts
from cartilha.tokens.store_checks import COUNTS, FORMAT_VERSION, remember_verdict
from cartilha.tokens.tokenizer import TextTokenizer

MAX_UINT16_IDS = 65_536
ROWS_PER_GROUP = 50_000
TEXT_GROUP_BYTES = 16 << 20  # texts are written in groups of about this size
TEXT_LEVEL = 3  # a quarter smaller than level 1, in one and a half times the time

# What is given to a writer for each document; the writer adds `start`.
_ORIGIN = [(name, pa.string()) for name in ("doc_id", "source", "domain")]
_NUMBERS = [*((name, pa.int64()) for name in COUNTS[1:]), ("text_hash", pa.string()), ("cluster", pa.int64())]
ROW_SCHEMA = pa.schema([*_ORIGIN, *_NUMBERS])
DOCUMENT_SCHEMA = pa.schema([*_ORIGIN, ("start", pa.int64()), *_NUMBERS])
TEXT_SCHEMA = pa.schema([("text_hash", pa.string()), ("text", pa.large_string())])


def token_dtype(num_ids: int) -> np.dtype[Any]:
    """The smallest type that a store keeps ids in."""
    return np.dtype("<u2" if num_ids <= MAX_UINT16_IDS else "<u4")


class SplitWriter:
    """Appends to the files of one side and keeps its sums."""

    def __init__(self, directory: Path, split: Split, dtype: np.dtype[Any], stack: ExitStack) -> None:
        self._dtype = dtype
        self._stack = stack
        self._tokens = self._stack.enter_context((directory / f"{split}.tokens").open("wb"))
        self._token_hash = hashlib.sha256()
        self._documents = self._parquet(directory / f"{split}.documents.parquet", DOCUMENT_SCHEMA)
        text_path = directory / "validation.text.parquet"
        self._texts = self._parquet(text_path, TEXT_SCHEMA, TEXT_LEVEL) if split == "validation" else None
        self._rows = [DOCUMENT_SCHEMA.empty_table()]
        self._num_rows = 0
        self._held_texts: list[tuple[str, bytes]] = []
        self._held_bytes = 0
        self._hashes = hashlib.sha256()
        self._sums = dict.fromkeys(COUNTS, 0)

    def _parquet(self, path: Path, schema: pa.Schema, level: int = 1) -> pq.ParquetWriter:
        return self._stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd", compression_level=level))

    def add_rows(self, rows: pa.Table) -> None:
        """Append the rows of documents (`ROW_SCHEMA`); their tokens and texts must come in the same order."""
        num_tokens = rows["num_tokens"].to_numpy()
        start = self._sums["num_tokens"] + np.cumsum(num_tokens) - num_tokens
        for name in COUNTS[1:]:
            self._sums[name] += int(rows[name].to_numpy().sum())
        self._sums["num_documents"] += len(rows)
        self._hashes.update("".join(rows["text_hash"].to_pylist()).encode("ascii"))
        self._rows.append(rows.append_column("start", pa.array(start, pa.int64())).select(DOCUMENT_SCHEMA.names))
        self._num_rows += len(rows)
        while self._num_rows >= ROWS_PER_GROUP:
            self._write_rows(ROWS_PER_GROUP)

    def _write_rows(self, num_rows: int) -> None:
        whole = pa.concat_tables(self._rows)
        self._documents.write_table(whole.slice(0, num_rows).combine_chunks().cast(DOCUMENT_SCHEMA))
        self._rows = [whole.slice(num_rows)]
        self._num_rows -= num_rows

    def add_tokens(self, ids: np.ndarray) -> None:
        """Append ids of any number of documents, or of a part of one."""
        data = np.ascontiguousarray(ids, self._dtype).view(np.uint8).data
        self._token_hash.update(data)
        self._tokens.write(data)

    def add_text(self, text_hash: str, text: bytes) -> None:
        """Append a document's text, in UTF-8 (validation only)."""
        self._held_texts.append((text_hash, text))
        self._held_bytes += len(text)
        if self._held_bytes >= TEXT_GROUP_BYTES or len(self._held_texts) >= ROWS_PER_GROUP:
            self._write_texts()

    def _write_texts(self) -> None:
        assert self._texts is not None
        hashes, texts = zip(*self._held_texts, strict=True) if self._held_texts else ((), ())
        columns = [pa.array(hashes, pa.string()), pa.array(texts, pa.large_binary()).cast(pa.large_string())]
        self._texts.write_table(pa.Table.from_arrays(columns, schema=TEXT_SCHEMA))
        self._held_texts.clear()
        self._held_bytes = 0

    def counts(self) -> SplitCounts:
        """What has been appended so far."""
        return SplitCounts(**self._sums, corpus_hash=self._hashes.hexdigest())

    def finish(self) -> str:
        """Write what is held; return the SHA-256 of the file of tokens."""
        if self._num_rows or not self._sums["num_documents"]:
            self._write_rows(self._num_rows)
        if self._texts is not None and (self._held_texts or not self._sums["num_documents"]):
            self._write_texts()
        return self._token_hash.hexdigest()


class StoreWriter:
    """Writes a store into a directory (`writing_store`); each side of `splits` may be used by its own thread."""

    def __init__(self, directory: Path, tokenizer: TextTokenizer, stack: ExitStack) -> None:
        self._stack = stack
        self.directory = directory
        self.tokenizer = tokenizer
        self.token_dtype = token_dtype(tokenizer.num_ids)
        self.splits = {split: SplitWriter(directory, split, self.token_dtype, stack) for split in SPLITS}
        self.files: dict[str, dict[str, Any]] = {}  # size and hash of each, once the store is finished

    def counts(self) -> dict[Split, SplitCounts]:
        """What each side holds so far."""
        return {split: writer.counts() for split, writer in self.splits.items()}

    def finish(self, made_from: dict[str, Any]) -> None:
        """Close the files and write store.json; `made_from` is what else it records: inputs, settings, counts."""
        hashes = {f"{split}.tokens": writer.finish() for split, writer in self.splits.items()}
        self._stack.close()
        self.tokenizer.save(self.directory / "tokenizer")
        for path in sorted(filter(Path.is_file, self.directory.rglob("*"))):
            name = path.relative_to(self.directory).as_posix()
            self.files[name] = {"size": path.stat().st_size, "sha256": hashes.get(name) or file_sha256(path)}
        info = {
            "format_version": FORMAT_VERSION,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "prefix_id": self.tokenizer.prefix_id,
            "end_id": self.tokenizer.end_id,
            "num_ids": self.tokenizer.num_ids,
            "dtype": self.token_dtype.name,
            "splits": {split: asdict(counts) for split, counts in self.counts().items()},
            **made_from,
            "files": self.files,
        }
        write_sealed_json(self.directory / "store.json", info)


@contextmanager
def writing_store(path: Path, tokenizer: TextTokenizer, *, replace: bool) -> Iterator[StoreWriter]:
    """A writer whose store appears at `path` when the block ends; a failure or a kill leaves what was there."""
    with new_directory(path, replace=replace) as temporary, ExitStack() as stack:
        writer = StoreWriter(temporary, tokenizer, stack)
        yield writer
    # The files were hashed while they were written: the first opening need not read them again.
    remember_verdict(path, writer.files)
