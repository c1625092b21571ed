"""Readers: what is a document, what it is called, and one clear sentence for everything that can be wrong."""

from __future__ import annotations

import glob
import gzip
import json
import logging
import os
import subprocess
import sys
import tracemalloc
import unicodedata
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from cartilha.config import EvaluateConfig, PrepareConfig, VocabConfig
from cartilha.corpus import primer, tables
from cartilha.corpus.files import SourceFile
from cartilha.corpus.readers import ReadCounts, read_documents
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.shards import shards
from cartilha.corpus.sources import HubSource, PrimerSource, resolve_inputs
from cartilha.errors import HubUnreachableError, UserError, install_command
from cartilha.pipeline.preflight import preflight
from reading import complaint, documents, fake_datasets, read_shard, texts, write, zstd


def write_jsonl(path: Path, *records: object) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


# Plain text


def test_txt_is_split_at_line_feeds_only(tmp_path):
    inside = ["a\u2028b", "c\x0bd\x0ce\x85f", "g\rh", "i\x00j", " k\t", "l\r"]
    path = write(tmp_path / "a.txt", "\n".join(inside))
    assert texts(path) == inside


def test_txt_drops_one_carriage_return_before_the_line_feed_and_the_first_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffum\r\ndois\r\r\n\ufefftrês\n")
    assert texts(path) == ["um", "dois\r", "\ufefftrês"]


def test_blank_lines_are_counted_and_keep_the_numbers_of_the_others(tmp_path):
    path = write(tmp_path / "conto.txt", "um\n\n \t\u3000\ndois\n")
    counts = ReadCounts()
    documents = list(read_documents([str(path)], counts=counts))
    assert [(d.text, d.id, d.source, d.domain) for d in documents] == [
        ("um", "conto.txt:1", "conto.txt", "conto"),
        ("dois", "conto.txt:4", "conto.txt", "conto"),
    ]
    assert counts == ReadCounts(documents=2, empty=2)


def test_empty_file_has_no_documents(tmp_path):
    assert texts(write(tmp_path / "a.txt", "")) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp037", "latin-1", "utf-8-sig"])
def test_other_encodings(tmp_path, encoding):
    # U+0A0A is two line feeds to whoever splits UTF-16 as bytes.
    lines = ["ação", "" if encoding in ("cp037", "latin-1") else "\u0a0a\U0001f600", "três\x85"]
    path = write(tmp_path / "a.txt", "\r\n".join(lines).encode(encoding))
    assert texts(path, encoding=encoding) == [line for line in lines if line]


def test_streams_without_reading_ahead(tmp_path):
    path = write(tmp_path / "a.txt", b"um\n" * 50_000 + b"\xff\n")
    documents = read_documents([str(path)])
    assert next(documents).text == "um"  # the fault at the end has not been met
    assert len(list(islice(read_documents([str(path)]), 50_000))) == 50_000
    assert "line 50001" in complaint(path)


def test_no_more_documents_are_counted_than_are_taken(tmp_path):
    a, b = write(tmp_path / "a.txt", "1\n\n2\n"), write(tmp_path / "b.txt", "3\n4\n")
    counts = ReadCounts()
    assert [document.text for document in islice(documents(a, b, counts=counts), 3)] == ["1", "2", "3"]
    assert counts.documents == 3
    for config in (EvaluateConfig, PrepareConfig, VocabConfig):
        with pytest.raises(UserError, match="--limit_documents must be 1 or more"):
            preflight(config(limit_documents=0))


# Invalid bytes


def test_invalid_utf8_names_file_line_offset_and_remedy(tmp_path):
    sentence = complaint(write(tmp_path / "velho.txt", b"um\n\xc3\xa9 cora\xe7\xe3o\n"))
    assert "velho.txt, line 2" in sentence
    assert "0xE7 at offset 7" in sentence  # bytes, not characters
    assert "--encoding latin-1" in sentence and "--invalid_bytes replace" in sentence


