"""Any text without a line feed comes back exactly, whatever format and compression it was written in."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cartilha.corpus.readers import ReadCounts, read_documents
from cartilha.corpus.records import ReadSettings
from reading import COMPRESSORS

# Lone surrogates cannot be written as UTF-8. The characters that others take for the end of a line come often.
CHARACTERS = st.one_of(
    st.sampled_from("\r\x0b\x0c\x1c\x1e\x85\u2028\u2029\x00\ufeff\ufffd\",\t'\\ é😀"),
    st.characters(exclude_characters="\n", exclude_categories=["Cs"]),
)
TEXTS = st.lists(st.text(CHARACTERS, min_size=1).filter(lambda text: not text.isspace()), max_size=8)


def as_txt(texts: list[str]) -> bytes:
    # A line's own last \r would be taken for a part of the line's end, so that every line gets one.
    return "".join(f"{text}\r\n" for text in texts).encode("utf-8")


def as_jsonl(texts: list[str]) -> bytes:
    ascii_only = len(texts) % 2 == 0
    return "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode("utf-8")


def as_csv(texts: list[str]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([["n", "text"], *enumerate(texts)])
    return file.getvalue().encode("utf-8")


def as_parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), sink)
    return sink.getvalue().to_pybytes()


def as_json(texts: list[str]) -> bytes:
    indent = len(texts) % 3 or None
    return json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=indent).encode("utf-8")


def as_arrow(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"text": pa.array(texts, pa.string())})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


WRITERS = {
    ".txt": as_txt,
    ".jsonl": as_jsonl,
    ".json": as_json,
    ".csv": as_csv,
    ".parquet": as_parquet,
    ".arrow": as_arrow,
}


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS)
@example(texts=["a\r", "\u2028b", "c\x85d", '"', "\x00"])
def test_round_trip(tmp_path: Path, kind: str, compression: str, texts: list[str]):
    if kind == ".txt" and texts and texts[0].startswith("\ufeff"):
        texts = ["x" + texts[0], *texts[1:]]  # at the head of a file it is a byte-order mark
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(COMPRESSORS[compression](WRITERS[kind](texts)))
    counts = ReadCounts()
    documents = list(read_documents([str(path)], counts=counts))
    assert [document.text for document in documents] == texts
    assert [document.id for document in documents] == [f"{path.name}:{n}" for n in range(1, len(texts) + 1)]
    with_nul = sum("\0" in text for text in texts)
    assert counts == ReadCounts(documents=len(texts), nul_documents=with_nul)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60), encoding=st.sampled_from(["utf-8", "cp1252", "shift_jis", "utf-16-le"]))
def test_any_bytes_are_replaced_as_python_replaces_them(tmp_path: Path, data: bytes, encoding: str):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x\n".decode().encode(encoding) + data)
    expected = ("x\n".encode(encoding) + data).decode(encoding, "replace").split("\n")
    lines = [line.removesuffix("\r") for line in expected[:-1]] + expected[-1:]
    read = read_documents([str(path)], ReadSettings(encoding=encoding, invalid_bytes="replace"))
    assert [document.text for document in read] == [line for line in lines if line and not line.isspace()]
