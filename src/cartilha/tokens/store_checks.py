"""What is checked of a store before it is used: it may be damaged, or somebody's trap.

Sizes and hashes first; then that its numbers agree with each other and with the files, so that nothing is allocated on
the word of a header. A verdict in the user's cache remembers unchanged files, so that big ones are hashed once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cartilha.corpus.splits import SPLITS
from cartilha.errors import UserError, first_line
from cartilha.model_reference import cache_directory
from cartilha.storage import file_sha256, read_json, read_sealed_json, write_json

STORE_KEYS = ("tokenizer_fingerprint", "prefix_id", "end_id", "num_ids", "dtype", "splits", "files")
COUNTS = ("num_documents", "num_tokens", "num_bytes", "num_chars", "num_words")
NUMBERS = ("start", *COUNTS[1:])
LABELS = ("doc_id", "source", "domain", "text_hash")
FILES = (
    *(f"{split}.{kind}" for split in SPLITS for kind in ("tokens", "documents.parquet")),
    "validation.text.parquet",
)
BYTES_A_ROW = 200  # of a document in memory: its numbers, and its labels as Python objects beside their text
TOKENS_AT_ONCE = 2**24


def read_store_info(path: Path, version: int) -> dict[str, Any]:
    """The contents of store.json.

    Raises:
        UserError: There is none, it is not as it was written, or it makes no sense.
    """
    if not (path / "store.json").is_file():
        what = "is not a store" if path.is_dir() else "is a file, not a store" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; make one with: cartilha prepare --input FILE --model MODEL --output {path}")
    try:
        unchecked = read_json(path / "store.json")
        found = unchecked["format_version"]
        if found != version:
            raise UserError(
                f"The store {path} has format {found}, this version reads {version}; prepare it with --overwrite."
            )
        if "sha256" not in unchecked and all(key in unchecked for key in STORE_KEYS):
            raise UserError(
                f"The store {path} was made by an older version (its store.json has no hash of its own); make it anew "
                "from the same input with: cartilha prepare --overwrite."
            )
        info = read_sealed_json(path / "store.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}/store.json is damaged ({error}); prepare the store again with --overwrite.") from error
    lacking = [key for key in STORE_KEYS if key not in info]
    if lacking:
        raise UserError(f"{path}/store.json lacks {', '.join(lacking)}; prepare the store again with --overwrite.")
    try:
        _check_info(info)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}/store.json makes no sense ({error}); prepare the store again with --overwrite."
        ) from error
    return info


def _check_info(info: dict[str, Any]) -> None:
    """Ranges of the numbers, and names of files that stay inside the store.

    Raises:
        ValueError, KeyError, TypeError: Something is not what it must be.
    """
    largest = {"uint16": 2**16, "uint32": 2**32}[info["dtype"]]
    if not _is_count(info["num_ids"]) or not 0 < info["num_ids"] <= largest:
        raise ValueError(f"num_ids is {info['num_ids']!r}")
    for name in ("prefix_id", "end_id"):
        if not _is_count(info[name]) or info[name] >= info["num_ids"]:
            raise ValueError(f"{name} is {info[name]!r}")
    for split in SPLITS:
        counts = info["splits"][split]
        for name in COUNTS:
            if not _is_count(counts[name]):
                raise ValueError(f"{name} is {counts[name]!r}")
        if not isinstance(counts["corpus_hash"], str):
            raise ValueError("corpus_hash is no text")
    for name, entry in info["files"].items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name or ":" in name:
            raise ValueError(f"the file {name!r} lies outside of it")
        if not _is_count(entry["size"]) or not isinstance(entry["sha256"], str):
            raise ValueError(f"the entry of {name} is {entry!r}")
    missing = [name for name in FILES if name not in info["files"]]
    if missing:
        raise ValueError(f"no hash of {', '.join(missing)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def verify_store(path: Path, info: dict[str, Any]) -> None:
    """Check files and contents, but for what a remembered verdict says of files that have not changed since.

    Raises:
        UserError: A file is missing or damaged, or the contents contradict each other.
    """
    verdict_path = _verdict_path(path)
    try:
        verdict = read_json(verdict_path)
    except (OSError, ValueError):
        verdict = None
    if not isinstance(verdict, dict):
        verdict = {}
    now: dict[str, list[Any]] = {"store.json": [file_sha256(path / "store.json")]}  # its numbers are part of it
    for name, expected in info["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"The store {path} lacks its file {name}; prepare it again with --overwrite.")
        now[name] = _verdict_key(file, expected["sha256"])
        if verdict.get(name) == now[name]:
            continue
        if now[name][0] != expected["size"] or file_sha256(file) != expected["sha256"]:
            raise UserError(
                f"The store's file {file} is damaged (its hash differs); prepare the store again with --overwrite."
            )
    if verdict == now:
        return
    try:
        _check_contents(path, info)
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        raise UserError(
            f"The store {path} contradicts itself ({first_line(error)}); prepare it again with --overwrite."
        ) from error
    remember_verdict(path, info["files"])


def remember_verdict(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Note that the files have these hashes and agree with each other, for as long as they are not changed."""
    verdict = {name: _verdict_key(path / name, entry["sha256"]) for name, entry in files.items()}
    verdict["store.json"] = [file_sha256(path / "store.json")]
    with contextlib.suppress(OSError):  # without a cache a store is verified at each opening
        write_json(_verdict_path(path), verdict)


