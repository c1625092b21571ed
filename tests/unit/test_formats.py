"""What each format and compression gives, what a folder leaves out, and what is told from the head of a file."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from cartilha.corpus import json_records
from cartilha.corpus.readers import ReadCounts, read_documents
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.shards import shards
from cartilha.corpus.sources import LeftOut, resolve_inputs
from cartilha.errors import UserError
from reading import COMPRESSORS, complaint, documents, read_shard, write


def read(path: Path, counts: ReadCounts | None = None, **options) -> list[tuple[str, str]]:
    """Number and text of each document."""
    found = documents(path, counts=counts, **options)
    return [(document.id.removeprefix(f"{path.name}:"), document.text) for document in found]


# JSON

RECORDS = [{"text": "um"}, {"text": "dois\n[2], {2}"}, {"text": " três\u2028"}]
JSON_FILES = {
    "lines": "".join(json.dumps(record) + "\n" for record in RECORDS),
    "array": json.dumps(RECORDS),
    "pretty array": json.dumps(RECORDS, indent=2, ensure_ascii=False) + "\n",
    "a line an item": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "pretty objects": "\n".join(json.dumps(record, indent=1) for record in RECORDS),
    "two arrays": json.dumps(RECORDS[:1]) + "\n" + json.dumps(RECORDS[1:]),
    "an empty array before": "[ ]\n" + json.dumps(RECORDS),
    "byte-order mark": "\ufeff" + json.dumps(RECORDS),
}


@pytest.mark.parametrize("block_chars", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", JSON_FILES)
def test_json_in_any_form(tmp_path, monkeypatch, form, block_chars):
    monkeypatch.setattr(json_records, "BLOCK_CHARS", block_chars)
    path = write(tmp_path / "a.json", JSON_FILES[form])
    assert read(path) == [(str(n), record["text"]) for n, record in enumerate(RECORDS, 1)]


def test_json_in_another_encoding(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(RECORDS, ensure_ascii=False).encode("utf-16"))
    assert [text for _, text in read(path, encoding="utf-16")] == [record["text"] for record in RECORDS]
    assert "--encoding utf-16" in complaint(path)


@pytest.mark.parametrize("empty", ["", " \n", "[]", "[\n]\n"])
def test_json_without_records(tmp_path, empty):
    assert read(write(tmp_path / "a.json", empty)) == []


@pytest.mark.parametrize(
    ("text", "words", "reason", "left"),
    [
        ('[{"text": "um"}, {"text": "dois"}', "after record 2 (it ends too early)", "damaged_file", ["um", "dois"]),
        ('[{"text": "um"}, {"text": "do', "after record 1 (Unterminated string", "damaged_file", ["um"]),
        ('[{"text": "um"}, {"text" "dois"}]', "after record 1 (Expecting ':'", "damaged_file", ["um"]),
        ('[{"text": "um"}, "dois", {"text": "três"}]', "record 2: JSON, but not", "broken_json", ["um", "três"]),
        ('[{"text": "um"}, {"texto": "dois"}]', "record 2 has no 'text', only: texto", "no_text_column", ["um"]),
        ('[{"text": "a\\ud83d"}]', "half a surrogate pair", "invalid_bytes", []),
        ('{"data": [{"text": "um"}]}', "record 1 has no 'text', only: data", "no_text_column", []),
        ('{"text": "um"}\n{"text": \n{"text": "x"}\n', "record 2: not valid JSON", "broken_json", ["um", "x"]),
    ],
)
def test_json_faults(tmp_path, text, words, reason, left):
    path = write(tmp_path / "a.json", text)
    assert words in complaint(path)
    counts = ReadCounts()
    assert [text for _, text in read(path, counts, on_error="skip")] == left
    assert counts.skipped == {reason: 1}


def test_a_json_item_longer_than_any_document(tmp_path, monkeypatch):
    monkeypatch.setattr("cartilha.corpus.lines.MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(json_records, "BLOCK_CHARS", 10)
    path = write(tmp_path / "a.json", json.dumps([{"text": "um"}, {"text": "x" * 500}]))
    assert "record 2 is longer than" in complaint(path)


def test_invalid_bytes_in_a_json_array(tmp_path):
    path = write(tmp_path / "a.json", b'[{"text": "a\xe7\xe3o"}]')
    assert "invalid bytes" in complaint(path)
    assert read(path, invalid_bytes="replace") == [("1", "a\ufffd\ufffdo")]


# Arrow


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("compression", ["", ".xz"])
def test_arrow_files_and_streams(tmp_path, kind, compression):
    table = pa.table({"n": [1, 2, 3, 4], "text": ["um", None, "três", "\0"], "domain": ["a", "a", "b", ""]})
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    data = sink.getvalue().to_pybytes()
    path = write(tmp_path / f"a.arrow{compression}", COMPRESSORS[compression](data))
    counts = ReadCounts()
    assert read(path, counts) == [("1", "um"), ("3", "três"), ("4", "\0")]
    assert counts.empty == 1
    assert "has no 'texto', only: n, text, domain" in complaint(path, text_column="texto")
    path = write(tmp_path / "b.arrow", data[: len(data) // 2])
    assert "cannot be read as Arrow" in complaint(path) and "--on_error skip" in complaint(path)


def write_arrow(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": list(texts)})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def test_of_a_saved_dataset_the_files_it_lists_are_read(tmp_path):
    for split in ("train", "test"):  # as `DatasetDict.save_to_disk` writes it
        write_arrow(tmp_path / split / "data-00000-of-00001.arrow", f"um {split}")
        write_arrow(tmp_path / split / "cache-0123456789abcdef.arrow", f"UM {split}")
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        write(tmp_path / split / "state.json", json.dumps(state))
        write(tmp_path / split / "dataset_info.json", "{}")
    write(tmp_path / "dataset_dict.json", '{"splits": ["train", "test"]}')
    left_out: LeftOut = {}
    assert [document.text for document in read_documents(resolve_inputs([str(tmp_path)], left_out))] == [
        "um test",
        "um train",
    ]
    cached = [os.path.join(split, "cache-0123456789abcdef.arrow") for split in ("test", "train")]
    assert left_out == {"not listed in state.json as part of the dataset": cached}
    (tmp_path / "train" / "state.json").write_text("[]")  # of another kind: nothing is known of the folder
    assert len(list(read_documents([str(tmp_path)]))) == 3


# Compression


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("kind", [".TXT", ".jsonl", ".json", ".tsv"])
def test_a_compression_stands_behind_any_suffix(tmp_path, kind, compression):
    plain = {".TXT": "um\n", ".jsonl": '{"text": "um"}\n', ".json": '[{"text": "um"}]', ".tsv": "n\ttext\n1\tum\n"}[
        kind
    ]
    packed = COMPRESSORS[compression](plain.encode())
    path = write(tmp_path / f"c4-pt.tfrecord-00000-of-01024{kind}{compression}", packed)
    assert read(path) == [("1", "um")]
    if compression:
        path.write_bytes(packed[: len(packed) - 6])
        assert "damaged or cut off" in complaint(path)
        path.write_bytes(b"")
        assert "the file is empty" in complaint(path)
        path.write_bytes(b"no compressed file at all")
        assert "damaged or cut off" in complaint(path)


def test_a_zstd_window_that_is_too_large_is_not_called_damage(tmp_path):
    # As `zstd --long=31` writes it: a frame header that asks for a window of 2 GiB, and one block as it is.
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + (3 << 3 | 1).to_bytes(3, "little") + b"um\n"
    path = write(tmp_path / "a.txt.zst", frame)
    for on_error in ("stop", "skip"):
        sentence = complaint(path, on_error=on_error)
        assert "window" in sentence and "zstd -d --long=31" in sentence and "damaged" not in sentence
    path.write_bytes(frame[:5] + bytes([17 << 3]) + frame[6:])  # 128 MiB
    assert read(path) == [("1", "um")]


# Folders


def test_what_a_folder_leaves_out_is_named_and_counted_with_the_reason(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write(Path("d/x.json.gz"), gzip.compress(b'{"text": "a"}\n'))
    write(Path("d/README.txt"), "um\ndois\n")
    for name in ("d/a.doc", "d/b/c.html", "d/.DS_Store", "d/b/._README.txt"):
        write(Path(name), "x")
    write(Path("e/f.txt"), "outro")
    Path("d/ligação").symlink_to(Path("e").resolve())
    left_out: LeftOut = {}
    found = resolve_inputs(["d"], left_out)
    assert [source.path.name for source in found] == ["README.txt", "x.json.gz"]
    assert left_out == {
        "of a kind that is not read": ["a.doc", os.path.join("b", "c.html")],
        "hidden": [os.path.join("b", "._README.txt")],
        "links to folders": ["ligação"],
    }
    assert "2 files (d/a.doc, d/b/c.html)" in caplog.text.replace("\\", "/")


def test_a_folder_of_which_the_larger_part_is_not_read_stops(tmp_path, caplog):
    write(tmp_path / "leia.txt", "x" * 100)
    for number in range(9):
        write(tmp_path / f"{number}.docx", "x" * 11)
    assert len(resolve_inputs([str(tmp_path)])) == 1 and "and 4 more" in caplog.text
    write(tmp_path / "a.zip", "x" * 2)
    sentence = complaint(tmp_path)
    assert "101 bytes are of a kind that is not read (10 files (" in sentence and "*.txt" in sentence
    (tmp_path / "leia.txt").unlink()
    assert "holds no file that can be read, only 10 files" in complaint(tmp_path)


# CSV and TSV


def tsv(rows: list[str]) -> str:
    return "id\tlang\ttext\n" + "".join(f"{n}\tpor\t{row}\n" for n, row in enumerate(rows, 1))


def test_quotes_in_tsv_without_quoting_are_characters(tmp_path):
    rows = [f"Frase {n}." for n in range(1, 21)]
    rows[2], rows[7] = '"Olá, disse ele.', 'E saiu."'
    path = write(tmp_path / "a.tsv", tsv(rows))
    counts = ReadCounts()
    assert [text for _, text in read(path, counts)] == rows and counts.joined_rows == 0
    joined = [text for _, text in read(path, counts, csv_quoting="minimal")]
    assert len(joined) == 15 and joined[2].endswith("8\tpor\tE saiu.")
    assert (counts.joined_rows, counts.first_joined) == (1, f"{path}, row 3")


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        ('id\ttext\n1\t"Sim", disse.\n', ['"Sim", disse.']),
        ('id\ttext\n1\t"Sim", disse.\n2\t"Não"\n', ['"Sim", disse.', '"Não"']),
        ('id\ttext\n1\t"Sim\n2\tnão\n3\t"\n', ['"Sim', "não", '"']),
        ('text\tid\n"Sim\t1\nnão\t2\n', ['"Sim', "não"]),
        ('id\ttext\r\n1\t"Sim", disse.\r\n\r\n2\tNão\r\n', ['"Sim", disse.', "Não"]),
        ('id\ttext\n1\t"Ele disse ""sim"""\n2\t"a\tb"\n', ['Ele disse "sim"', "a\tb"]),
        ('id\ttext\n1\t"um\ndois"\n2\ttrês\n', ["um\ndois", "três"]),
        ('id\ttext\n1\t"um\n\ndois"\n2\ttrês\n', ["um\n\ndois", "três"]),
        ('text\tid\n"um\ndois"\t1\n', ["um\ndois"]),
        ('text\n"um\ndois"\n', ["um\ndois"]),
        ('"id"\t"text"\n"1"\t"um"\n', ["um"]),
        ("id\ttext\n1\tum 5\" e 6'\n", ["um 5\" e 6'"]),
    ],
)
def test_quoting_of_tsv_is_told_from_the_file(tmp_path, body, texts):
    assert [text for _, text in read(write(tmp_path / "a.tsv", body))] == texts


