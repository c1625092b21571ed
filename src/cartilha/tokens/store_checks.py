"""Checks of a store before it is used: it may be damaged, or made to do harm.

Sizes and hashes come first, then whether the numbers agree, so that no header alone decides how much memory is used.
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

FORMAT_VERSION = 1
STORE_KEYS = ("tokenizer_fingerprint", "prefix_id", "end_id", "num_ids", "dtype", "splits", "files")
COUNTS = ("num_documents", "num_tokens", "num_bytes", "num_chars", "num_words")
NUMBERS = ("start", *COUNTS[1:])
LABELS = ("doc_id", "source", "domain", "text_hash")
KINDS = ("tokens", "documents.parquet")
FILES = (*(f"{split}.{kind}" for split in SPLITS for kind in KINDS), "validation.text.parquet")
BYTES_PER_ROW = 200  # memory of a document: its numbers, and its labels as Python objects without their text


def read_store_info(path: Path) -> dict[str, Any]:
    """The contents of store.json; a UserError if it is missing, has changed since it was written, or makes no sense."""
    if not (path / "store.json").is_file():
        what = "is not a store" if path.is_dir() else "is a file, not a store" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; make one with: cartilha prepare --input FILE --model MODEL --output {path}")
    fault = "is damaged"
    try:
        version = read_json(path / "store.json")["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {version}, this version reads {FORMAT_VERSION}; prepare it with --overwrite."
            )
        info = read_sealed_json(path / "store.json")
        if lacking := [key for key in STORE_KEYS if key not in info]:
            raise UserError(f"{path}/store.json lacks {', '.join(lacking)}; prepare the store again with --overwrite.")
        fault = "makes no sense"
        _check_info(info)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}/store.json {fault} ({error}); prepare the store again with --overwrite.") from error
    return info


def _check_info(info: dict[str, Any]) -> None:
    """Check the ranges of the numbers, and that no file lies outside of the store."""
    _check_count("num_ids", info["num_ids"], {"uint16": 2**16, "uint32": 2**32}[info["dtype"]] + 1, least=1)
    for name in ("prefix_id", "end_id"):
        _check_count(name, info[name], info["num_ids"])
    for split in SPLITS:
        for name in COUNTS:
            _check_count(name, info["splits"][split][name])
        if not isinstance(info["splits"][split]["corpus_hash"], str):
            raise ValueError("corpus_hash is no text")
    for name, entry in info["files"].items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name or ":" in name:
            raise ValueError(f"the file {name!r} lies outside of it")
        _check_count(f"the size of {name}", entry["size"])
        if not isinstance(entry["sha256"], str):
            raise ValueError(f"the entry of {name} is {entry!r}")
    if missing := [name for name in FILES if name not in info["files"]]:
        raise ValueError(f"no hash of {', '.join(missing)}")


def _check_count(name: str, value: Any, limit: int = 2**62, least: int = 0) -> None:
    """Check that a value is a whole number from `least` to below the limit."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < limit:
        raise ValueError(f"{name} is {value!r}")


def verify_store(path: Path, info: dict[str, Any]) -> None:
    """Refuse damaged or contradictory files by a UserError; a remembered verdict spares those that have not changed."""
    verdict: Any = None
    with contextlib.suppress(OSError, ValueError):
        verdict = read_json(_verdict_path(path))
    for name in info["files"]:
        if not (path / name).is_file():
            raise UserError(f"The store {path} lacks its file {name}; prepare it again with --overwrite.")
    now = _verdict(path, info["files"])
    for name, expected in info["files"].items():
        if isinstance(verdict, dict) and verdict.get(name) == now[name]:
            continue
        file = path / name
        if file.stat().st_size != expected["size"] or file_sha256(file) != expected["sha256"]:
            raise UserError(f"{file} is damaged (its hash differs); prepare the store again with --overwrite.")
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
    """Record that the files have these hashes and agree with each other, for as long as they do not change."""
    with contextlib.suppress(OSError):  # without a cache, each opening verifies the store
        write_json(_verdict_path(path), _verdict(path, files))


def _verdict_path(path: Path) -> Path:
    """Not in the store: a store that comes from somebody else would bring its own verdict."""
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return cache_directory() / "verified" / f"{key}.json"


def _verdict(path: Path, files: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """Size, time of change and hash of each file, and the hash of store.json, whose numbers are verified with them."""
    verdict: dict[str, list[Any]] = {"store.json": [file_sha256(path / "store.json")]}
    for name, entry in files.items():
        status = (path / name).stat()
        verdict[name] = [status.st_size, status.st_mtime_ns, entry["sha256"]]
    return verdict


def _check_contents(path: Path, info: dict[str, Any]) -> None:
    """Compare the files with the numbers in store.json."""
    dtype = np.dtype(info["dtype"]).newbyteorder("<")
    for split in SPLITS:
        counts = info["splits"][split]
        ids = map_ids(path / f"{split}.tokens", dtype)
        if len(ids) != counts["num_tokens"]:
            raise ValueError(f"{split}.tokens does not hold {counts['num_tokens']:,} tokens")
        if (largest := int(ids.max(initial=0))) >= info["num_ids"]:
            raise ValueError(f"{split}.tokens has the id {largest}, and the tokenizer has {info['num_ids']:,}")
        _check_documents(path / f"{split}.documents.parquet", counts)
    _check_texts(path / "validation.text.parquet", info["splits"]["validation"])


def map_ids(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """The ids in a file, memory-mapped, which an empty file cannot be."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


def _check_documents(path: Path, counts: dict[str, int]) -> None:
    """Check that documents follow each other without gaps, that their numbers add up, and that labels fit in memory."""
    with pq.ParquetFile(path, read_dictionary=list(LABELS)) as file:
        _check_rows(path, file, counts["num_documents"])
        for name in NUMBERS:
            if (kind := file.schema_arrow.field(name).type) != pa.int64():
                raise ValueError(f"{name} of {path.name} is {kind}")
        num_rows = label_bytes = position = 0
        sums = dict.fromkeys(COUNTS[1:], 0)
        for batch in file.iter_batches(2**16, columns=[*NUMBERS, *LABELS]):
            num_rows += len(batch)
            label_bytes += sum(_text_bytes(batch[name]) for name in LABELS)
            _check_memory(path, BYTES_PER_ROW * num_rows + label_bytes)
            if any(batch[name].null_count for name in NUMBERS):
                raise ValueError(f"{path.name} has documents without numbers")
            columns = {name: batch[name].to_numpy() for name in NUMBERS}
            if any(column.min(initial=0) < 0 for column in columns.values()):
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
    """Check that the held-out text fits in memory and has as many bytes as store.json says."""
    with pq.ParquetFile(path, read_dictionary=["text"]) as file:
        _check_rows(path, file, counts["num_documents"])
        _check_memory(path, counts["num_bytes"] + BYTES_PER_ROW * counts["num_documents"])
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
    """Bytes of a column's texts once decoded; a dictionary may refer to one long text any number of times."""
    import pyarrow.compute as pc  # takes a tenth of a second, and `prepare` does not need it

    is_dictionary = pa.types.is_dictionary(column.type)
    lengths = pc.cast(pc.binary_length(column.dictionary if is_dictionary else column), pa.int64())
    return int(pc.sum(lengths.take(column.indices) if is_dictionary else lengths).as_py() or 0)
