"""Checkpoints: restored to the bit, damage found and named, old ones removed."""

from __future__ import annotations

import errno
import json
import logging
import math
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cartilha.errors import UserError
from cartilha.model.load import load_model
from cartilha.storage import file_sha256, write_sealed_json
from cartilha.training.checkpoint import (
    FILES,
    check_settings,
    freeze,
    list_checkpoints,
    load_checkpoint,
    newest_sound_checkpoint,
    read_settings,
    space_needed,
    write_checkpoint,
)
from cartilha.training.checkpoint_checks import check_scaler
from cartilha.training.optimizer import StateSize
from cartilha.training.state import Progress, TrainingState
from cartilha.training.update_rules import OPTIMIZERS


def fresh_state(seed: int, optimizer: str = "adamw") -> TrainingState:
    model = load_model("random:tiny", torch.device("cpu"), seed=seed).model
    return TrainingState.begin(model, torch.float32, lr=1e-2, weight_decay=0.1, optimizer=optimizer)


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
        tensor.clone() for parameter in state.model.parameters() for tensor in state.optimizer.state[parameter].values()
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
        write_checkpoint(run, freeze(state, {"lr": 1e-2, "dtype": "float32"}))
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_run_goes_on_to_the_bit(tmp_path, optimizer):
    torch.manual_seed(5)
    state = fresh_state(0, optimizer)
    for _ in range(3):
        take_step(state)
    path = write_checkpoint(tmp_path, freeze(state, {}))
    at_save = weights(state), moments(state)
    take_step(state)  # draws from the generator: the restored run must draw the same
    restored = fresh_state(1, optimizer)
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


def of_the_first_version(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(manifest["files"]), encoding="utf-8")