@pytest.mark.parametrize(
    ("data", "encoding", "likely"),
    [
        (b"a cora\xe7\xe3o\n", "utf-8", "latin-1"),
        (b"Ele disse \x96 e\n", "utf-8", "cp1252"),
        (b"a cora\xe7\xe3o \x93sim\x94\n", "utf-8", "cp1252"),  # the first faulty byte alone does not tell
        ("Água\n".encode(), "cp1252", "utf-8"),  # 0x81, which Windows-1252 has not
    ],
)
def test_the_encoding_that_is_recommended_follows_the_bytes(tmp_path, data, encoding, likely):
    assert f"(perhaps --encoding {likely})" in complaint(write(tmp_path / "a.txt", data), encoding=encoding)


@pytest.mark.parametrize("damage", [b"cora\xe7\xe3o", b"\xe2\x82", b"\xf0\x9f\x98x\xff\xff", b"\xed\xa0\x80"])
def test_replacing_gives_what_python_gives_and_counts_documents(tmp_path, damage):
    path = write(tmp_path / "a.txt", b"bom \xef\xbf\xbd\n" + damage + b"\n")  # a real U+FFFD is not a fault
    counts = ReadCounts()
    read = texts(path, invalid_bytes="replace", counts=counts)
    assert read == ["bom \ufffd", damage.decode("utf-8", "replace")]
    assert counts.replaced_bytes_documents == 1


def test_invalid_utf16_is_placed_and_replaced(tmp_path):
    data = "um\ndé".encode("utf-16-le") + b"\x00\xd8" + "x\ntrês".encode("utf-16-le")
    path = write(tmp_path / "a.txt", data)
    sentence = complaint(path, encoding="utf-16-le")
    assert "line 2" in sentence and "offset 4" in sentence
    assert texts(path, encoding="utf-16-le", invalid_bytes="replace") == ["um", "dé\ufffdx", "três"]


@pytest.mark.parametrize(
    ("encoding", "named"), [("utf-16-le", "utf-16"), ("utf-16-be", "utf-16"), ("utf-32-le", "utf-32")]
)
@pytest.mark.parametrize("invalid_bytes", ["stop", "replace"])
def test_foreign_byte_order_mark_is_recognised(tmp_path, encoding, named, invalid_bytes):
    path = write(tmp_path / "a.txt", "\ufeffolá\n".encode(encoding))
    for assumed in ("utf-8", "UTF8", "utf-8-sig"):
        assert f"--encoding {named}." in complaint(path, invalid_bytes=invalid_bytes, encoding=assumed)


def test_utf16_without_its_mark_and_unknown_encodings(tmp_path):
    path = write(tmp_path / "a.txt", "olá".encode("utf-16-be"))
    assert "--encoding utf-16-le or utf-16-be" in complaint(path, encoding="utf-16")
    for name in ("utf8000", "rot13", "hex"):
        assert repr(name) in complaint(path, encoding=name)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_invalid_bytes_in_records(tmp_path, suffix):
    body = b'{"text": "a\xe7b"}\n' if suffix == ".jsonl" else b'text\n"a\xe7b"\n'
    path = write(tmp_path / f"a{suffix}", body)
    sentence = complaint(path)
    assert f"line {body.count(b'text') if suffix == '.jsonl' else 2}" in sentence and "0xE7" in sentence
    counts = ReadCounts()
    assert texts(path, invalid_bytes="replace", counts=counts) == ["a\ufffdb"]
    assert counts.replaced_bytes_documents == 1
    assert texts(path, encoding="latin-1") == ["açb"]


def test_half_a_surrogate_pair_in_json_is_invalid(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "par \\ud83d\\ude00"}\n{"text": "meio \\ud83d"}\n')
    assert "a.jsonl, line 2" in complaint(path)
    assert texts(path, invalid_bytes="replace") == ["par 😀", "meio \ufffd"]