def test_one_line_with_another_number_of_fields_does_not_make_it_quoted(tmp_path):
    path = write(tmp_path / "a.tsv", tsv(['"Sim", disse.', '"Não", disse.']) + "estragada\n")
    counts = ReadCounts()
    assert [text for _, text in read(path, counts, on_error="skip")] == ['"Sim", disse.', '"Não", disse.']
    assert counts.skipped == {"broken_csv": 1}


def test_quoting_and_delimiter_can_be_said(tmp_path):
    path = write(tmp_path / "a.csv", 'id,text\n1,"um\n2,dois"\n')
    assert [text for _, text in read(path)] == ["um\n2,dois"]  # where commas part them, quotes enclose fields
    assert [text for _, text in read(path, csv_quoting="none")] == ['"um', 'dois"']
    assert "--csv_quoting none" in complaint(write(tmp_path / "b.csv", 'id,text\n1,"um" dois\n'))
    for sign, name in ((";", ";"), ("\t", "tab"), ("|", "|"), ("§", "§")):
        for suffix in (".csv", ".tsv"):
            path = write(tmp_path / f"d{suffix}", f"id{sign}text\n1{sign}um\n")
            assert read(path, csv_delimiter=name) == [("1", "um")]
    assert read(write(tmp_path / "e.csv", "id\ttext\n1\tum, dois\n")) == [("1", "um, dois")]  # told by the header
    for wrong in ("", "ab", '"', "\n"):
        with pytest.raises(UserError, match="--csv_delimiter"):
            ReadSettings(csv_delimiter=wrong)