def of_a_later_version(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    del manifest["sha256"]
    write_sealed_json(path / "manifest.json", {**manifest, "format_version": 2})


@pytest.mark.parametrize("rewrite", [of_the_first_version, of_a_later_version])
def test_another_versions_checkpoints_are_no_damage_and_no_run_begins_over_them(run, warnings, rewrite):
    first, second = list_checkpoints(run)
    rewrite(second)
    assert newest_sound_checkpoint(run) == first and "damaged" not in warnings.text
    flip_byte(first / "model.safetensors")
    with pytest.raises(UserError, match=r"written by another version of cartilha: step-00000002 \("):
        newest_sound_checkpoint(run)
    assert list_checkpoints(run) == [first, second]


def test_an_unfinished_checkpoint_is_not_seen(run):
    (run / "checkpoints" / ".step-00000003.77.tmp").mkdir()
    assert [path.name for path in list_checkpoints(run)] == ["step-00000001", "step-00000002"]


def test_the_two_newest_are_kept(tmp_path):
    state = fresh_state(0)
    for _ in range(4):
        take_step(state)
        write_checkpoint(tmp_path, freeze(state, {}))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_run_that_begins_anew_keeps_its_checkpoints_and_not_the_damaged_later_ones(run):
    for path in list_checkpoints(run):
        path.rename(path.with_name("step-0000009" + path.name[-1]))
    state = fresh_state(0)
    take_step(state)
    path = write_checkpoint(run, freeze(state, {}))
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


def test_the_best_is_kept_beside_the_newest(tmp_path):
    state = fresh_state(0)
    for step, loss in enumerate([None, 3.0, 2.0, None, 2.5, None, None, 2.0], 1):
        take_step(state)
        write_checkpoint(tmp_path, freeze(state, {}), loss, keep=2)
        kept = [int(path.name[5:]) for path in list_checkpoints(tmp_path)]
        expected = {1: [1], 2: [1, 2], 3: [2, 3], 4: [3, 4], 5: [3, 4, 5], 6: [3, 5, 6], 7: [3, 6, 7], 8: [7, 8]}
        assert kept == expected[step]  # of two equals the later one is the best


def test_a_copied_snapshot_does_not_change_with_the_state(tmp_path):
    state = fresh_state(0)
    take_step(state)
    copied, shared = freeze(state, {}, copy=True), freeze(state, {})
    before, states_before = weights(state), {name: tensor.clone() for name, tensor in copied.states.items()}
    take_step(state)
    assert same(copied.weights, before) and same(copied.states, states_before)
    assert not same(shared.weights, before), "nothing has changed: proves nothing"


def test_every_stream_of_random_numbers_is_restored(tmp_path):
    state = fresh_state(0)
    path = write_checkpoint(tmp_path, freeze(state, {}))

    def drawn() -> list[float]:
        return [
            random.random(),
            random.gauss(),
            float(np.random.rand()),
            float(np.random.randn()),
            float(torch.rand(())),
        ]

    expected = drawn()
    assert drawn() != expected
    load_checkpoint(path, state)
    assert drawn() == expected


# A checkpoint from somebody else: its hashes are right and its contents a trap


def reseal(path: Path) -> None:
    """Give the manifest the hashes of the files as they are now."""
    files = {n: {"size": (path / n).stat().st_size, "sha256": file_sha256(path / n)} for n in FILES}
    write_sealed_json(path / "manifest.json", {"format_version": 1, "validation_loss": None, "files": files})


def change_state(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((path / "state.json").read_text(encoding="utf-8"))
    change(values)
    (path / "state.json").write_text(json.dumps(values), encoding="utf-8")


def change_tensors(path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name)


def huge_header(path: Path) -> None:
    """A header that speaks of terabytes in a file of some bytes."""
    header = {"model.norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"0" * 64)


def endless_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


NORM = "model.norm.weight"
TRAPS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "huge header": (huge_header, "cannot be used"),
    "endless header": (endless_header, "cannot be used"),
    "pickle": (lambda p: torch.save({}, p / "model.safetensors"), "cannot be used"),
    "lacking weight": (lambda p: change_tensors(p, FILES[0], lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "other shape": (lambda p: change_tensors(p, FILES[0], lambda t: t.update({NORM: t[NORM][:9]})), r"F32 \[9\]"),
    "other type": (lambda p: change_tensors(p, FILES[0], lambda t: t.update({NORM: t[NORM].half()})), "is F16"),
    "lacking moment": (
        lambda p: change_tensors(p, FILES[1], lambda t: t.pop(f"{NORM}|exp_avg")),
        r"\|exp_avg is missing",
    ),
    "strange moment": (lambda p: change_tensors(p, FILES[1], lambda t: t.update(x=torch.zeros(1))), "x is unknown"),
    "short moment": (
        lambda p: change_tensors(p, FILES[1], lambda t: t.update({f"{NORM}|exp_avg": torch.zeros(3)})),
        r"F32 \[3\]",
    ),
    "negative step": (lambda p: change_state(p, lambda s: s["progress"].update(step=-1)), "step = -1"),
    "step of words": (lambda p: change_state(p, lambda s: s["progress"].update(step="1")), "step = '1'"),
    "endless loss": (lambda p: change_state(p, lambda s: s["progress"].update(epoch_nll=math.inf)), "epoch_nll = inf"),
    "giant step": (lambda p: change_state(p, lambda s: s["progress"].update(step=2**80)), "step = 12089258196146"),
    "more progress": (lambda p: change_state(p, lambda s: s["progress"].update(more=1)), "other fields"),
    "no progress": (lambda p: change_state(p, lambda s: s.pop("progress")), "progress"),
    "scaler": (lambda p: change_state(p, lambda s: s.update(scaler={"scale": 2.0})), "another dtype"),
    "short stream": (lambda p: change_state(p, lambda s: s["random"].update(torch="AAAA")), "cannot be used"),
    "no base64": (lambda p: change_state(p, lambda s: s["random"].update(torch="é")), "cannot be used"),
    "python's stream": (lambda p: change_state(p, lambda s: s["random"].update(python=[3, [1], None])), "cannot be"),
    "numpy's stream": (
        lambda p: change_state(p, lambda s: s["random"]["numpy"].__setitem__(1, [-1])),
        "cannot be used",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_one_sentence_and_changes_no_weight(run, trap):
    lay, named = TRAPS[trap]
    path = run / "checkpoints" / "step-00000002"
    lay(path)
    reseal(path)
    assert newest_sound_checkpoint(run) == path, "found damaged by its hash: proves nothing"
    state = fresh_state(1)
    before, moments_before = weights(state), moments(state)
    with pytest.raises(UserError, match=named) as caught:
        load_checkpoint(path, state)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert same(weights(state), before) and state.progress == Progress()
    assert all(torch.equal(a, b) for a, b in zip(moments(state), moments_before, strict=True))


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", '{"format_version": 2}', '{"format_version": 1, "settings": 3}'])
def test_a_state_that_is_none_is_passed_over(run, warnings, text):
    path = run / "checkpoints" / "step-00000002"
    (path / "state.json").write_text(text)
    reseal(path)
    newest = newest_sound_checkpoint(run)
    assert newest is not None and newest.name == "step-00000001"


def test_a_scaler_of_nonsense_is_refused():
    good = torch.amp.GradScaler("cpu", enabled=True).state_dict()
    check_scaler(good, True)
    for change in ({"scale": "2"}, {"scale": 0.0}, {"scale": math.nan}, {"growth_interval": -1}, {"more": 1}):
        with pytest.raises(ValueError):
            check_scaler({**good, **change}, True)
    with pytest.raises(ValueError):
        check_scaler(good, False)


def test_the_scalers_state_is_restored(tmp_path):
    def scaled(init_scale: float) -> TrainingState:
        scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=init_scale, growth_interval=3)
        return replace(fresh_state(0), scaler=scaler)

    state, restored = scaled(512.0), scaled(65536.0)
    for _ in range(5):  # one growth, and two steps towards the next
        state.scaler.scale(torch.ones(()))
        take_step(state)
        state.scaler._check_inf_per_device(state.optimizer)
        state.scaler.update()
    load_checkpoint(write_checkpoint(tmp_path, freeze(state, {})), restored)
    assert state.scaler.get_scale() == 1024.0
    assert restored.scaler.state_dict() == state.scaler.state_dict()


# The disk


def test_a_disk_that_is_full_names_the_file_and_leaves_what_was_there(run, monkeypatch):
    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr("cartilha.training.checkpoint.save_file", full)
    state = fresh_state(0)
    take_step(state)
    with pytest.raises(OSError, match="No space left") as caught:
        write_checkpoint(run, freeze(state, {}))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename.endswith("model.safetensors")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_space_that_a_run_needs_is_what_it_takes(tmp_path):
    state = fresh_state(0)
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    at_first, checkpoint = space_needed(StateSize.of(state.model), tmp_path)
    for loss in (2.0, None, None, None):
        take_step(state)
        path = write_checkpoint(tmp_path, freeze(state, {}), loss)
        size = sum(file.stat().st_size for file in path.iterdir())
        assert 0.3 * checkpoint < size <= checkpoint  # a tiny model's are mostly the allowance for small files
    assert len(list_checkpoints(tmp_path)) == 3
    later, _ = space_needed(StateSize.of(state.model), tmp_path)
    assert at_first > 4 * 12 * num_parameters and later == pytest.approx(at_first - 3 * size, abs=3000)


def test_what_becomes_of_the_file_does_not_matter_once_it_is_loaded(run):
    """Tensors are mapped from their file: whoever wrote into it, or took it away, would reach into the run."""
    state = fresh_state(1)
    path = newest_sound_checkpoint(run)
    load_checkpoint(path, state)
    before = weights(state), moments(state)
    for name in ("model.safetensors", "optimizer.safetensors"):
        size = (path / name).stat().st_size
        with (path / name).open("rb+") as file:  # the same file, not another one under its name
            file.write(b"\x7f" * size)
    assert same(weights(state), before[0])
    assert all(torch.equal(left, right) for left, right in zip(moments(state), before[1], strict=True))