def test_invalid_utf8_in_parquet(tmp_path):
    column = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xe7b"))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "a.parquet, row 1" in complaint(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", invalid_bytes="replace") == ["a\ufffdb"]


# Records


def test_ids_and_domains_of_records(tmp_path):
    path = write_jsonl(
        tmp_path / "notas.jsonl",
        {"text": "a", "id": "x1", "domain": "jornal", "genre": "conto", "source": "web"},
        {"text": "b", "id": 7, "genre": "conto", "source": "web"},
        {"text": "c", "id": None, "domain": 3, "source": "web"},
        {"text": "d", "id": True},
        {"text": "e", "id": 0, "domain": ""},
    )
    found = [(d.id, d.domain, d.source) for d in read_documents([str(path)])]
    assert found == [
        ("x1", "jornal", "notas.jsonl"),
        ("7", "conto", "notas.jsonl"),
        ("notas.jsonl:3", "web", "notas.jsonl"),
        ("notas.jsonl:4", "notas", "notas.jsonl"),
        ("0", "notas", "notas.jsonl"),
    ]


def test_text_column_is_not_taken_for_a_label(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"source": "o texto"})
    (document,) = read_documents([str(path)], ReadSettings(text_column="source"))
    assert (document.text, document.domain) == ("o texto", "a")


def test_csv_quoting_and_row_numbers(tmp_path):
    body = '\ufeffgenre,text\r\nconto,"duas\r\nlinhas, ""assim"""\r\n\r\ncarta,fim\r\n'
    counts = ReadCounts()
    documents = list(read_documents([str(write(tmp_path / "a.csv", body))], counts=counts))
    assert [(d.text, d.domain, d.id) for d in documents] == [
        ('duas\r\nlinhas, "assim"', "conto", "a.csv:1"),
        ("fim", "carta", "a.csv:3"),
    ]
    assert counts.empty == 1


def test_csv_with_semicolons_is_told_by_its_header(tmp_path):
    """As spreadsheets write it where numbers have a decimal comma."""
    path = tmp_path / "a.csv"
    for text in ('id;text\n1;um, dois\n2;"três; quatro"\n', '"id";"text"\n1;"um, dois"\n2;"três; quatro"\n'):
        path.write_text(text, encoding="utf-8")
        assert [d.text for d in read_documents([str(path)])] == ["um, dois", "três; quatro"]
    path.write_text("a;b,text\n1,um; dois\n", encoding="utf-8")  # a semicolon in a name separates nothing
    assert [d.text for d in read_documents([str(path)])] == ["um; dois"]


def test_tsv_and_a_very_long_field(tmp_path):
    long = "á" * 200_000  # beyond the csv module's own limit
    assert texts(write(tmp_path / "a.tsv", f"id\ttext\n1\ta, b\n2\t{long}\n")) == ["a, b", long]


def test_parquet_types_nulls_and_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PARQUET_BATCH_ROWS", 2)
    read: list[list[str]] = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, **k: (read.append(k["columns"]), original(self, **k))[1]
    )
    values = ["um", None, "", "dois", "três"]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"n": range(5), "text": pa.array(values).cast(kind), "id": range(10, 15)})
        pq.write_table(table, tmp_path / "a.parquet")
        counts = ReadCounts()
        documents = list(read_documents([str(tmp_path / "a.parquet")], counts=counts))
        assert [(d.text, d.id) for d in documents] == [("um", "10"), ("dois", "13"), ("três", "14")]
        assert counts.empty == 2
    assert read == [["text", "id"]] * 3  # and no other column