def _verdict_path(path: Path) -> Path:
    """Not in the store: one that comes from somebody else would bring its own verdict."""
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return cache_directory() / "verified" / f"{key}.json"


def _verdict_key(file: Path, sha256: str) -> list[Any]:
    """What a verdict on a file holds for: its size, its time of change and the hash that it was found to have."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, sha256]


def _check_contents(path: Path, info: dict[str, Any]) -> None:
    """The files against the numbers in store.json.

    Raises:
        ValueError, OSError, pa.ArrowException: They do not agree.
    """
    dtype = np.dtype(info["dtype"]).newbyteorder("<")
    for split in SPLITS:
        counts = info["splits"][split]
        if (path / f"{split}.tokens").stat().st_size != counts["num_tokens"] * dtype.itemsize:
            raise ValueError(f"{split}.tokens does not hold {counts['num_tokens']:,} tokens")
        _check_ids(path / f"{split}.tokens", dtype, info["num_ids"])
        _check_documents(path / f"{split}.documents.parquet", counts)
    _check_texts(path / "validation.text.parquet", info["splits"]["validation"])


def _check_ids(path: Path, dtype: np.dtype[Any], num_ids: int) -> None:
    if path.stat().st_size == 0:
        return
    tokens = np.memmap(path, dtype=dtype, mode="r")
    for begin in range(0, len(tokens), TOKENS_AT_ONCE):
        largest = int(tokens[begin : begin + TOKENS_AT_ONCE].max())
        if largest >= num_ids:
            raise ValueError(f"{path.name} has the id {largest}, and the tokenizer has {num_ids:,}")


def _check_documents(path: Path, counts: dict[str, int]) -> None:
    """The numbers of the documents lie one behind the other and add up; the labels fit into memory."""
    with pq.ParquetFile(path, read_dictionary=list(LABELS)) as file:
        _check_rows(path, file, counts["num_documents"])
        schema = file.schema_arrow
        for name in NUMBERS:
            if schema.field(name).type != pa.int64():
                raise ValueError(f"{name} of {path.name} is {schema.field(name).type}")
        num_rows = label_bytes = position = 0
        sums = dict.fromkeys(COUNTS[1:], 0)
        for batch in file.iter_batches(2**16, columns=[*NUMBERS, *LABELS]):
            num_rows += len(batch)
            label_bytes += sum(_text_bytes(batch[name]) for name in LABELS)
            _check_memory(path, BYTES_A_ROW * num_rows + label_bytes)
            if any(batch[name].null_count for name in NUMBERS):
                raise ValueError(f"{path.name} has documents without numbers")
            columns = {name: batch[name].to_numpy() for name in NUMBERS}
            if any(len(column) and column.min() < 0 for column in columns.values()):
                raise ValueError(f"{path.name} has negative numbers")
            starts = position + np.concatenate([[0], np.cumsum(columns["num_tokens"])])
            if not np.array_equal(columns["start"], starts[:-1]):
                raise ValueError(f"the documents of {path.name} do not lie one behind the other")
            position = int(starts[-1])
            for name in sums:
                sums[name] += int(columns[name].sum())
    if num_rows != counts["num_documents"] or any(sums[name] != counts[name] for name in sums):
        raise ValueError(f"the numbers of {path.name} do not add up to those of store.json")


def _check_texts(path: Path, counts: dict[str, int]) -> None:
    """The held-out text has as many bytes as store.json says, and fits into memory."""
    with pq.ParquetFile(path, read_dictionary=["text"]) as file:
        _check_rows(path, file, counts["num_documents"])
        _check_memory(path, counts["num_bytes"] + BYTES_A_ROW * counts["num_documents"])
        num_bytes = sum(_text_bytes(batch["text"]) for batch in file.iter_batches(1024, columns=["text"]))
    if num_bytes != counts["num_bytes"]:
        raise ValueError(f"{path.name} has {num_bytes:,} bytes of text, not {counts['num_bytes']:,}")


def _check_rows(path: Path, file: pq.ParquetFile, expected: int) -> None:
    if file.metadata.num_rows != expected:
        raise ValueError(f"{path.name} has {file.metadata.num_rows:,} rows, not {expected:,}")


def _check_memory(path: Path, num_bytes: int) -> None:
    if num_bytes > psutil.virtual_memory().available:
        raise ValueError(f"{path.name} would take {num_bytes / 1e9:,.1f} GB of memory")


def _text_bytes(column: Any) -> int:
    """Bytes of a column's texts when they are spelt out; a dictionary may repeat a long one without end."""
    import pyarrow.compute as pc  # takes a tenth of a second, and `prepare` has no need of it

    if pa.types.is_dictionary(column.type):
        lengths = pc.cast(pc.binary_length(column.dictionary), pa.int64())
        return int(pc.sum(lengths.take(column.indices)).as_py() or 0)
    return int(pc.sum(pc.cast(pc.binary_length(column), pa.int64())).as_py() or 0)
