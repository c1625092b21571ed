"""The store: what is written comes back, damage is named, and a write that fails leaves what was there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cartilha.corpus.document import Document
from cartilha.corpus.splits import Split
from cartilha.storage import file_sha256, write_sealed_json
from cartilha.tokens import store_checks, store_writer
from cartilha.tokens.store import TokenStore, batches
from cartilha.tokens.store_writer import writing_store
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer
from reading import Interrupted, complaint_of, interrupt
from stores import add_documents

TRAIN = [
    Document("Olá, João!\n Tudo bem?", "1", "cartas.txt", "carta"),
    Document("😀", "2", "cartas.txt", "carta"),
    Document("Um </s> dois", "um/3", "contas.jsonl", "escola"),
]
VALIDATION = [Document("A manhã  veio.", "7", "contos.txt", "conto"), Document("Fim.", "8", "contos.txt", "conto")]
FILES = [
    "train.tokens",
    "validation.tokens",
    "train.documents.parquet",
    "validation.documents.parquet",
    "validation.text.parquet",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
]


def write_store(
    path: Path,
    train: list[Document] = TRAIN,
    validation: list[Document] = VALIDATION,
    tokenizer: TextTokenizer | None = None,
    replace: bool = False,
) -> Path:
    sides: list[tuple[Split, list[Document]]] = [("train", train), ("validation", validation)]
    with writing_store(path, tokenizer or load_tokenizer("random:tiny"), replace=replace) as writer:
        for split, documents in sides:
            add_documents(writer, split, documents)
        writer.finish({"settings": {"seed": 3}})
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_store(tmp_path / "loja")


def complaint(path: Path) -> str:
    return complaint_of(TokenStore, path)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too, but for the remembered verdict."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".verified.json"
    }


def test_what_is_written_comes_back(path):
    store = TokenStore(path)
    for split, documents in (("train", TRAIN), ("validation", VALIDATION)):
        table, labels, tokens = store.documents(split), store.labels(split), store.tokens(split)
        texts = [d.text for d in documents]
        # `random:tiny` has a token for each byte, whose id is the byte.
        pieces = [bytes(tokens[s : s + n].astype(np.uint8)) for s, n in zip(table.start, table.num_tokens, strict=True)]
        assert pieces == [text.encode("utf-8") for text in texts]
        assert table.start.tolist() == [0, *np.cumsum(table.num_tokens)[:-1]] and len(tokens) == table.num_tokens.sum()
        assert table.num_bytes.tolist() == [len(text.encode("utf-8")) for text in texts]
        assert table.num_chars.tolist() == [len(text) for text in texts]
        assert table.num_words.tolist() == [len(text.split()) for text in texts]
        assert labels == {
            "doc_id": [d.id for d in documents],
            "source": [d.source for d in documents],
            "domain": [d.domain for d in documents],
            "text_hash": [d.text_hash for d in documents],
        }
        counts = store.counts[split]
        sums = (table.num_tokens.sum(), table.num_bytes.sum(), table.num_chars.sum(), table.num_words.sum())
        assert (counts.num_documents, len(documents)) == (len(documents), len(table.start))
        assert (counts.num_tokens, counts.num_bytes, counts.num_chars, counts.num_words) == sums
    assert list(store.read_documents("validation")) == VALIDATION
    assert store.info["settings"] == {"seed": 3}
    assert store.counts["train"].num_bytes > store.counts["train"].num_chars > store.counts["train"].num_words > 0


def test_the_tokenizer_in_the_store_is_the_one_it_was_made_with(path):
    store, tokenizer = TokenStore(path), load_tokenizer("random:tiny")
    assert store.fingerprint == tokenizer.fingerprint == store.tokenizer().fingerprint
    assert (store.prefix_id, store.end_id, store.num_ids) == (256, 257, 259)
    assert store.tokenizer().encode(["Um </s> dois"])[0].tolist() == list(b"Um </s> dois")


def test_only_the_held_out_text_is_kept(path):
    assert sorted(contents(path)) == sorted([*FILES, "store.json"])
    assert "João".encode() not in b"".join(contents(path).values())
    assert pq.read_table(path / "validation.text.parquet")["text"].to_pylist() == [d.text for d in VALIDATION]


def test_documents_are_streamed_from_any_number_on(path):
    store = TokenStore(path)
    for split, documents in (("train", TRAIN), ("validation", VALIDATION)):  # training text comes from its tokens
        for first in range(len(documents) + 1):
            assert list(store.read_documents(split, first)) == documents[first:]


def test_only_the_documents_asked_for_are_decoded(path, monkeypatch):
    decoded: list[int] = []
    decode = TextTokenizer.decode_batch
    monkeypatch.setattr(
        TextTokenizer, "decode_batch", lambda self, ids: decoded.extend(map(len, ids)) or decode(self, ids)
    )
    list(TokenStore(path).read_documents("train", len(TRAIN) - 1))
    assert decoded == [TokenStore(path).documents("train").num_tokens[-1]]


def test_the_corpus_hash_tells_texts_and_their_order(path, tmp_path):
    def corpus_hash(name: str, documents: list[Document]) -> str:
        return TokenStore(write_store(tmp_path / name, documents)).counts["train"].corpus_hash

    same = [Document(d.text, "outro", "outra", "outro") for d in TRAIN]
    assert TokenStore(path).counts["train"].corpus_hash == corpus_hash("mesma", same)
    assert len({corpus_hash("a", TRAIN), corpus_hash("b", TRAIN[::-1]), corpus_hash("c", TRAIN[:2])}) == 3


def test_a_side_without_tokens_can_be_read(tmp_path):
    store = TokenStore(write_store(tmp_path / "loja", validation=[]))
    assert store.tokens("validation").shape == (0,) and list(store.read_documents("validation")) == []
    assert store.documents("validation").start.shape == (0,)


def test_many_row_groups_are_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "ROWS_PER_GROUP", 2)
    documents = [Document(f"Texto {i}", str(i), "t", "t") for i in range(7)]
    path = write_store(tmp_path / "loja", documents, documents)
    assert pq.ParquetFile(path / "train.documents.parquet").num_row_groups == 4
    assert list(TokenStore(path).read_documents("validation")) == documents


# Width of the ids


def words_tokenizer(num_ids: int) -> TextTokenizer:
    """A token for each of the words p0, p1, ...: as many ids as wanted."""
    backend = Tokenizer(models.WordLevel({f"p{i}": i for i in range(num_ids)}, unk_token="p0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TextTokenizer(backend, bos_id=0, eos_id=0, pad_id=None)


@pytest.mark.parametrize(("num_ids", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_ids_take_two_bytes_up_to_65536_of_them(tmp_path, num_ids, dtype):
    document = Document(f"p1 p{num_ids - 1} p258", "1", "t", "t")
    path = write_store(tmp_path / "loja", [document], tokenizer=words_tokenizer(num_ids))
    expected = [1, num_ids - 1, 258]
    # Little-endian on the disk, whatever the machine.
    assert np.fromfile(path / "train.tokens", dtype).tolist() == expected
    tokens = TokenStore(path).tokens("train")
    assert tokens.tolist() == expected and isinstance(tokens, np.memmap)
    assert TokenStore(path).info["dtype"] == {"<u2": "uint16", "<u4": "uint32"}[dtype]


def test_starts_are_counted_in_tokens(tmp_path):
    documents = [Document(text, text, "t", "t") for text in ("p10 p11 p12", "p13", "p14 p15")]
    store = TokenStore(write_store(tmp_path / "loja", documents, tokenizer=words_tokenizer(300)))
    table = store.documents("train")
    assert (table.start.tolist(), table.num_tokens.tolist()) == ([0, 3, 4], [3, 1, 2])
    assert table.num_bytes.tolist() == [11, 3, 7]  # not vacuous: with a token a byte the two would be the same
    assert store.tokens("train").tolist() == [10, 11, 12, 13, 14, 15]


# Damage


def flip_bit(file: Path, place: float) -> None:
    """Flip one bit at this share of the file's length, as a disk does: nothing else changes but the time of change."""
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    changed = file.stat().st_mtime_ns + 10**9
    file.write_bytes(data)
    os.utime(file, ns=(changed, changed))