@pytest.mark.parametrize("suffix", [".parquet", ".parquet.zst", ".txt.gz", ".txt.zst"])
def test_a_file_is_not_held_in_memory(tmp_path, suffix):
    lines = [f"{n:01000}" for n in range(40_000)]  # 40 MB, in Parquet as one row group
    pq.write_table(pa.table({"text": lines}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    plain = (tmp_path / "a.parquet").read_bytes() if ".parquet" in suffix else "\n".join(lines).encode()
    compress = {".gz": gzip.compress, ".zst": zstd}.get(Path(suffix).suffix, bytes)
    path = write(tmp_path / f"b{suffix}", compress(plain))
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()  # what Arrow reads through a Python file is Python's memory
    try:
        held = max(pool.bytes_allocated() - before for _ in read_documents([str(path)]))
        assert 0 < held + tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


# Faults in records


def test_json_faults(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"\n')
    sentence = complaint(path)
    assert "a.jsonl, line 2" in sentence and "delimiter at column 13)" in sentence
    assert "not an object" in complaint(write(tmp_path / "b.jsonl", '["a"]\n'))
    assert "b.jsonl, line 1" in complaint(write(tmp_path / "b.jsonl", "[" * 200_000))
    assert texts(write(tmp_path / "c.jsonl", "\ufeff")) == []


def test_missing_column_names_what_is_there(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"texto": "b", "n": 1})
    csv = write(tmp_path / "a.csv", "texto,n\n")
    pq.write_table(pa.table({"texto": ["a"], "n": [1]}), tmp_path / "a.parquet")
    for path, place in ((jsonl, "line 2"), (csv, "header"), (tmp_path / "a.parquet", "a.parquet")):
        sentence = complaint(path)
        assert place in sentence and "texto, n" in sentence and "--text_column" in sentence
    assert texts(tmp_path / "a.parquet", text_column="texto") == ["a"]
    assert "more than one 'text'" in complaint(write(tmp_path / "b.csv", "text,text\na,b\n"))
    assert "only: nothing" in complaint(write(tmp_path / "c.csv", ""))


def test_text_that_is_no_string(tmp_path):
    sentence = complaint(write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": ["b"]}))
    assert "line 2" in sentence and "list" in sentence and "--text_column" in sentence
    pq.write_table(pa.table({"text": [1]}), tmp_path / "a.parquet")
    assert "row 1" in complaint(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("body", "row"),
    [
        ('text\nbom\n"nunca fechada\nx\n', "row 2"),
        ('text\n"a"b\n', "row 1"),
        ("text,n\na,1\nb\n", "row 2"),
        ("text,n\na,1\nb,2,3\n", "row 2"),
        ("text\nsolto\rno meio\n", "row 1"),
    ],
)
def test_csv_faults_name_the_row(tmp_path, body, row):
    sentence = complaint(write(tmp_path / "a.csv", body))
    assert f"a.csv, {row}" in sentence and "quote" in sentence


# Compression


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("kind", [".txt", ".parquet"])
def test_damaged_compressed_files(tmp_path, suffix, compress, kind):
    lines = [f"linha {n} {n * n}" for n in range(20_000)]
    plain = tmp_path / f"plain{kind}"
    if kind == ".txt":
        write(plain, "\n".join(lines))
    else:
        pq.write_table(pa.table({"text": lines}), plain)
    packed = compress(plain.read_bytes())
    path = tmp_path / f"a{kind}{suffix}"
    assert texts(write(path, packed)) == lines
    for damaged in (
        packed[:-12],
        packed[: len(packed) // 2],
        b"",
        b"no such thing as a compressed file",
        packed[:12] + bytes(byte ^ 0xFF for byte in packed[12:99]) + packed[99:],
    ):
        assert f"a{kind}{suffix}" in complaint(write(path, damaged))


def test_several_compressed_members_are_one_file(tmp_path):
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstd)):
        path = write(tmp_path / f"a.txt{suffix}", compress(b"um\ndo") + compress(b"is\n"))
        assert texts(path) == ["um", "dois"]


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"linha {n}" for n in range(10_000)]}), path)
    whole = path.read_bytes()
    zeros = whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :]
    for damaged in (whole[:-100], b"", b"text\n", zeros):
        assert "a.parquet" in complaint(write(path, damaged))


# What a REF names


