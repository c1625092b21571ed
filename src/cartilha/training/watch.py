"""Losses that go wrong: spikes are marked; steps without an update are counted, and several in a row end the run."""

from __future__ import annotations

import math
from typing import Any

from cartilha.errors import UserError, log
from cartilha.training.state import Progress, StepRecord

MAX_SKIPPED_IN_A_ROW = 5
MAX_SKIPPED_IN_A_ROW_FP16 = 20  # its scaler starts too high on purpose and is halved at each overflow
SPIKE_SPREADS = 6.0  # about five standard deviations of normal noise
SPIKE_NATS = 0.25  # smaller jumps are not worth a mark
LOSSES_BEFORE_SPIKES = 20
MEMORY = 0.05  # weight of the newest loss in the running means


class LossWatch:
    """Judges each step's loss and gradient; what it remembers is kept in the run's progress and survives a resume.

    With a gradient scaler (`scaled`, fp16) the first steps usually overflow, so that more may be skipped in a row.
    """

    def __init__(self, progress: Progress, *, scaled: bool = False) -> None:
        self._progress = progress
        self._limit = MAX_SKIPPED_IN_A_ROW_FP16 if scaled else MAX_SKIPPED_IN_A_ROW

    def judge(self, record: StepRecord) -> dict[str, Any]:
        """Add a step to the epoch's sums, and return its marks for the metrics: `skipped`, `spike`, or none.

        This waits for the device. A loss that is not finite is left out of the epoch's mean.
        """
        marks: dict[str, Any] = {}
        progress = self._progress
        progress.epoch_seconds += record.seconds
        if bool(record.skipped):
            if not progress.skipped_steps:
                log.warning(
                    "Step %d had a loss or gradient that is not a number: its update is left out (metrics.jsonl marks "
                    "such steps).",
                    record.step,
                )
            progress.skipped_steps += 1
            progress.skipped_in_a_row += 1
            marks["skipped"] = True
        else:
            progress.skipped_in_a_row = 0
        loss = float(record.loss)
        if math.isfinite(loss):
            progress.epoch_nll += loss * record.num_targets
            progress.epoch_tokens += record.num_targets
            if self._is_spike(loss):
                progress.loss_spikes += 1
                marks["spike"] = True
        return marks

    def _is_spike(self, loss: float) -> bool:
        # Compares the loss with the means of the ones before, then adds it to them.
        progress = self._progress
        excess = loss - progress.loss_level
        ceiling = max(SPIKE_SPREADS * progress.loss_spread, SPIKE_NATS)
        spike = progress.losses_seen >= LOSSES_BEFORE_SPIKES and excess > ceiling
        # A spike moves the level no further than an ordinary high loss does, so that the next one is a spike, too.
        moved = min(excess, ceiling) if progress.losses_seen else 0.0
        weight = max(MEMORY, 1 / (progress.losses_seen + 1))
        progress.loss_level = progress.loss_level + weight * moved if progress.losses_seen else loss
        progress.loss_spread += weight * (abs(moved) - progress.loss_spread)
        progress.losses_seen += 1
        return spike

    @property
    def has_diverged(self) -> bool:
        """Whether so many of the latest steps were skipped that training cannot recover."""
        return self._progress.skipped_in_a_row >= self._limit

    def diverged(self, last_good: str | None) -> UserError:
        """The error for it, with the likely causes and the name of the newest checkpoint."""
        kept = f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"
        return UserError(
            f"The training diverged: the last {self._progress.skipped_in_a_row} steps had a loss or gradient that is "
            f"not a number ({kept}); likely causes are a learning rate that is too high, fp16 overflow, or a model "
            "whose weights are damaged: use a smaller --lr or --dtype float32 with another --output."
        )