def test_the_list_of_files_is_whole(path):
    assert sorted(TokenStore(path).info["files"]) == sorted(FILES)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_and_its_file_named(path, name, opened_before, place):
    if opened_before:
        TokenStore(path)
    flip_bit(path / name, place)
    assert str(path / name) in complaint(path) and "damaged" in complaint(path)
    flip_bit(path / name, place)
    TokenStore(path)  # not vacuous: it was that bit


def test_a_file_cut_short_is_damaged(path):
    (path / "train.tokens").write_bytes((path / "train.tokens").read_bytes()[:-2])
    assert "train.tokens is damaged" in complaint(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(path, name):
    (path / name).unlink()
    assert f"lacks its file {name}" in complaint(path)


def test_files_are_hashed_once_while_they_are_unchanged(path, monkeypatch):
    hashed = []
    real = store_checks.file_sha256

    def hash_and_note(file: Path) -> str:
        if file.name != "store.json":  # small, and read each time
            hashed.append(file.name)
        return real(file)

    monkeypatch.setattr(store_checks, "file_sha256", hash_and_note)
    TokenStore(path)
    assert not hashed  # the writer hashed them a moment ago
    store_checks._verdict_path(path).unlink()
    TokenStore(path)
    assert len(hashed) == len(FILES)
    TokenStore(path)
    assert len(hashed) == len(FILES)
    os.utime(path / "train.tokens", ns=(1, 1))
    TokenStore(path)
    assert hashed[len(FILES) :] == ["train.tokens"]


def test_a_store_that_cannot_keep_its_verdict_opens(path, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(store_checks, "write_json", refuse)
    assert TokenStore(path).counts["train"].num_documents == len(TRAIN)


def test_no_store(path, tmp_path):
    assert "does not exist" in complaint(tmp_path / "nada")
    (tmp_path / "vazia").mkdir()
    (tmp_path / "texto.txt").write_text("um texto")
    assert "is a file, not a store" in complaint(tmp_path / "texto.txt")
    for empty in (tmp_path / "nada", tmp_path / "vazia"):
        assert "cartilha prepare" in complaint(empty) and str(empty) in complaint(empty)
    assert "is not a store" in complaint(tmp_path / "vazia")


def edit_info(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change store.json as somebody would who means it: its hash of itself is right again."""
    info = json.loads((path / "store.json").read_text(encoding="utf-8"))
    del info["sha256"]
    change(info)
    write_sealed_json(path / "store.json", info)


def test_a_newer_format_is_refused(path):
    edit_info(path, lambda info: info.update(settings="others"))
    TokenStore(path)
    edit_info(path, lambda info: info.update(format_version=store_checks.FORMAT_VERSION + 1))
    assert "has format 2, this version reads 1" in complaint(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format_version": 1', b"\xff\xfe"])
def test_a_store_json_that_cannot_be_read(path, text):
    (path / "store.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert f"{path}/store.json is damaged" in complaint(path) and "--overwrite" in complaint(path)


@pytest.mark.parametrize("key", store_checks.STORE_KEYS)
def test_a_store_json_that_lacks_a_part(path, key):
    edit_info(path, lambda info: info.pop(key))
    assert f"store.json lacks {key}" in complaint(path)


def test_every_flipped_bit_of_store_json_is_found(path):
    file = path / "store.json"
    data = file.read_bytes()
    for bit in range(0, 8 * len(data), 7):  # every bit of a byte in turn, and every byte
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert "store.json" in complaint(path) or "has format" in complaint(path)
    file.write_bytes(data)
    TokenStore(path)


# A store from somebody else: its hashes are right and its contents a trap


def rehash(path: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        for name, entry in info["files"].items():
            entry.update(size=(path / name).stat().st_size, sha256=file_sha256(path / name))

    edit_info(path, change)


def change_table(path: Path, name: str, change: Callable[[dict[str, list[Any]]], Any], schema: Any = None) -> None:
    table = pq.read_table(path / name)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=schema or table.schema), path / name)


def in_split(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit_info(path, lambda info: info["splits"]["train"].update(changes))


def in_info(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit_info(path, lambda info: info.update(changes))


def in_files(name: str) -> Callable[[Path], None]:
    return lambda path: edit_info(path, lambda info: info["files"].update({name: {"size": 1, "sha256": "0"}}))


def in_documents(change: Callable[[dict[str, list[Any]]], Any]) -> Callable[[Path], None]:
    return lambda path: change_table(path, "train.documents.parquet", change)


def large_id(path: Path) -> None:
    tokens = np.fromfile(path / "train.tokens", "<u2")
    tokens[3] = 259  # random:tiny has 259 ids
    tokens.tofile(path / "train.tokens")


def million_rows(path: Path) -> None:
    """A table whose rows cost nothing on the disk."""
    columns = {name: [0] * 10**6 for name in store_checks.NUMBERS} | {n: [""] * 10**6 for n in store_checks.LABELS}
    pq.write_table(pa.table(columns), path / "train.documents.parquet")


def endless_labels(path: Path) -> None:
    """A label of 8 MB that each of 50,000 documents has: kilobytes on the disk, terabytes when spelt out."""
    rows = 50_000
    columns: dict[str, Any] = {name: [0] * rows for name in store_checks.NUMBERS}
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 2**23]))
    columns |= {name: repeated for name in store_checks.LABELS}
    pq.write_table(pa.table(columns), path / "train.documents.parquet", compression="zstd")
    in_split(num_documents=rows)(path)


TRAPS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an id beyond the tokenizer": (large_id, "has the id 259"),
    "more tokens than there are": (in_split(num_tokens=10**12), "does not hold 1,000,000,000,000 tokens"),
    "more documents than there are": (in_split(num_documents=10**9), "has 3 rows, not 1,000,000,000"),
    "more text than there is": (in_split(num_bytes=10**9), "do not add up"),
    "rows for nothing": (million_rows, "has 1,000,000 rows"),
    "endless labels": (endless_labels, "GB of memory"),
    "documents that overlap": (in_documents(lambda c: c["start"].__setitem__(1, 0)), "one behind the other"),
    "negative lengths": (in_documents(lambda c: c["num_tokens"].__setitem__(0, -5)), "negative"),
    "no lengths": (in_documents(lambda c: c["num_tokens"].__setitem__(0, None)), "without numbers"),
    "a count of words": (in_split(num_tokens="3"), "num_tokens is '3'"),
    "a negative count": (in_split(num_tokens=-1), "num_tokens is -1"),
    "a strange dtype": (in_info(dtype="object"), "object"),
    "no ids": (in_info(num_ids=0), "num_ids is 0"),
    "too many ids": (in_info(num_ids=2**40), "num_ids is"),
    "a prefix beyond the ids": (in_info(prefix_id=259), "prefix_id is 259"),
    "no splits": (in_info(splits={}), "train"),
    "splits that are a list": (in_info(splits=[]), "makes no sense"),
    "files outside": (in_files("../corpus.txt"), "lies outside"),
    "files at the root": (in_files("/etc/passwd"), "lies outside"),
    "files nobody hashed": (in_info(files={}), "no hash of train.tokens"),
    "a table that is none": (lambda path: (path / "train.documents.parquet").write_bytes(b"PAR1" * 9), "contradicts"),
    "other texts": (
        lambda path: change_table(path, "validation.text.parquet", lambda c: c["text"].__setitem__(0, "curto")),
        "bytes of text",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_one_sentence(path, trap):
    lay, named = TRAPS[trap]
    before = psutil.Process().memory_info().rss
    lay(path)
    if "files" not in trap:
        rehash(path)
    sentence = complaint(path)
    assert named in sentence and "--overwrite" in sentence and "\n" not in sentence
    assert psutil.Process().memory_info().rss - before < 2**30


def test_a_verdict_that_came_with_the_store_counts_for_nothing(path):
    large_id(path)
    rehash(path)
    files = {name: (path / name).stat() for name in FILES}
    info = json.loads((path / "store.json").read_text(encoding="utf-8"))
    forged = {n: [s.st_size, s.st_mtime_ns, info["files"][n]["sha256"]] for n, s in files.items()}
    (path / ".verified.json").write_text(json.dumps(forged), encoding="utf-8")
    assert "has the id 259" in complaint(path)


# All or nothing


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("moment", ["adding", "finishing", "renaming"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, old, moment):
    folder = tmp_path / "pasta"
    folder.mkdir()
    if old:
        write_store(folder / "loja")
    before = contents(folder)
    if moment == "finishing":
        monkeypatch.setattr(TextTokenizer, "save", interrupt)
    if moment == "renaming":
        monkeypatch.setattr("cartilha.storage._exchange", lambda left, right: False)
        real = Path.replace
        monkeypatch.setattr(
            Path, "replace", lambda a, b: interrupt() if a.suffix == ".tmp" and a.is_dir() else real(a, b)
        )
    with pytest.raises(Interrupted), writing_store(folder / "loja", load_tokenizer("random:tiny"), replace=True) as w:
        add_documents(w, "train", VALIDATION)
        assert len(list(folder.iterdir())) == 1 + old  # not vacuous: the new one is being written
        if moment == "adding":
            interrupt()
        w.finish({})
    monkeypatch.undo()
    assert contents(folder) == before
    assert [p.name for p in folder.iterdir()] == (["loja"] if old else [])
    if old:
        assert list(TokenStore(folder / "loja").read_documents("validation")) == VALIDATION


def test_a_store_appears_whole_or_not_at_all(tmp_path):
    with writing_store(tmp_path / "loja", load_tokenizer("random:tiny"), replace=False) as writer:
        add_documents(writer, "train", TRAIN)
        add_documents(writer, "validation", VALIDATION)
        writer.finish({})
        assert not (tmp_path / "loja").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["loja"]
    TokenStore(tmp_path / "loja")


def test_a_store_is_replaced_only_when_asked(tmp_path):
    path = write_store(tmp_path / "loja")
    before = contents(path)
    with pytest.raises(OSError):
        write_store(path, TRAIN[:1])
    assert contents(path) == before
    write_store(path, TRAIN[:1], replace=True)
    assert TokenStore(path).counts["train"].num_documents == 1
    assert [p.name for p in tmp_path.iterdir()] == ["loja"]


def test_batches_hold_all_documents_in_order_and_stay_small():
    documents = [Document("x" * (i % 5), str(i), "t", "t") for i in range(50)]
    groups = list(batches(documents, max_chars=9, max_documents=4))
    assert [d for group in groups for d in group] == documents
    assert all(len(group) <= 4 and sum(len(d.text) for d in group) < 9 + 4 for group in groups)
    assert {len(group) for group in groups} > {4}  # both limits were met
    assert list(batches([])) == []
