"""Bad input: the message names file and place, and whoever says `skip` loses that record only, which is counted."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cartilha.corpus import lines
from cartilha.corpus.readers import ReadCounts, read_documents
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.shards import shards
from cartilha.corpus.sources import resolve_inputs
from cartilha.errors import HubUnreachableError, UserError
from reading import complaint, fake_datasets, read_shard, texts, write, zstd


def read(*paths: Path, **options) -> tuple[list[str], ReadCounts]:
    counts = ReadCounts()
    return texts(*paths, counts=counts, **options), counts


def write_parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# What one bad record is, what it is counted as, where the message says it is, and what is left.
BAD_RECORDS = {
    "bytes.txt": (b"um\n\xe7\xe3o\ntres\n", "invalid_bytes", "line 2: byte 0xE7 at offset 0", ["um", "tres"]),
    "bytes.jsonl": (b'{"text": "um"}\n{"text": "a\xe7"}\n', "invalid_bytes", "line 2: byte 0xE7 at offset 11", ["um"]),
    "bytes.csv": (b'text\num\n"\xe7\n"\ntres\n', "invalid_bytes", "line 3: byte 0xE7 at offset 1", ["um", "tres"]),
    "half.jsonl": (b'{"text": "um"}\n{"text": "\\ud83d"}\n{"text": "x"}', "invalid_bytes", "line 2", ["um", "x"]),
    "broken.jsonl": (b'{"text": "um"}\n{"text": "do\n{"text": "tres"}\n', "broken_json", "line 2", ["um", "tres"]),
    "list.jsonl": (b'{"text": "um"}\n["dois"]\n{"text": "tres"}\n', "broken_json", "line 2", ["um", "tres"]),
    "number.jsonl": (b'{"text": "um"}\n{"text": 2}\n{"text": "x"}\n', "no_text", "line 2", ["um", "x"]),
    "other.jsonl": (b'{"text": "um"}\n{"texto": "2"}\n{"text": "x"}\n', "no_text_column", "line 2", ["um", "x"]),
    "stray.csv": (b'text,n\num,1\n"do"is,2\ntres,3\n', "broken_csv", "row 2 (line 3)", ["um", "tres"]),
    "open.csv": (b'text,n\num,1\n"dois,2\ntres,3\nq,4\n', "broken_csv", "row 2 (lines 3 to 5)", ["um", "tres", "q"]),
    "swallows.csv": (
        b'text,n\num,1\n"dois,2\ntres,3\n"quatro, mesmo",4\ncinco,5\n',
        "broken_csv",
        "row 2 (lines 3 to 5)",
        ["um", "tres", "quatro, mesmo", "cinco"],
    ),
    "fields.csv": (b"text,n\num,1\ndois\ntres,3\n", "broken_csv", "row 2 (line 3)", ["um", "tres"]),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_stops_or_is_skipped_and_counted(tmp_path, name):
    data, reason, place, left = BAD_RECORDS[name]
    path = write(tmp_path / name, data)
    sentence = complaint(path)
    assert f"{path}, {place}" in sentence or f"{path}: {place}" in sentence
    texts, counts = read(path, on_error="skip")
    assert texts == left
    assert counts.skipped == {reason: 1} and counts.documents == len(left)
    assert place in counts.first_skipped[reason]


def test_invalid_bytes_may_be_replaced_and_the_rest_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a\xe7"}\n{"text":\n{"text": "\\ud83d"}\n')
    texts, counts = read(path, invalid_bytes="replace", on_error="skip")
    assert texts == ["a\ufffd", "\ufffd"] and counts.skipped == {"broken_json": 1}
    assert counts.replaced_bytes_documents == 2


BAD_FILES = {
    "cut.txt.gz": gzip.compress(b"um\n" * 100_000)[:-200],
    "cut.txt.zst": zstd(os.urandom(300_000).hex().encode())[:-20_000],
    "no.txt.gz": b"this is no gzip file",
    "empty.txt.gz": b"",
    "empty.parquet": b"",
    "no.parquet": b"text\n",
    "empty.csv": b"",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_damaged_file_among_others_stops_or_is_read_as_far_as_it_goes(tmp_path, name):
    before, after = write(tmp_path / "a.txt", "antes\n"), write(tmp_path / "z.txt", "depois\n")
    path = write(tmp_path / name, BAD_FILES[name])
    assert str(path) in complaint(before, path, after)
    texts, counts = read(before, path, after, on_error="skip")
    assert texts[0] == "antes" and texts[-1] == "depois"
    assert sum(counts.skipped.values()) == 1 and str(path) in next(iter(counts.first_skipped.values()))
    assert counts.skipped == {"no_text_column" if name == "empty.csv" else "damaged_file": 1}
    if name == "cut.txt.gz":
        assert f"after line {len(texts) - 2}" in counts.first_skipped["damaged_file"] and len(texts) > 1000


def test_a_header_that_is_no_csv_is_a_fault_of_the_file(tmp_path):
    assert "broken CSV" in complaint(write(tmp_path / "a.csv", b"id,te\rxt\n1,abc\n"))


def test_empty_files_among_many_are_no_fault(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.txt"):
        write(tmp_path / name, "" if name != "c.txt" else "um\n")
    write(tmp_path / "d.txt.gz", gzip.compress(b""))
    assert read(tmp_path) == (["um"], ReadCounts(documents=1))


def test_parquet_without_the_column(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", texto=["um"])
    good = write_parquet(tmp_path / "b.parquet", text=["dois"])
    assert "has no 'text', only: texto" in complaint(path, good)
    texts, counts = read(path, good, on_error="skip")
    assert texts == ["dois"] and counts.skipped == {"no_text_column": 1}


# Long lines


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(lines, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(lines, "BLOCK_CHARS", 16)


@pytest.mark.parametrize("length", [84, 99, 100, 101, 117, 500])
@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_lines_of_any_length(tmp_path, small_limit, length, end, suffix):
    data = b"um\n" + b"x" * length + b"\ndois\n" + b"y" * length + end
    path = write(tmp_path / f"a{suffix}", gzip.compress(data) if suffix == ".txt.gz" else data)
    texts, counts = read(path, on_error="skip")
    fits = length + 1 <= 100 or (end == b"" and length == 100)
    assert [text for text in texts if len(text) < 10] == ["um", "dois"]
    if length + 1 <= 100:
        assert [len(text) for text in texts] == [2, length, 4, length]
    elif not fits:
        assert counts.skipped == {"too_long": 2} and texts == ["um", "dois"]
        assert "a.txt" in complaint(path) and "line 2 is longer than 100 bytes" in complaint(path)


@pytest.mark.parametrize("encoding", ["utf-16", "shift_jis"])
def test_long_lines_in_encodings_that_are_read_by_character(tmp_path, small_limit, encoding):
    text = "um\n" + "x" * 300 + "\ndois\n" + "y" * 300
    path = write(tmp_path / "a.txt", text.encode(encoding))
    texts, counts = read(path, encoding=encoding, on_error="skip")
    assert texts == ["um", "dois"] and counts.skipped == {"too_long": 2}


def test_a_record_of_many_lines_and_a_file_as_one_document_have_the_limit_too(tmp_path, small_limit):
    body = "text\num\n" + '"' + "linha\n" * 30 + "tres\n"
    texts, counts = read(write(tmp_path / "a.csv", body), on_error="skip")
    assert counts.skipped == {"too_long": 1} and texts == ["um", *["linha"] * 29, "tres"]
    path = write(tmp_path / "b.txt", "linha\n" * 30)
    assert read(path, text_unit="file", on_error="skip")[1].skipped == {"too_long": 1}
    assert "b.txt is longer" in complaint(path, text_unit="file")


def test_a_long_text_in_parquet(tmp_path, small_limit):
    path = write_parquet(tmp_path / "a.parquet", text=["um", "x" * 101, "dois"])
    assert "a.parquet, row 2 is longer" in complaint(path)
    texts, counts = read(path, on_error="skip")
    assert texts == ["um", "dois"] and counts.skipped == {"too_long": 1}


def test_few_rows_of_long_texts_are_held_at_once(tmp_path):
    random = np.random.default_rng(0)
    text = random.integers(97, 123, (60, 1 << 20), np.uint8)
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [row.tobytes().decode() for row in text]})
    pq.write_table(table, path, use_dictionary=False, write_batch_size=1)  # pages are read whole
    del table
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    held = max(pool.bytes_allocated() - before for _ in read_documents([str(path)]))
    assert 0 < held < 40 << 20  # of 63 million bytes


def test_a_line_of_500_megabytes_takes_no_more_memory_than_the_limit(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.write(b"um\n")
        file.seek(500_000_000)  # a hole: NUL bytes that take no room
        file.write(b"\ndois\n")
    tracemalloc.start()
    try:
        texts, counts = read(path, on_error="skip")
        assert tracemalloc.get_traced_memory()[1] < 160 << 20
    finally:
        tracemalloc.stop()
    assert texts == ["um", "dois"] and counts.skipped == {"too_long": 1}
    cut = shards(resolve_inputs([str(path)]), ReadSettings(), 32 << 20)
    found = [document for shard in cut for document in read_shard(shard, ReadSettings(on_error="skip"))]
    assert [(document.text, document.id) for document in found] == [("um", "a.txt:1"), ("dois", "a.txt:3")]


# NUL characters


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.txt.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_git_lfs_pointer_is_no_text(tmp_path, name, on_error):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0a" * 32 + "\nsize 1234567\n"
    assert "git lfs pull" in complaint(write(tmp_path / name, pointer), on_error=on_error)


def test_nul_characters_are_kept_and_counted(tmp_path):
    texts, counts = read(write(tmp_path / "a.txt", b"a\0b\num\n\0\n"))
    assert texts == ["a\0b", "um", "\0"] and counts.nul_documents == 2


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_its_mark_is_recognised_by_its_nul_bytes(tmp_path, encoding):
    path = write(tmp_path / "a.txt", "Olá, vizinho da aldeia\nEra uma vez\n".encode(encoding))
    assert f"--encoding {encoding}" in complaint(path)
    assert f"--encoding {encoding}" in complaint(path, on_error="skip", invalid_bytes="replace")
    assert read(path, encoding=encoding)[0] == ["Olá, vizinho da aldeia", "Era uma vez"]


# Files that change


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.txt", "um\n" * 10)
    documents = read_documents([str(path)])
    next(documents)
    with path.open("ab") as file:
        file.write(b"mais\n")
    with pytest.raises(UserError, match=r"a\.txt changed while it was read \(from 30 to 35 bytes\)"):
        list(documents)
    (source,) = resolve_inputs([str(path)])
    pieces = shards([source], ReadSettings())
    write(path, "ou\n" * 11 + "x\n")  # as long as before
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="changed"):
        list(read_shard(pieces[0], ReadSettings(on_error="skip")))
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        list(read_shard(pieces[0], ReadSettings(on_error="skip")))


# One file, one document


def test_a_file_may_be_one_document(tmp_path):
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    write(folder / "b.txt", "\ufeffum\r\ndois\n\n")
    write(folder / "sub" / "a.txt.gz", gzip.compress("três\n".encode()))
    write(folder / "vazio.txt", "\n\n")
    write(folder / "c.jsonl", '{"text": "quatro"}\n{"text": "cinco"}\n')
    documents = list(read_documents([str(folder)], ReadSettings(text_unit="file")))
    assert [(d.text, d.id) for d in documents] == [
        ("um\r\ndois\n\n", "b.txt:1"),
        ("quatro", "c.jsonl:1"),
        ("cinco", "c.jsonl:2"),
        ("três\n", "sub/a.txt.gz:1"),
    ]
    write(folder / "b.txt", b"um\n\xe7\n")
    assert "b.txt, line 2" in complaint(folder / "b.txt", text_unit="file")
    assert read(folder / "b.txt", text_unit="file", invalid_bytes="replace")[0] == ["um\n\ufffd\n"]


# The hub


def test_the_hub_that_stops_half_way_is_named_with_its_row(monkeypatch):
    def rows():
        yield {"text": "um"}
        yield {"text": "dois"}
        raise ConnectionError("reset by peer")

    fake_datasets(monkeypatch, rows)
    for on_error in ("stop", "skip"):  # what is missing cannot be counted
        with pytest.raises(HubUnreachableError, match=r"hf:org/nome .* after row 2 .*reset by peer.*run the same"):
            list(read_documents(["hf:org/nome"], ReadSettings(on_error=on_error)))


def test_a_dataset_of_several_files_is_streamed_file_by_file(tmp_path):
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    for number in range(3):
        rows = "".join(json.dumps({"text": f"{number}-{row}"}) + "\n" for row in range(4))
        write(tmp_path / f"part-{number}.jsonl", rows)
    ref = f"hf:{tmp_path}"
    documents = list(read_documents([ref]))
    assert [d.text for d in documents] == [f"{number}-{row}" for number in range(3) for row in range(4)]
    assert [d.id for d in documents][:5] == [f"{tmp_path}:{place}" for place in ("1:1", "1:2", "1:3", "1:4", "2:1")]
    cut = shards(resolve_inputs([ref]), ReadSettings())
    assert len(cut) == 3 and all(shard.num_bytes == 0 for shard in cut)
    assert [d for shard in cut for d in read_shard(shard, ReadSettings())] == documents


def test_shards_count_and_name_what_the_whole_does(tmp_path):
    path = write(tmp_path / "a.txt", b"um\n\xe7\ndois\n\xe8\n" * 5)
    _, whole = read(path, on_error="skip")
    settings = ReadSettings(on_error="skip")
    total = ReadCounts()
    cut = shards(resolve_inputs([str(path)]), settings, 12)
    for shard in cut:
        counts = ReadCounts()
        list(read_shard(shard, settings, counts))
        total.add(counts)
    assert len(cut) > 3 and total == whole and "line 2:" in total.first_skipped["invalid_bytes"]
