"""Training shared by processes, each with the whole model: the losses of one process, any number resuming."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import run_processes

from cartilha.cli import main
from cartilha.config import PrepareConfig
from cartilha.pipeline.prepare import prepare

SETTINGS = ["--model", "random:tiny-opt", "--block_size", 32, "--batch_tokens", 160, "--lr", 3e-3, "--dtype", "float32"]


RunTwo = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_two(tmp_path: Path) -> RunTwo:
    """Call the command line in two processes, whose outputs come together."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        found = run_processes(2, tmp_path / "streams", *arguments)
        codes = [code for code in found.codes if code]
        return subprocess.CompletedProcess(arguments, codes[0] if codes else 0, *map("".join, (found.outs, found.errs)))

    return call


def lines(run_path: Path) -> list[dict[str, Any]]:
    text = (run_path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def losses(run_path: Path) -> list[float]:
    return [line["loss"] for line in lines(run_path) if "loss" in line]


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one process; the steps have five blocks, which no two processes share evenly."""
    path = tmp_path_factory.mktemp("alone") / "run"
    assert main([str(part) for part in ("train", *SETTINGS, "--store", store, "--output", path, "--max_steps", 6)]) == 0
    return path


def test_two_processes_train_as_one_and_one_of_them_writes(run_two, store, alone, tmp_path):
    path = tmp_path / "run"
    settings = [*SETTINGS, "--store", store, "--output", path, "--max_steps", 6]
    found = run_two("train", *settings, "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["settings"]["num_processes"] == 2  # one JSON object
    assert losses(path) == pytest.approx(losses(alone), abs=1e-5)
    assert len(losses(path)) == 6
    norms = [[line["grad_norm"] for line in lines(place) if "loss" in line] for place in (path, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    together, single = (json.loads((place / "results.json").read_text("utf-8")) for place in (path, alone))
    assert together["tokens"] == single["tokens"]
    for one, two in zip(single["evaluations"], together["evaluations"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["num_tokens"] == one["num_tokens"]
    assert {file.name for file in path.iterdir()} == {file.name for file in alone.iterdir()}
    # One of them speaks: each of these lines comes once.
    for line in (
        "Replicated: each of 2 processes holds the whole model",
        "An epoch is",
        "Validation before training: perplexity",
    ):
        assert found.stderr.count(line) == 1, found.stderr
    again = run_two("train", *settings, "--resume", "auto")
    assert again.returncode == 0 and again.stderr.count("nothing to do") == 1


def test_a_run_goes_on_with_another_number_of_processes(run_two, cartilha, store, corpus, tmp_path):
    """Two processes begin, one goes on: the same blocks of two stores in the same order, and so the same losses."""
    path, alone, other = tmp_path / "run", tmp_path / "alone", tmp_path / "other"
    texts = corpus.read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.txt").write_text("".join(f"{line} {line[::-1]}\n" for line in texts), encoding="utf-8")
    prepare(PrepareConfig(input=(str(tmp_path / "other.txt"),), model="random:tiny", output=str(other)))
    mixed = [*SETTINGS, "--store", store, "--mix", f"{other}=0.4", "--max_steps", 6, "--skip_checks"]
    settings = [*mixed, "--output", path, "--checkpoint_steps", 3, "--keep_optimizer"]
    assert cartilha("train", *mixed, "--output", alone).code == 0
    assert run_two("train", *settings).returncode == 0
    # As if it had been killed in the fifth step.
    results = json.loads((path / "results.json").read_text("utf-8"))
    (path / "results.json").write_text(json.dumps({**results, "status": "running"}), encoding="utf-8")
    last = sorted((path / "checkpoints").iterdir())[-1]
    assert last.name == "step-00000006"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    found = cartilha("train", *settings, "--resume", "auto")
    assert found.code == 0 and "Going on from step 3" in found.err
    assert losses(path) == pytest.approx(losses(alone), abs=1e-5)
    read = [json.loads((place / "results.json").read_text("utf-8"))["sources"] for place in (path, alone)]
    assert read[0] == read[1] and read[0][1]["documents_read"] > 1


def test_a_users_mistake_in_several_processes_ends_all_of_them(run_two, store, tmp_path):
    found = run_two("train", *SETTINGS, "--store", store, "--output", tmp_path / "run", "--block_size", 4096)
    assert found.returncode != 0
    assert "beyond the context" in found.stderr or "must be a multiple" in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["prepare", "run", "demo"])
def test_what_writes_a_store_is_refused_in_several_processes(cartilha, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = cartilha(command)
    assert outcome.code == 2 and f"{command} works in one process" in outcome.err


def test_more_processes_than_blocks_are_named_in_a_sentence_and_one_that_is_lost_ends_all(cartilha, store, tmp_path):
    path = tmp_path / "run"
    settings = [*SETTINGS, "--batch_tokens", 64, "--store", store, "--output", path, "--max_steps", 4, "--skip_english"]
    found = run_processes(3, tmp_path, "train", *settings, "--checkpoint_steps", 1, "--skip_checks", lost=(2, 3))
    assert found.codes == [75, 75, -9], found.errs
    assert found.errs[0].count("3 processes share steps of 2 blocks, so that some have nothing to do") == 1
    assert found.errs[1].count("Another of the 3 processes has ended") == 1 and "Traceback" not in "".join(found.errs)
    assert cartilha("train", *settings, "--resume", "auto").code == 0
