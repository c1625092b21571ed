"""`inspect`: the numbers are those of the documents, and what is shown is what the model will read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cartilha.config import PrepareConfig
from cartilha.explorer.walking import StoreWalk
from cartilha.pipeline.prepare import prepare
from cartilha.tokens.store import TokenStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Documents of 3 to 600 tokens (random:tiny has one a byte) of two domains."""
    folder = tmp_path_factory.mktemp("inspected")
    lengths = [3, 4, 5, 7, 8, 100, 300, 600]
    rows = [
        {"id": f"d{n}", "text": f"{n:03d} " * (n // 4) + "x" * (n % 4 - 1) + "e"[: n % 4], "genre": "ab"[n % 2]}
        for n in lengths
    ]
    path = folder / "linhas.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare(
        PrepareConfig(input=(str(path),), model="random:tiny", output=str(folder / "store"), validation_documents=2)
    )
    return TokenStore(folder / "store")


def looked(cartilha, *arguments: object) -> dict:
    outcome = cartilha("inspect", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_the_numbers(cartilha, store):
    summary = looked(cartilha, store.path)["summary"]
    lengths = [int(n) for split in ("train", "validation") for n in store.documents(split).num_tokens]
    assert sum(row["documents"] for row in summary["lengths"]) == len(lengths) == 8
    for row in summary["lengths"]:
        inside = [n for n in lengths if row["from_tokens"] <= n <= row["to_tokens"]]
        assert (row["documents"], row["tokens"]) == (len(inside), sum(inside))
    for cut, share in summary["kept_by_truncation"].items():
        assert share == pytest.approx(sum(min(n, int(cut)) for n in lengths) / sum(lengths))
    assert summary["kept_by_truncation"]["256"] < summary["kept_by_truncation"]["512"] < 1
    assert {row["domain"] for row in summary["domains"]} == {"a", "b"}
    assert sum(row["num_tokens"] for row in summary["domains"]) == sum(lengths)
    assert sum(row["num_validation_documents"] for row in summary["domains"]) == 2
    words = sum(int(store.documents(split).num_words.sum()) for split in ("train", "validation"))
    assert summary["tokens_per_word"] == pytest.approx(sum(lengths) / words)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_document_by_its_number_and_by_its_id(cartilha, store, split):
    documents = list(store.read_documents(split))
    for number, document in enumerate(documents, 1):
        shown = looked(cartilha, store.path, "--document", document.id)["document"]
        assert shown["text"] == document.text and (shown["split"], shown["number"]) == (split, number)
        assert len(shown["tokens"]) == shown["num_tokens"] == len(document.text.encode("utf-8"))
        by_number = looked(cartilha, store.path, "--document", number, "--split", split)["document"]
        assert by_number == shown


@pytest.mark.parametrize("block_size", [8, 64])
def test_every_block_shows_the_documents_in_it(cartilha, store, block_size):
    texts = {document.id: document.text for document in store.read_documents("train")}
    pieces: dict[str, str] = dict.fromkeys(texts, "")
    walk = StoreWalk(store)
    num_blocks = looked(cartilha, store.path, "--block", 1, "--block_size", block_size)["block"]["num_blocks"]
    numbers = {document.id: number for number, document in enumerate(store.read_documents("train"), 1)}
    for number in range(1, num_blocks + 1):
        block = looked(cartilha, store.path, "--block", number, "--block_size", block_size)["block"]
        assert sum(row.get("num_inputs", 0) + row.get("padding", 0) for row in block["segments"]) == block_size
        assert block["block"] == number
        shown = walk.block(number - 1, block_size).segments
        for row, segment in zip(block["segments"], shown, strict=True):
            if "padding" in row:
                assert number == num_blocks and segment.tokens[0].kind == "padding"
                continue
            assert row["document"] == numbers[row["doc_id"]]
            assert row["text"].startswith("<s>") == row["from_the_beginning"] == segment.begins
            assert row["from_the_beginning"] == (pieces[row["doc_id"]] == "")
            pieces[row["doc_id"]] += row["text"]
            last = number == num_blocks and row is [r for r in block["segments"] if "text" in r][-1]
            ends = pieces[row["doc_id"]] == f"<s>{texts[row['doc_id']]}" + ("" if last else "</s>")
            assert row["to_the_end"] == segment.ends == ends
    assert {name: piece.removesuffix("</s>") for name, piece in pieces.items()} == {
        name: f"<s>{text}" for name, text in texts.items()
    }


def test_a_person_reads_it(cartilha, store):
    assert "truncated" in cartilha("inspect", store.path).out
    document = next(store.read_documents("train"))
    assert f"Tokens: {document.text[0]}|{document.text[1]}|" in cartilha("inspect", store.path, "--document", 1).out
    assert "begins here" in cartilha("inspect", store.path, "--block", 1).out


def test_what_is_not_there_is_said(refused, store):
    assert "no document 'x'" in refused("inspect", store.path, "--document", "x")
    for number in (0, 7):
        assert "a number from 1 to 6" in refused("inspect", store.path, "--document", number)
    for number in (0, 99):
        assert f"--block {number} is not from 1 to " in refused("inspect", store.path, "--block", number)
    assert "block_size" in refused("inspect", store.path, "--block", 1, "--block_size", 0)
    assert "primer" in refused("inspect", "primer", "--block", 1)


def test_a_folder_is_refused(refused, tmp_path: Path):
    assert "is not a store" in refused("inspect", tmp_path)
