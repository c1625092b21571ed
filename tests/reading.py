"""What tests of readers share: files to read, the documents in them, and the sentence that a mistake ends with."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cartilha.corpus.document import Document
from cartilha.corpus.readers import ReadCounts, read_documents, read_part
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.shards import Shard
from cartilha.errors import UserError


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def documents(*refs: Path | str, counts=None, **options) -> Iterator[Document]:
    return read_documents([str(ref) for ref in refs], ReadSettings(**options), counts)


def texts(*refs: Path | str, **options) -> list[str]:
    return [document.text for document in documents(*refs, **options)]


def complaint(*refs: Path | str, **options) -> str:
    """The sentence that reading ends with."""
    return complaint_of(texts, *refs, **options)


def complaint_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The sentence with which a function refuses; it must be one sentence, on one line, or end in a command."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and (sentence.endswith(".") or re.search("pip install|cartilha prepare", sentence))
    return sentence


class Interrupted(BaseException):
    """As KeyboardInterrupt: no `except Exception` stops it."""


def interrupt(*_: Any) -> None:
    """What stands for a function in which the process is interrupted."""
    raise Interrupted


def read_shard(shard: Shard, settings: ReadSettings, counts: ReadCounts | None = None) -> list[Document]:
    found = ReadCounts() if counts is None else counts
    return [document for part in shard.parts for document in read_part(part, settings, found)]


def fake_datasets(monkeypatch, rows) -> list[tuple]:
    """A module `datasets` whose every dataset has these rows, anew for each reading, in an hour of no waiting.

    Returned are the name, configuration, revision and split of each dataset that is opened.
    """
    calls: list[tuple] = []

    class Dataset:
        num_shards = 1

        def __iter__(self):
            return iter(rows())

    def load_dataset_builder(name, config, *, revision):
        def as_streaming_dataset(split):
            calls.append((name, config, revision, split))
            return Dataset()

        return types.SimpleNamespace(hash="c0ffee", as_streaming_dataset=as_streaming_dataset)

    module = types.ModuleType("datasets")
    module.load_dataset_builder = load_dataset_builder
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return calls
