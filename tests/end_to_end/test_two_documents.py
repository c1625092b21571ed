"""Corpora of a handful of documents: both sides of the split get one, and a single document is refused."""

from __future__ import annotations

import json

import pytest

from cartilha.corpus.document import Document
from cartilha.corpus.splits import choose_split
from cartilha.tokens.store import TokenStore


def write(path, *texts):
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("num_documents", [2, 3])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_both_sides_get_a_document_whatever_the_fraction(cartilha, tmp_path, num_documents, fraction):
    texts = [f"Documento {number} da fazenda." for number in range(num_documents)]
    path = write(tmp_path / "a.txt", *texts)
    options = ["--model", "random:tiny", "--output", tmp_path / "store", "--validation_fraction", fraction]
    outcome = cartilha("prepare", "--input", path, *options, "--json")
    assert outcome.code == 0
    splits = json.loads(outcome.out)["splits"]
    assert all(splits[side]["num_documents"] >= 1 for side in ("train", "validation"))
    assert sum(splits[side]["num_documents"] for side in splits) == num_documents
    store = TokenStore(tmp_path / "store")
    kept = [document.text for document in store.read_documents("validation")]
    assert set(kept) < set(texts)
    # A fraction that had to be changed is said, and recorded; the one that was asked for stays the store's setting.
    asked_for_works = 0 < sum(choose_split(hash_of(text), fraction, 0) == "validation" for text in texts) < len(texts)
    assert ("is used instead" in outcome.err) is not asked_for_works
    assert (store.info["fraction_used"] == fraction) is asked_for_works
    assert store.info["settings"]["validation_fraction"] == fraction
    assert "it was ready" in cartilha("prepare", "--input", path, *options).out


def hash_of(text):
    return Document(text, "", "", "").text_hash


@pytest.mark.parametrize("num_documents", [2, 3])
def test_a_tiny_corpus_can_be_trained_and_evaluated_on(cartilha, tmp_path, num_documents):
    path = write(tmp_path / "a.txt", *(f"Documento {number} da fazenda." for number in range(num_documents)))
    assert cartilha("prepare", "--input", path, "--model", "random:tiny", "--output", tmp_path / "store").code == 0
    train = ["train", "--model", "random:tiny", "--store", tmp_path / "store", "--output", tmp_path / "run"]
    outcome = cartilha(*train, "--block_size", 64, "--batch_tokens", 128, "--epochs", 2, "--dtype", "float32", "--json")
    assert outcome.code == 0, outcome.err
    results = json.loads(outcome.out)
    assert results["status"] == "finished" and len(results["epochs"]) == 2
    assert results["evaluations"][-1]["loss"] < results["evaluations"][0]["loss"]
    model = tmp_path / "run" / "model"
    assert cartilha("evaluate", "--model", model, "--store", tmp_path / "store", "--dtype", "float32").code == 0


def test_duplicates_count_once_so_that_one_distinct_document_is_refused(cartilha, refused, tmp_path):
    path = write(tmp_path / "a.txt", *["O mesmo texto."] * 5)
    options = ["--input", path, "--model", "random:tiny", "--output", tmp_path / "store"]
    assert "single document" in refused("prepare", *options)
    assert not (tmp_path / "store").exists()
    write(path, *["O mesmo texto."] * 5, "Outro.")  # one more distinct text, and it works
    outcome = cartilha("prepare", *options, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["dropped"] == {"exact_duplicates": 4, "empty": 0}
