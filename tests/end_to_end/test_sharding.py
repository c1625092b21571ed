"""Sharded models: the losses of one process, checkpoints that any number of processes goes on from, lost processes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Outcome, run_processes
from runs import Left, start

from cartilha.training.checkpoint import drop_optimizer_states, list_checkpoints, newest_sound_checkpoint
from cartilha.training.checkpoint_shards import check_shards

SETTINGS = {
    "block_size": 32,
    "batch_tokens": 160,
    "epochs": 1,
    "max_steps": 6,
    "checkpoint_steps": 2,
    "seed": 3,
    "keep_last": 3,
}
QUICK = ("--skip_english", "--skip_checks")


def flags(store: Path, output: Path, **changes: Any) -> list[object]:
    values = {"model": "random:tiny", "dtype": "float32", "lr": 3e-3, "store": store, "output": output, **SETTINGS}
    values |= changes
    words = [part for name, value in values.items() for part in (f"--{name}", value)]
    return ["train", *words]


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Six steps in one process; each has five blocks, which no two processes share evenly."""
    path = tmp_path_factory.mktemp("alone") / "run"
    start(store, path, **SETTINGS)
    return Left(path)


@pytest.fixture(scope="module")
def two(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Left, Outcome]:
    path = tmp_path_factory.mktemp("two") / "run"
    outcome = run_processes(2, path.parent, *flags(store, path, shard="full"), "--keep_optimizer")
    return Left(path), outcome


def test_two_sharded_processes_train_as_one(two, alone):
    run, outcome = two
    assert outcome.codes == [0, 0], outcome.errs
    assert run.losses == pytest.approx(alone.losses, abs=1e-5)

    norms = [[line["grad_norm"] for line in left.steps] for left in (run, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for one, other in zip(run.results["evaluations"], alone.results["evaluations"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert run.results["english"]["after"]["bits_per_byte"] < run.results["english"]["before"]["bits_per_byte"]
    assert run.results["comparison"]["steps"] == [0, 6]
    assert {row["step"] for row in run.lines("samples.jsonl")} == {0, 6}
    # The whole model is there at the end, as that of one process.
    weights, expected = run.weights, alone.weights
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in weights)
    assert (run.path / "model" / "config.json").read_bytes() == (alone.path / "model" / "config.json").read_bytes()


def copied(run: Left, path: Path, keep: int) -> Path:
    """A run as if it had been killed after that step."""
    shutil.copytree(run.path, path)
    (path / "results.json").write_text(json.dumps({**run.results, "status": "running"}), encoding="utf-8")
    for checkpoint in list_checkpoints(path):
        if int(checkpoint.name[5:]) > keep:
            shutil.rmtree(checkpoint)
    return path


def test_one_process_goes_on_from_what_two_wrote(cartilha, two, alone, store, tmp_path):
    path = copied(two[0], tmp_path / "run", keep=4)
    found = cartilha(*flags(store, path, shard="full"), "--resume", "auto", "--skip_english")
    assert found.code == 0 and "Going on from step 4" in found.err
    assert "There is one process, which holds the whole model" in found.err
    assert Left(path).losses == pytest.approx(alone.losses, abs=1e-5)


def test_four_sharded_processes_go_on_from_what_one_wrote(store, alone, tmp_path):
    path = tmp_path / "run"
    start(store, path, **SETTINGS, keep_optimizer=True)
    copied(Left(path), tmp_path / "killed", keep=4)
    found = run_processes(4, tmp_path, *flags(store, tmp_path / "killed", shard="full"), "--resume", "auto", *QUICK)
    assert found.codes == [0] * 4, found.errs
    assert "Going on from step 4" in found.errs[0]
    assert Left(tmp_path / "killed").losses == pytest.approx(alone.losses, abs=1e-5)


def test_a_lost_process_ends_the_others_in_a_sentence_and_the_run_goes_on(cartilha, store, alone, tmp_path):
    path = tmp_path / "run"
    found = run_processes(2, tmp_path, *flags(store, path, shard="full"), *QUICK, lost=(1, 4))
    assert found.codes == [75, -signal.SIGKILL], found.errs
    assert "Traceback" not in found.errs[0]
    last = found.errs[0].splitlines()[-1]
    assert last.startswith("cartilha: Another of the 2 processes has ended") and "from step-00000002" in last
    assert Left(path).results["status"] == "interrupted"
    assert cartilha(*flags(store, path), "--resume", "auto", "--skip_english").code == 0
    assert Left(path).losses == pytest.approx(alone.losses, abs=1e-5)


def test_a_part_of_a_checkpoint_that_is_lost_or_damaged_is_noticed(two, tmp_path, caplog):
    path = copied(two[0], tmp_path / "run", keep=4)
    newest, older = (path / "checkpoints" / name for name in ("step-00000004", "step-00000002"))
    (newest / "shard-00002-model-00001-of-00002.safetensors").unlink()
    assert newest_sound_checkpoint(path) == older
    damaged = older / "shard-00001-model-00002-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert newest_sound_checkpoint(path) is None
    shapes = {name: tuple(value.shape) for name, value in two[0].weights.items()}
    with pytest.raises(ValueError, match=r"embed_tokens.weight is torch.float32 \[130, 64\], not float32 \[259"):
        check_shards(newest, shapes, of_states=False)


def test_the_states_of_a_finished_sharded_run_are_dropped(two, tmp_path):
    path = copied(two[0], tmp_path / "run", keep=6)
    drop_optimizer_states(path)
    assert newest_sound_checkpoint(path) == path / "checkpoints" / "step-00000006"
    assert not list(path.rglob("*model-00002-of-00002*"))


def test_what_cannot_be_sharded_is_refused(store, tmp_path):
    path = tmp_path / "run"
    found = run_processes(2, tmp_path, *flags(store, path, shard="full", optimizer="adafactor"))
    assert found.codes == [2, 2] and not path.exists()
    assert "cannot be sharded, since --optimizer adafactor works on whole weights; use --shard none" in found.errs[0]