# Documents of plain text

PARAGRAPHS = "\n  \num\ndois\n\n\t\ntrês\r\nquatro\r\n\r\n cinco\n\u3000\nseis"


def test_paragraphs_are_documents(tmp_path):
    path = write(tmp_path / "a.txt", PARAGRAPHS)
    expected = [("3", "um\ndois"), ("7", "três\r\nquatro"), ("10", " cinco"), ("12", "seis")]
    counts = ReadCounts()
    assert read(path, counts, text_unit="paragraph") == expected and counts == ReadCounts(documents=4)
    packed = write(tmp_path / "a.txt.xz", lzma.compress(PARAGRAPHS.encode()))
    assert read(packed, text_unit="paragraph") == expected
    assert read(write(tmp_path / "b.txt", "\n \n"), text_unit="paragraph") == []


def test_a_fault_in_a_paragraph_is_one_and_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("cartilha.corpus.lines.MAX_DOCUMENT_BYTES", 20)
    path = write(tmp_path / "a.txt", b"um\n\na\xe7\n\xff\nb\n\n" + b"0123456789\n" * 9 + b"\ntres\n")
    counts = ReadCounts()
    assert [text for _, text in read(path, counts, text_unit="paragraph", on_error="skip")] == ["um", "tres"]
    assert counts.skipped == {"invalid_bytes": 1, "too_long": 1}
    assert "line 3" in counts.first_skipped["invalid_bytes"] and "line 7 is longer" in counts.first_skipped["too_long"]


