"""`train --decay_from`: a checkpoint of a run with a constant rate, taken further while the rate decays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import Left, start, terminate

from cartilha.errors import InterruptedRunError, UserError
from cartilha.training.checkpoint import drop_optimizer_states

TRUNK: dict[str, Any] = {
    "max_steps": 40,
    "schedule": "wsd",
    "checkpoint_steps": 16,
    "keep_last": 5,
    "keep_optimizer": True,
}


@pytest.fixture(scope="module")
def trunk(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    path = tmp_path_factory.mktemp("trunk") / "run"
    start(store, path, **TRUNK)
    return Left(path)


def decayed(trunk: Left, store: Path, output: Path, **changes: Any) -> Left:
    start(store, output, decay_from=str(trunk.path / "checkpoints" / "step-00000016"), **changes)
    return Left(output)


def test_the_copy_repeats_the_run_and_decays_from_its_checkpoint(trunk, store, tmp_path):
    run = decayed(trunk, store, tmp_path / "run")
    rates = [line["lr"] for line in run.steps]
    assert run.losses[:16] == trunk.losses[:16] and len(rates) == run.results["steps"] == 20
    peak = run.results["settings"]["lr"]
    assert rates[15] == peak and rates[16:] == pytest.approx(
        [peak * (1 - 0.9 * n / 4) for n in range(1, 5)], abs=0.05 * peak
    )
    assert rates[-1] == pytest.approx(0.1 * peak)
    # The first step after the checkpoint reads the text that the run read there; then rates differ, and so do losses.
    assert run.losses[16] == trunk.losses[16] and run.losses[18:] != trunk.losses[18:20]
    assert run.results["name"] == "run" and run.results["status"] == "finished" and trunk.results["steps"] == 40
    assert run.results["settings"]["schedule"] == "wsd" and run.results["resumed_from_step"] == [16]


def test_stopped_and_resumed_it_is_the_same(trunk, store, tmp_path, during_step):
    whole = decayed(trunk, store, tmp_path / "whole" / "run")
    during_step({2: terminate})
    with pytest.raises(InterruptedRunError):
        decayed(trunk, store, tmp_path / "run")
    run = decayed(trunk, store, tmp_path / "run", resume="auto")
    assert run.losses == whole.losses and run.results["resumed_from_step"] == [16, 18]
    finished = decayed(trunk, store, tmp_path / "run", resume="auto")
    assert finished.results["resumed_from_step"] == [16, 18]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 50}, "leave out --max_steps"),
        ({"time_budget": "5m"}, "leave out --time_budget"),
        ({"decay_from": "{run}"}, "is not a checkpoint"),
        ({"decay_from": "{run}/checkpoints/step-00000040"}, "not at its peak at step 40"),
        ({"batch_tokens": 64}, "batch_tokens was 128, now 64"),
    ],
)
def test_what_cannot_be_decayed_from_is_refused(trunk, store, tmp_path, changes, message):
    changes = {
        name: str(value).format(run=trunk.path) if name == "decay_from" else value for name, value in changes.items()
    }
    asked = {"decay_from": str(trunk.path / "checkpoints" / "step-00000016"), **changes}
    with pytest.raises(UserError, match=message):
        start(store, tmp_path / "run", **asked)


def test_a_finished_run_without_its_optimizer_states_is_named_and_nothing_is_begun(trunk, store, tmp_path):
    shutil.copytree(trunk.path, tmp_path / "run")
    drop_optimizer_states(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000016"
    with pytest.raises(UserError, match="step-00000016 has no optimizer states"):
        start(store, tmp_path / "decayed", decay_from=str(checkpoint))
    assert not (tmp_path / "decayed" / "checkpoints").exists()
