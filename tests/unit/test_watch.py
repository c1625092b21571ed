"""Numbers that go wrong: what is counted, what is marked, and what ends a run."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from cartilha.training.state import Progress, StepRecord
from cartilha.training.watch import (
    LOSSES_BEFORE_SPIKES,
    MAX_SKIPPED_IN_A_ROW,
    MAX_SKIPPED_IN_A_ROW_FP16,
    LossWatch,
)


def record(step: int, loss: float, skipped: bool = False) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=1,
        ends_epoch=False,
        num_targets=10,
        tokens=10 * step,
        loss=torch.tensor(loss),
        lr=1e-3,
        grad_norm=torch.tensor(0.5),
        skipped=torch.tensor(skipped),
        seconds=0.5,
        total_seconds=0.5 * step,
        memory_bytes=1000,
    )


def noisy(step: int) -> float:
    """A loss that falls from 5 to 3 and wavers by 0.1."""
    return 3 + 2 * math.exp(-step / 50) + 0.1 * math.sin(step * 7919)


def marks(watch: LossWatch, losses: list[float]) -> list[dict[str, Any]]:
    return [watch.judge(record(step, loss)) for step, loss in enumerate(losses, 1)]


def test_an_ordinary_curve_has_no_spike_and_a_jump_is_one():
    progress = Progress()
    losses = [noisy(step) for step in range(300)]
    assert not any(marks(LossWatch(progress), losses)) and progress.loss_spikes == 0
    losses[200], losses[201], losses[250] = 5.5, 5.0, 9.0
    progress = Progress()
    found = marks(LossWatch(progress), losses)
    assert [step for step, mark in enumerate(found) if mark.get("spike")] == [200, 201, 250]
    assert progress.loss_spikes == 3


def test_a_fall_and_the_first_losses_are_no_spikes():
    found = marks(LossWatch(Progress()), [2.0, 9.0, *([4.0] * 40), 0.1])
    assert not any(found)
    assert marks(LossWatch(Progress()), [4.0] * LOSSES_BEFORE_SPIKES + [5.0])[-1] == {"spike": True}


def test_a_level_that_stays_high_is_learnt():
    found = marks(LossWatch(Progress()), [3.0] * 50 + [4.0] * 200)
    assert found[50] == {"spike": True} and not any(found[150:])


def test_losses_that_are_no_numbers_are_no_part_of_the_level():
    progress = Progress()
    watch = LossWatch(progress)
    for step in range(60):
        watch.judge(record(step, math.nan if step % 7 == 3 else 3.0, skipped=step % 7 == 3))
    assert progress.loss_level == 3.0 and progress.skipped_steps == 9


def test_a_resumed_watch_judges_as_the_unbroken_one():
    losses = [noisy(step) + (2 if step in (90, 140) else 0) for step in range(200)]
    whole, halves = Progress(), Progress()
    first = marks(LossWatch(halves), losses[:100])
    resumed = Progress(**asdict(halves))
    assert marks(LossWatch(whole), losses) == first + marks(LossWatch(resumed), losses[100:])
    assert whole == resumed and whole.loss_spikes == 2


@pytest.mark.parametrize("scaled", [False, True])
def test_a_few_skipped_steps_in_a_row_end_the_run_and_single_ones_do_not(scaled):
    limit = MAX_SKIPPED_IN_A_ROW_FP16 if scaled else MAX_SKIPPED_IN_A_ROW
    watch = LossWatch(Progress(), scaled=scaled)
    for step in range(3 * limit):
        assert watch.judge(record(step, math.nan, step % limit != 0)) == ({"skipped": True} if step % limit else {})
        assert not watch.has_diverged
    for step in range(limit):
        watch.judge(record(step, math.nan, True))
    assert watch.has_diverged
    message = str(watch.diverged("step-00000007"))
    assert f"the last {2 * limit - 1} steps" in message and "last good checkpoint is step-00000007" in message
    assert "learning rate" in message and "no checkpoint yet" in str(watch.diverged(None))
