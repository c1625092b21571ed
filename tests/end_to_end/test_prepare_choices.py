"""`prepare` on bad input: one sentence that names file and place, and each of the user's choices does what it says."""

from __future__ import annotations

import gzip
import json
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cartilha.corpus.primer import primer_texts
from cartilha.pipeline import prepare as module
from cartilha.preparation import shard_work
from cartilha.tokens.store import TokenStore

Refused = Callable[..., str]
PRIMER = [text.text.replace("\n", " ") for text in primer_texts()]


def texts_of(store: Path) -> set[str]:
    opened = TokenStore(store)
    return {document.text for split in ("train", "validation") for document in opened.read_documents(split)}


def csv_with_a_stray_quote(path: Path) -> tuple[str, str, int]:
    path.write_text(
        "text,n\n" + "".join(f'"{text} {n}",1\n' for n, text in enumerate(["um", "dois"] * 5)) + 'a"b"c,"2"x,1\n'
    )
    return "row 11 (line 12)", "broken_csv", 10


def gzip_that_is_cut_off(path: Path) -> tuple[str, str, int]:
    lines = [f"{n} {np.random.default_rng(n).bytes(40).hex()}" for n in range(3000)]
    path.write_bytes(gzip.compress("\n".join(lines).encode())[:-20_000])
    with gzip.open(path, "rb") as file:
        whole = 0
        try:
            while line := file.readline():
                whole += line.endswith(b"\n")
        except EOFError:
            pass
    return "after line", "damaged_file", whole


def parquet_without_the_column(path: Path) -> tuple[str, str, int]:
    pq.write_table(pa.table({"texto": ["um", "dois"]}), path)
    return "has no 'text', only: texto", "no_text_column", 0


def json_that_is_broken(path: Path) -> tuple[str, str, int]:
    path.write_text('{"text": "um"}\n{"text": "dois"}\n{"text": "tr\n{"text": "quatro"}\n')
    return "line 3: not valid JSON", "broken_json", 3


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("aspas.csv", csv_with_a_stray_quote),
        ("cortado.txt.gz", gzip_that_is_cut_off),
        ("coluna.parquet", parquet_without_the_column),
        ("linhas.jsonl", json_that_is_broken),
    ],
)
def test_what_is_broken_stops_or_is_skipped_and_counted(cartilha, refused: Refused, tmp_path, name, make):
    path, good = tmp_path / name, tmp_path / "bom.txt"
    good.write_text("Um texto bom.\nOutro texto bom.\n", encoding="utf-8")
    place, reason, num_left = make(path)
    store = tmp_path / "store"
    prepare = ["prepare", "--input", good, path, "--model", "random:tiny", "--output", store]
    sentence = refused(*prepare)
    assert str(path) in sentence and place in sentence and "--" in sentence
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(["bom.txt", name])
    outcome = cartilha(*prepare, "--on_error", "skip", "--json")
    assert outcome.code == 0 and f"1 record was left out ({reason}), the first: {path}" in outcome.err
    result = json.loads(outcome.out)
    assert result["dropped"][reason] == 1
    found = texts_of(store)
    assert {"Um texto bom.", "Outro texto bom."} < found or num_left == 0
    assert abs(len(found) - (2 + num_left)) <= (1 if reason == "damaged_file" else 0)


def test_a_file_that_changes_while_it_is_read(refused: Refused, cartilha, tmp_path, monkeypatch):
    path = tmp_path / "cresce.txt"
    path.write_text("\n".join(PRIMER), encoding="utf-8")
    prepare = ["prepare", "--input", path, "--model", "random:tiny", "--output", tmp_path / "store", "--workers", 1]
    real = shard_work.process_shard

    def while_it_grows(task: Any) -> Any:
        with path.open("a", encoding="utf-8") as file:
            file.write("\nMais uma linha.")
        return real(task)

    with monkeypatch.context() as patch:
        patch.setattr("cartilha.preparation.enough.process_shard", while_it_grows)
        sentence = refused(*prepare, "--on_error", "skip")
    assert "cresce.txt changed while it was read" in sentence and "same command" in sentence
    assert [item.name for item in tmp_path.iterdir()] == ["cresce.txt"]
    assert cartilha(*prepare).code == 0 and len(texts_of(tmp_path / "store")) == len(set(PRIMER)) + 1