@pytest.mark.parametrize("count_bytes", [1, 5, 1 << 20])
@pytest.mark.parametrize("target", [1, 6, 20, 1000])
def test_paragraphs_are_the_same_however_a_file_is_cut(tmp_path, monkeypatch, target, count_bytes):
    monkeypatch.setattr("cartilha.corpus.plain_text.COUNT_BYTES", count_bytes)
    path = write(tmp_path / "a.txt", PARAGRAPHS * 3)
    settings = ReadSettings(text_unit="paragraph")
    parts = shards(resolve_inputs([str(path)]), settings, target)
    assert [d for part in parts for d in read_shard(part, settings)] == list(read_documents([str(path)], settings))
    assert len(parts) > 1 or target == 1000 or count_bytes == 1  # not vacuous


WRAPPED = """Era uma vez, numa fazenda distante da cidade, um menino que gostava
de ouvir as histórias que a avó contava ao pé do fogão. Todas as noites
ele se sentava no chão, encostava a cabeça nos joelhos dela e esperava
que a chuva começasse a bater no telhado, porque era então que as
melhores histórias vinham. A avó falava baixo, como quem não quer
acordar ninguém, e o menino fechava os olhos para ver melhor as coisas
que ela dizia. Um dia a chuva não veio, e a avó contou mesmo assim uma
história que ele nunca mais esqueceu, sobre um rio que andava para
trás e sobre a gente que morava nas suas margens sem saber disso.
"""
SENTENCE = "Esta é uma frase inteira que termina com um ponto, e a linha acaba com ela."


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ([WRAPPED], "wrapped"),
        ([WRAPPED + "\n" + WRAPPED], "wrapped"),
        ([f"{SENTENCE}\n{SENTENCE}\n{SENTENCE}\n\n" * 4], "--text_unit paragraph"),
        ([f"{SENTENCE}\n{SENTENCE}\n"] * 6, "--text_unit file"),
        ([f"{SENTENCE}\n" * 50], ""),
        ([f"{SENTENCE}\n\n" * 50], ""),  # a document a line all the same
        ([f"{SENTENCE}\n"] * 50, ""),
        (["casa\ncoisa\nrua\ncampo\nmar\nsol\nlua\nvento\nserra\nrio\n"], ""),  # a list of words
        (["\n".join(f"{'kkkk ' * (n % 9 + 1)}que coisa" for n in range(40))], ""),  # short messages in lower case
        ([""], ""),
        (["\xff" * 9], ""),
    ],
)
def test_a_hint_where_the_lines_do_not_look_like_documents(tmp_path, caplog, files, hint):
    for number, text in enumerate(files):
        write(tmp_path / f"{number}.txt", text)
    with caplog.at_level(logging.WARNING, "cartilha"):
        read_documents([str(tmp_path)])
    assert len(caplog.records) == bool(hint) and hint in caplog.text
    caplog.clear()
    for unit in ("paragraph", "file"):
        read_documents([str(tmp_path)], ReadSettings(text_unit=unit))
    assert not caplog.records


def test_what_was_told_from_the_head_of_a_tsv_is_said(tmp_path, caplog):
    path = write(tmp_path / "a.tsv", tsv(['"Sim", disse.']))
    read_documents([str(path)])
    assert "a.tsv: quotes are taken as characters" in caplog.text and "--csv_quoting minimal" in caplog.text
    caplog.clear()
    read_documents([str(path)], ReadSettings(csv_quoting="none"))
    read_documents([str(write(tmp_path / "b.tsv", tsv(['"Sim"'])))])
    assert not caplog.records


# Names


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
@pytest.mark.parametrize("compression", COMPRESSORS)
def test_a_name_that_is_not_utf8(tmp_path, compression):
    path = write(tmp_path / f"cora\udce7\udce3o.txt{compression}", COMPRESSORS[compression](b"um\n"))
    (document,) = read_documents([str(path)])
    assert (document.text, document.domain) == ("um", "cora\ufffd\ufffdo")