def paths(*refs: Path | str) -> list[str]:
    return [
        source.path.as_posix() for source in resolve_inputs([str(r) for r in refs]) if isinstance(source, SourceFile)
    ]


def test_folders_and_globs_are_sorted_and_repeated_files_read_once(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name in ("d/b.txt", "d/a/z.CSV", "d/a.jsonl.gz", "d/leia.md", "d/.oculto.txt", "d/.git/x.txt"):
        write(Path(name), "text\n")
    assert paths("d") == ["d/a/z.CSV", "d/a.jsonl.gz", "d/b.txt"]
    for order in (1, -1):  # whatever the file system's own order is
        monkeypatch.setattr(glob, "glob", lambda *a, order=order, **k: list(glob.iglob(*a, **k))[::order])
        assert paths("d/**/*.[tC]*") == ["d/a/z.CSV", "d/b.txt"]
    assert {record.getMessage() for record in caplog.records} == {
        "Left out of the folder d, hidden: 1 file (d/.oculto.txt).",
        "Left out of the folder d, of a kind that is not read: 1 file (d/leia.md).",
    }
    with caplog.at_level(logging.WARNING, "cartilha"):
        assert paths("d/b.txt", "d", tmp_path / "d" / "b.txt") == ["d/b.txt", "d/a/z.CSV", "d/a.jsonl.gz"]
    assert "b.txt" in caplog.text and "and 1 more" in caplog.text


def test_a_path_that_exists_wins(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write(Path("primer/a.txt"), "a\n")
    write(Path("x[1].txt"), "colchetes\n")
    write(Path("x1.txt"), "um\n")
    assert texts("x[1].txt") == ["colchetes"]
    assert paths("primer") == ["primer/a.txt"]
    assert "primer" in caplog.text


def test_source_file_holds_size_and_time_of_change(tmp_path):
    path = write(tmp_path / "Um.Dia.TXT.GZ", gzip.compress(b"a\n"))
    (source,) = resolve_inputs([str(path)])
    assert isinstance(source, SourceFile)
    assert (source.path, source.size_bytes) == (path, path.stat().st_size)
    assert source.modified_ns == path.stat().st_mtime_ns
    assert (source.stem, source.format, source.compression) == ("Um.Dia", ".txt", ".gz")
    assert texts(path) == ["a"]
    assert resolve_inputs([source]) == [source]


def test_what_cannot_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("corpus.txt"), "a\n")
    write(Path("notas.docx"), "a\n")
    Path("vazia").mkdir()
    assert "corpus.txt is meant" in complaint("corpus.text")
    assert "primer" in complaint("nada/disto.txt")
    assert "corpus.txt is meant" in complaint("corpus*.tx")
    assert "primer" in complaint("??")
    assert "notas.docx" in complaint("notas.docx") and ".jsonl" in complaint("notas.docx")
    assert "vazia" in complaint("vazia")
    assert "names no dataset" in complaint("hf:")
    assert complaint("") and complaint("a\0b") and complaint("x" * 5000)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_link_that_leads_nowhere(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "nada.txt")
    assert "leads nowhere" in complaint(tmp_path)


def test_permission_denied(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "a\n")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # a mode of 0 means nothing to root
    sentence = complaint(path)
    assert "a.txt" in sentence and "permissions" in sentence
    monkeypatch.setattr(os, "stat", refuse)
    assert "permissions" in complaint(path)


def test_faults_of_the_consumer_pass_unchanged(tmp_path):
    path = write(tmp_path / "a.txt", "a\nb\n")
    with pytest.raises(OSError, match="mine"):
        for _ in read_documents([str(path)]):
            raise OSError("mine")


# The hub


def test_hub_streams_with_config_and_split(monkeypatch):
    def rows():
        yield {"text": "um", "id": "u"}
        yield {"text": None}
        yield {"text": "dois"}
        raise AssertionError("read ahead")

    calls = fake_datasets(monkeypatch, rows)
    documents = list(islice(read_documents(["hf:org/nome@v1:por_Latn:test"]), 2))
    label = "org/nome:por_Latn:test"
    assert [(d.text, d.id, d.source, d.domain) for d in documents] == [
        ("um", "u", label, label),
        ("dois", f"{label}:3", label, label),
    ]
    assert calls == [("org/nome", "por_Latn", "v1", "test")]
    assert resolve_inputs(["hf:org/nome", "hf:org/a::dev", "hf:org/nome@refs/pr/1:pt"]) == [
        HubSource("org/nome"),
        HubSource("org/a", None, "dev"),
        HubSource("org/nome", "pt", revision="refs/pr/1"),
    ]
    assert HubSource("org/nome").label == "org/nome"
    assert HubSource("org/nome", "pt", "dev", "v1").ref == "hf:org/nome@v1:pt:dev"


def test_hub_faults(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert install_command("hub") in complaint("hf:org/nome")

    def unreachable():
        raise ConnectionError("Couldn't reach 'org/nome' on the Hub (LocalEntryNotFoundError).\nmore\nlines")

    def breaks():
        yield {"text": "um"}
        raise RuntimeError("connection reset")

    for load in (unreachable, breaks):
        fake_datasets(monkeypatch, load)
        with pytest.raises(HubUnreachableError):
            texts("hf:org/nome")
        sentence = complaint("hf:org/nome")
        assert "hf:org/nome" in sentence and "local file" in sentence and "primer" in sentence
    fake_datasets(monkeypatch, lambda: iter([{"content": "um"}]))
    assert "hf:org/nome, row 1" in complaint("hf:org/nome")


def test_a_stream_that_breaks_goes_on_at_its_row(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    breaks = [0, 2, 2, 5, 9]  # rows after which the first readings break; two of them make no progress

    def rows():
        end = breaks.pop(0) if breaks else None
        for row in range(10 if end is None else end):
            yield {"text": f"linha {row}"}
        if end is not None:
            raise ConnectionError("reset by peer")

    fake_datasets(monkeypatch, rows)
    assert texts("hf:org/nome") == [f"linha {row}" for row in range(10)]
    assert not breaks and "after row 5 of hf:org/nome; going on there" in caplog.text


# The primer


@pytest.fixture
def small_primer(tmp_path, monkeypatch) -> Path:
    path = write_jsonl(
        tmp_path / "texts.jsonl",
        {"id": "p1", "title": "A", "genre": "conto", "variety": "BR", "text": "Era uma vez.\n\nFim."},
        {"id": "p2", "title": "B", "genre": "carta", "variety": "PT", "text": "Cara Ana"},
        {"id": "p3", "title": "C", "genre": "conto", "variety": "BR", "text": "Outra"},
    )
    monkeypatch.setattr(primer, "_texts_file", lambda *language: path)
    return path


def test_primer(small_primer):
    counts = ReadCounts()
    documents = list(read_documents(["primer", "primer"], counts=counts))
    assert [(d.id, d.source, d.domain) for d in documents] == [
        ("p1", "primer", "conto"),
        ("p2", "primer", "carta"),
        ("p3", "primer", "conto"),
    ]
    assert documents[0].text == "Era uma vez.\n\nFim." and counts.documents == 3
    assert primer.primer_texts()[1].title == "B"
    assert primer.primer_table() == [
        primer.PrimerCount("carta", "PT", 1, 2),
        primer.PrimerCount("conto", "BR", 2, 5),
    ]


def test_primer_edition_is_part_of_its_source(small_primer):
    (before,) = resolve_inputs(["primer"])
    assert isinstance(before, PrimerSource)
    small_primer.write_bytes(small_primer.read_bytes() + b"\n")
    assert resolve_inputs(["primer"]) != [before]


def test_import_is_light():
    code = (
        "import sys, cartilha.corpus.readers;"
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'numpy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Names and domains


def labels(*refs: Path | str, **options) -> list[tuple[str, str]]:
    """Ids and domains."""
    return [(document.id, document.domain) for document in documents(*refs, **options)]


def test_equal_names_in_two_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("true", "fake"):
        write(Path(folder, "1.txt"), f"{folder}\n")
    write(Path("alone.txt"), "um\n")
    below = [("fake/1.txt:1", "fake"), ("true/1.txt:1", "true")]
    assert labels(tmp_path) == [("alone.txt:1", "alone"), *below]
    assert labels("*/*.txt") == labels(tmp_path / "*" / "1.txt") == below
    assert labels("fake/1.txt", "true/1.txt") == labels("fake", "true") == below
    assert labels("true/1.txt", "alone.txt") == [("1.txt:1", "1"), ("alone.txt:1", "alone")]
    write(Path("a", "x", "1.txt"), "um\n")
    write(Path("b", "x", "1.txt"), "dois\n")
    assert labels("a", "b") == [("a/x/1.txt:1", "x"), ("b/x/1.txt:1", "x")]


@pytest.mark.parametrize("given", ["NFC", "NFD"])
def test_a_name_is_found_however_its_accents_are_written(tmp_path, given):
    there = "NFD" if given == "NFC" else "NFC"
    folder = tmp_path / unicodedata.normalize(given, "coração")  # typed, as the name below it is not
    name = unicodedata.normalize(there, "ação.txt")
    write(folder / name, "um\n")
    if (folder / unicodedata.normalize(given, "ação.txt")).exists():
        pytest.skip("this file system does not tell the two apart")
    asked = unicodedata.normalize(given, str(folder / "ação.txt"))
    assert texts(asked) == texts(asked.replace(".txt", ".*")) == texts(unicodedata.normalize(there, asked)) == ["um"]


def test_a_file_that_is_one_document_is_no_domain(tmp_path):
    for name in ("1.txt", "2.txt", "nested/3.txt"):
        write(tmp_path / "livros" / name, f"{name}\n")
    assert [domain for _, domain in labels(tmp_path / "livros", text_unit="file")] == ["livros", "livros", "nested"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_column_with_a_value_a_document_is_no_domain(tmp_path, caplog, suffix):
    caplog.set_level(logging.INFO)
    rows = [{"text": f"frase {i}", "source": f"sentence {i}", "genre": f"g{i % 3}"} for i in range(40)]
    path = tmp_path / f"pares.{suffix}"
    table = pa.Table.from_pylist(rows)
    if suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "csv":
        pa.csv.write_csv(table, path)
    else:
        write(path, "\n".join(map(json.dumps, rows)))
    assert [domain for _, domain in labels(path)] == [row["genre"] for row in rows]
    assert [domain for _, domain in labels(path, domain_column="source")] == [row["source"] for row in rows]
    only = tmp_path / "only.jsonl"
    write(only, "\n".join(json.dumps({"text": row["text"], "source": row["source"]}) for row in rows))
    assert {domain for _, domain in labels(only)} == {"only"}
    assert "--domain_column source" in caplog.text
    few = tmp_path / "few.jsonl"
    write(few, "\n".join(json.dumps({"text": row["text"], "source": row["source"]}) for row in rows[:5]))
    assert [domain for _, domain in labels(few)] == [row["source"] for row in rows[:5]]
    sentence = complaint(path, domain_column="genero")
    assert "'genero'" in sentence and "by --domain_column" in sentence


def test_the_domain_follows_the_whole_file_however_it_is_cut(tmp_path):
    rows = [{"text": f"frase {i}", "source": "a" if i >= 200 else f"sentence {i}"} for i in range(400)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    (source,) = resolve_inputs([str(path)])
    whole = [document.domain for document in read_documents([source])]
    found = shards([source], ReadSettings(), 1000)
    assert len(found) > 5 and set(whole) == {"a"}  # the stem
    assert [document.domain for shard in found for document in read_shard(shard, ReadSettings())] == whole