class Hub(types.ModuleType):
    """`datasets` with one dataset of two data files; the second breaks off when it is read for the second time."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.read: Counter[int] = Counter()

    def load_dataset_builder(self, *_: Any, **__: Any) -> Any:
        hub = self

        class Dataset:
            num_shards = 2

            def shard(self, num_shards: int, index: int) -> Iterator[dict[str, str]]:
                hub.read[index] += 1
                for row, text in enumerate(PRIMER[40 * index : 40 * index + 40]):
                    if index == 1 and hub.read[1] == 2 and row == 3:
                        raise ValueError("the file is damaged")  # trying again would not help
                    yield {"text": text}

        return types.SimpleNamespace(hash="c0ffee", as_streaming_dataset=lambda split: Dataset())


def test_a_hub_that_stops_half_way_and_the_same_command_afterwards(refused: Refused, cartilha, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    prepare = ["prepare", "--input", "hf:org/nome", "--model", "random:tiny", "--output", tmp_path / "store"]
    prepare += ["--workers", 1]
    sentence = refused(*prepare)
    assert "hf:org/nome" in sentence and "after row 2:3" in sentence and "is damaged" in sentence
    assert "same command" in sentence and not (tmp_path / "store").exists()
    assert hub.read == {0: 2, 1: 2}  # the tokenizer's proof reads the beginning of the input, too
    assert cartilha(*prepare).code == 0
    assert texts_of(tmp_path / "store") == set(PRIMER[:80])
    assert hub.read == {0: 3, 1: 4}  # a look at both, and the work on the second


# Cleaning


def test_every_rejected_document_is_written_once_with_its_reason(cartilha, refused: Refused, tmp_path, monkeypatch):
    pytest.importorskip("py3langid", reason="needs the extra text")
    english = "This is a text in another language, and it goes on for long enough that nobody could call it short. " * 4
    bad = {
        "curto": "short",
        english: "language:en",
        "a mesma linha de novo, outra vez, sempre. " * 30: "repeated_ngrams",
    }
    documents = [text for pair in zip(PRIMER, [*bad, *[None] * len(PRIMER)], strict=False) for text in pair if text]
    path, rejects = tmp_path / "textos.txt", tmp_path / "fora.jsonl"
    path.write_text("\n".join([*documents, "curto"]), encoding="utf-8")
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    prepare = ["prepare", "--input", path, "--model", "random:tiny", "--output", tmp_path / "store", "--workers", 1]
    prepare += ["--clean", "web"]
    assert "in a folder that is there" in refused(*prepare, "--rejects", tmp_path / "nada" / "fora.jsonl")
    read = tmp_path / "outros.jsonl"
    read.write_text('{"text": "um"}', encoding="utf-8")
    for name in (read, path):  # a text that is read, and a file of another kind
        before = name.read_bytes()
        assert name.name in refused(*prepare, "--validation_input", read, "--rejects", name)
        assert name.read_bytes() == before
    outcome = cartilha(*prepare, "--rejects", rejects, "--json")
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    assert [(row["text"].strip(), row["reason"]) for row in rows] == [
        *((text.strip(), reason) for text, reason in bad.items()),
        ("curto", "short"),
    ]
    numbers = {text: n for n, text in enumerate(documents, 1)}
    assert [row["id"] for row in rows][:3] == [f"textos.txt:{numbers[text]}" for text in bad]
    dropped = json.loads(outcome.out)["dropped"]
    assert {reason: dropped[reason] for reason in set(bad.values())} == Counter(row["reason"] for row in rows)
    assert texts_of(tmp_path / "store").isdisjoint(bad)
    rejects.unlink()
    assert "is not written" in cartilha(*prepare, "--rejects", rejects).err and not rejects.exists()


def test_cleaning_that_leaves_nothing_is_named(refused: Refused, tmp_path):
    (tmp_path / "curtos.txt").write_text("um\ndois\ntrês\n", encoding="utf-8")
    prepare = ["prepare", "--input", tmp_path / "curtos.txt", "--model", "random:tiny", "--output", tmp_path / "store"]
    assert "left out all 3 documents (3 short)" in refused(*prepare, "--clean", "short")


def test_weights_are_what_training_sees_and_are_drawn_the_same_way_again(
    cartilha, refused: Refused, tmp_path, monkeypatch
):
    portuguese, english = tmp_path / "pt.txt", tmp_path / "en.txt"
    portuguese.write_text("\n".join(f"{text} {n}" for n in range(8) for text in PRIMER), encoding="utf-8")
    english.write_text(
        "\n".join(f"An English line, number {n}, of some length." * 5 for n in range(2500)), encoding="utf-8"
    )
    base = ["prepare", "--input", portuguese, english, "--model", "random:tiny", "--workers", 1]
    prepare = [*base, "--weights", "0.95", "0.05"]
    monkeypatch.setattr(module, "SHARD_BYTES", 200_000)
    assert cartilha(*prepare, "--output", tmp_path / "one").code == 0
    train = pq.read_table(tmp_path / "one" / "train.documents.parquet", columns=["source", "num_tokens"])
    tokens = Counter[str]()
    for source, number in zip(train["source"].to_pylist(), train["num_tokens"].to_pylist(), strict=True):
        tokens[source] += number
    assert tokens["en.txt"] / tokens.total() == pytest.approx(0.05, abs=0.01)
    real, done = shard_work.process_shard, list[int]()

    def twice(task: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.shard.number)
        return real(task)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cartilha.preparation.enough.process_shard", twice)
        module.prepare(
            module.PrepareConfig(
                input=(str(portuguese), str(english)),
                model="random:tiny",
                output=str(tmp_path / "two"),
                workers=1,
                weights=("0.95", "0.05"),
            )
        )
    outcome = cartilha(*prepare, "--output", tmp_path / "two")
    assert "Going on" in outcome.err
    for name in ("train.tokens", "validation.tokens", "train.documents.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "another weights" in refused(*base, "--weights", "0.9", "0.1", "--output", tmp_path / "two")
    limited = refused(*prepare, "--limit_documents", 100, "--output", tmp_path / "three")
    assert "--limit_documents" in limited and "--shuffle" in limited
