"""Checkpoints: restored to the bit, damage found and named, old ones removed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cartilha.errors import UserError
from cartilha.model.load import load_model
from cartilha.training.checkpoint import (
    FILES,
    TrainingState,
    check_settings,
    list_checkpoints,
    load_checkpoint,
    newest_sound_checkpoint,
    read_settings,
    save_checkpoint,
)
from cartilha.training.loop import Progress
from cartilha.training.optimizer import make_optimizer


def fresh_state(seed: int) -> TrainingState:
    model = load_model("random:tiny", torch.device("cpu"), seed=seed).model
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainingState(model, make_optimizer(model, 1e-2, 0.1), scaler, Progress())


def take_step(state: TrainingState) -> None:
    """A step with gradients drawn from torch's generator, as dropout would draw from it."""
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    state.progress.step += 1
    state.progress.tokens += 7
    state.progress.epoch_nll += 0.1


def weights(state: TrainingState) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}


def moments(state: TrainingState) -> list[torch.Tensor]:
    return [
        state.optimizer.state[parameter][key].clone()
        for parameter in state.model.parameters()
        for key in ("exp_avg", "exp_avg_sq", "step")
    ]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("cartilha")  # it may not hand its lines on to pytest's handler at the root
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("run")
    state = fresh_state(0)
    for _ in range(2):
        take_step(state)
        save_checkpoint(run, state, {"lr": 1e-2, "dtype": "float32"})
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_restored_run_goes_on_to_the_bit(tmp_path):
    torch.manual_seed(5)
    state = fresh_state(0)
    for _ in range(3):
        take_step(state)
    path = save_checkpoint(tmp_path, state, {})
    at_save = weights(state), moments(state)
    take_step(state)  # draws from the generator: the restored run must draw the same
    restored = fresh_state(1)
    assert not same(weights(restored), at_save[0]), "equal before it is loaded: proves nothing"
    torch.manual_seed(99)
    load_checkpoint(path, restored)
    assert same(weights(restored), at_save[0])
    assert all(torch.equal(a, b) for a, b in zip(moments(restored), at_save[1], strict=True))
    assert (restored.progress.step, restored.progress.tokens) == (3, 21)
    take_step(restored)
    assert same(weights(restored), weights(state))
    assert restored.progress == state.progress


def test_tied_weights_are_saved_once_and_stay_tied(run):
    restored = fresh_state(1)
    load_checkpoint(run / "checkpoints" / "step-00000002", restored)
    model = restored.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_newest_is_taken_and_its_settings_are_read(run):
    newest = newest_sound_checkpoint(run)
    assert newest is not None and newest.name == "step-00000002"
    assert read_settings(newest) == {"lr": 1e-2, "dtype": "float32"}
    assert newest_sound_checkpoint(run / "nothing here") is None


def flip_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_byte, truncate, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_passed_over_for_the_older_one(run, warnings, damage, name):
    damage(run / "checkpoints" / "step-00000002" / name)
    newest = newest_sound_checkpoint(run)
    assert newest is not None and newest.name == "step-00000001"
    assert "step-00000002 is damaged" in warnings.text and name in warnings.text


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"state.json": 3}', None])
def test_a_damaged_manifest_is_damage_too(run, warnings, manifest):
    file = run / "checkpoints" / "step-00000002" / "manifest.json"
    file.unlink() if manifest is None else file.write_text(manifest)
    newest = newest_sound_checkpoint(run)
    assert newest is not None and newest.name == "step-00000001"
    assert "step-00000002 is damaged" in warnings.text


def test_where_all_are_damaged_there_is_none(run, warnings):
    for path in list_checkpoints(run):
        flip_byte(path / "model.safetensors")
    assert newest_sound_checkpoint(run) is None
    assert "step-00000001" in warnings.text and "step-00000002" in warnings.text


def test_an_unfinished_checkpoint_is_not_seen(run):
    (run / "checkpoints" / ".step-00000003.77.tmp").mkdir()
    assert [path.name for path in list_checkpoints(run)] == ["step-00000001", "step-00000002"]


def test_the_two_newest_are_kept(tmp_path):
    state = fresh_state(0)
    for _ in range(4):
        take_step(state)
        save_checkpoint(tmp_path, state, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_run_that_begins_anew_keeps_its_checkpoints_and_not_the_damaged_later_ones(run):
    for path in list_checkpoints(run):
        path.rename(path.with_name("step-0000009" + path.name[-1]))
    state = fresh_state(0)
    take_step(state)
    path = save_checkpoint(run, state, {})
    assert newest_sound_checkpoint(run) == path
    assert list_checkpoints(run) == [path]


def test_other_settings_are_refused_by_name():
    recorded = {"lr": 1e-3, "seed": 0, "block_size": 64}
    check_settings(recorded, dict(recorded), Path("run"))
    with pytest.raises(UserError, match=r"lr was 0\.001, now 0\.01; seed was 0, now 1") as caught:
        check_settings(recorded, {**recorded, "lr": 1e-2, "seed": 1}, Path("run"))
    assert "block_size" not in str(caught.value)


def test_state_is_plain_json_without_nan(run):
    text = (run / "checkpoints" / "step-00000002" / "state.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["progress"]["step"] == 2
