"""`check` from the command line, and the cheap checks before a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cartilha.corpus.document import Document
from cartilha.pipeline import check as check_module
from cartilha.tokens.store_writer import writing_store
from cartilha.tokens.tokenizer import load_tokenizer
from stores import add_documents

KEYS = {"name", "outcome", "measured", "expected", "meaning", "remedy", "figures", "seconds"}
TRAIN = [
    "--model",
    "random:tiny",
    "--block_size",
    64,
    "--batch_tokens",
    128,
    "--max_steps",
    1,
    "--validation_tokens",
    100,
]


@pytest.fixture()
def leaky(tmp_path) -> Path:
    """A store made by hand, with one document on both sides."""
    texts = [
        f"O barco número {i} saiu cedo, com {i + 2} pessoas, e voltou à noite com a rede cheia." for i in range(30)
    ]
    documents = [Document(text, str(i), "mão", "mão") for i, text in enumerate(texts)]
    with writing_store(tmp_path / "leaky", load_tokenizer("random:tiny"), replace=False) as writer:
        for side, chosen in (("validation", documents[:6]), ("train", documents[5:])):
            add_documents(writer, side, chosen)
        writer.finish({"inputs": [], "settings": {}, "dropped": {}})
    return tmp_path / "leaky"


def test_a_sound_set_up(cartilha, store):
    outcome = cartilha("check", "--model", "random:tiny", "--store", store, "--quick", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert {row["outcome"] for row in found["checks"]} <= {"passed", "not applicable"} and found["num_failed"] == 0
    assert len(found["checks"]) == len(check_module.CHECKS) and all(row.keys() == KEYS for row in found["checks"])


def test_a_failed_check_is_explained_and_exits_with_3(cartilha, leaky, monkeypatch):
    monkeypatch.setattr(check_module, "CHECKS", check_module.CHEAP_CHECKS)
    outcome = cartilha("check", "--model", "random:tiny", "--store", leaky, "--quick")
    assert outcome.code == 3
    assert "FAILED" in outcome.out and "1 of 6 held-out documents in training" in " ".join(outcome.out.split())
    assert "What to do: Prepare the store anew" in outcome.out


def test_training_stops_before_step_1_and_leaves_nothing(cartilha, leaky, tmp_path):
    run = tmp_path / "run"
    outcome = cartilha("train", "--store", leaky, "--output", run, *TRAIN)
    assert outcome.code == 3 and "Traceback" not in outcome.err
    sentence = outcome.err.splitlines()[-1]
    assert "'leak' failed" in sentence and "1 of 6" in sentence and "--skip_checks" in sentence
    assert not run.exists()
    told = cartilha("train", "--store", leaky, "--output", run, *TRAIN, "--skip_checks")
    assert told.code == 0, told.err
    assert "Checked before" not in told.err


def test_training_says_what_it_checked(cartilha, store, tmp_path):
    outcome = cartilha("train", "--store", store, "--output", tmp_path / "run", *TRAIN, "--dropout")
    assert outcome.code == 0, outcome.err
    assert "Checked before step 1: round trip, vocabulary, causality" in outcome.err


def test_bad_input(refused, store, monkeypatch):
    assert "cannot be reached" in refused("check", "--model", "nada/aqui")  # tests run without a hub
    assert "beyond the context" in refused("check", "--model", "random:tiny", "--store", store, "--block_size", 4096)
    assert "2 or more" in refused("check", "--model", "random:tiny", "--block_size", 1)
    assert "--lr" in refused("check", "--model", "random:tiny", "--lr", "muito")
    monkeypatch.setattr(check_module, "sample_documents", lambda *_: ([], []))
    assert "too few documents" in refused("check", "--model", "random:tiny", "--store", store)
