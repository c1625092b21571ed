"""Scalars that come late from the device: each is read a step late, and nothing that is recorded depends on it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cartilha.blocks.sampler import BlockSampler
from cartilha.machine.memory import peak_memory_bytes
from cartilha.model.load import load_model
from cartilha.tokens.packed import PackedDocuments
from cartilha.training import late, loop
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.metrics_file import MetricsFile
from cartilha.training.schedule import Schedule
from cartilha.training.state import TrainingState
from cartilha.training.watch import LossWatch

STEPS, STEPS_PER_EPOCH, CHECKPOINT = 9, 4, 6


class SlowDevice(late.HostCopy):
    """Stands for CUDA: the copy holds nothing until it is waited for."""

    events: list[tuple[str, int]]
    num_launched = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.clone())
        SlowDevice.num_launched += 1
        self.number, self.there = SlowDevice.num_launched, self._values
        self._values = torch.full_like(tensor, torch.nan)
        self.events.append(("launched", self.number))

    def wait(self) -> None:
        if self._values is not self.there:
            self._values = self.there
            self.events.append(("waited", self.number))


def train(path: Path) -> list[dict[str, Any]]:
    """Nine steps of which the first overflows its scale, recorded as `train` does; the lines without times."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 256, 14) for _ in range(2 * STEPS_PER_EPOCH)]  # a block each
    documents = PackedDocuments.from_ids(ids, prefix_id=256, end_id=257)
    sampler = BlockSampler(documents, block_size=16, blocks_per_step=2, seed=0)
    assert sampler.steps_per_epoch == STEPS_PER_EPOCH
    model = load_model("random:tiny", torch.device("cpu")).model
    state = TrainingState.begin(model, torch.float32, lr=1e-3, weight_decay=0.1)
    state = replace(state, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100))
    watch = LossWatch(state.progress, scaled=True)
    metrics = MetricsFile(path, 0, watch)
    for record in train_steps(state, sampler, Schedule(STEPS, 1e-3, 0.1, 0.1), StepSettings(torch.float32, 2)):
        metrics.step(record)
        if record.ends_epoch:
            metrics.flush()
            train_loss, _ = state.progress.end_epoch()
            metrics.evaluation(record.step, record.epoch, {"loss": train_loss})
        elif record.step == CHECKPOINT:
            metrics.sync()
    metrics.close()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds", "memory_bytes")} for line in lines
    ]


def test_a_step_is_waited_for_when_the_next_one_is_launched_and_earlier_only_where_it_is_needed(tmp_path, monkeypatch):
    expected = train(tmp_path / "plain.jsonl")
    monkeypatch.setattr(late, "HostCopy", SlowDevice)
    monkeypatch.setattr(SlowDevice, "events", [], raising=False)
    monkeypatch.setattr(SlowDevice, "num_launched", 0)
    found = train(tmp_path / "late.jsonl")
    assert found == expected and expected[0]["skipped"] and "skipped" not in expected[4]
    steps = [line["step"] for line in found if "evaluation" not in line]
    assert steps == list(range(1, STEPS + 1))

    waited_after = {
        number: SlowDevice.events[:place] for place, (what, number) in enumerate(SlowDevice.events) if what == "waited"
    }
    assert sorted(waited_after) == steps
    for step, events in waited_after.items():
        # The end of an epoch, the last step and a checkpoint need the step itself; all others are read a step late.
        needed = step % STEPS_PER_EPOCH == 0 or step in (STEPS, CHECKPOINT)
        assert max(number for what, number in events if what == "launched") == (step if needed else step + 1)


def test_the_peak_of_a_gpus_memory_is_read_without_all_other_statistics(monkeypatch):
    statistics = {"reserved_bytes": {"all": {"peak": 12, "current": 3}, "small_pool": {"peak": 4}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda: statistics)
    assert peak_memory_bytes("cuda") == 12


class Waits(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, which waits for a device."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("adamw", "float32"), ("adamw", "float16"), ("rmsprop", "float16"), ("muon", "float32")]
)
def test_no_step_asks_for_a_tensors_value(optimizer, dtype, monkeypatch):
    monkeypatch.setattr("cartilha.training.muon.WAITS_FOR_NOTHING", ())  # as on CUDA, and so are the next two
    monkeypatch.setattr("cartilha.training.optimizer.CLIPS_IN_STEP", ("cpu",))
    monkeypatch.setattr(loop, "weight_gradients_in_place", lambda *given, **how: nullcontext())
    documents = PackedDocuments.from_ids([np.arange(14) for _ in range(8)], prefix_id=256, end_id=257)
    sampler = BlockSampler(documents, block_size=16, blocks_per_step=4, seed=0)
    model = load_model("random:tiny", torch.device("cpu")).model
    state = TrainingState.begin(model, getattr(torch, dtype), lr=1e-3, weight_decay=0.1, optimizer=optimizer)
    if dtype == "float16":  # what multiplies its loss on a CPU is a number
        monkeypatch.setattr(state.scaler, "get_scale", lambda: 1.0)
    settings = StepSettings(torch.float32, 2)
    with Waits() as waits:
        records = list(train_steps(state, sampler, Schedule(2, 1e-3, 0.1, 0.1), settings))
    assert waits.number == 0
    with waits:
        assert torch.tensor(1.0, dtype=torch.float32) > 0 and waits.number == 1, "the spy sees nothing"
    assert np.isfinite([float(record.loss) for record in records]).all()


@pytest.mark.parametrize("skipped", [True, False])
def test_numbers_are_those_that_were_computed(skipped):
    loss, norm = torch.tensor(2.7182817), torch.tensor(float("inf"))
    copy, (first, second, third) = late.read_late(loss, norm, torch.tensor(skipped))
    loss.zero_()  # what the device does afterwards is not in the copy
    copy.wait()
    assert (float(first), float(second), bool(third)) == (float(torch.tensor(2.7182817)), float("inf"), skipped)
