"""What changes while a model is trained, and the record of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cartilha.training.optimizer import allocate_states, make_optimizer


@dataclass
class Progress:
    """What has been done so far; with the seed it is all the data state that a resume needs.

    Attributes:
        tokens: Targets trained on.
        seconds: Training time, without evaluation and checkpoints.
        epoch_nll: Summed nll of the current epoch so far, in nats.
        epoch_tokens: Targets in `epoch_nll`.
        skipped_steps: Steps without an update, because the loss or the gradient was not finite.
        skipped_in_a_row: How many of them are the latest steps.
        loss_spikes: Steps whose loss stood far above the ones before.
        loss_level: Running mean of the losses (`LossWatch` keeps this, and the numbers of skips and spikes).
        loss_spread: Running mean of their distance from it.
        losses_seen: Losses in these means.
        micro_batch_size: Blocks per forward pass, halved where memory ran out; 0 before the first step.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch_nll: float = 0.0
    epoch_tokens: int = 0
    epoch_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_spikes: int = 0
    loss_level: float = 0.0
    loss_spread: float = 0.0
    losses_seen: int = 0
    micro_batch_size: int = 0

    def add_to_epoch(self, record: StepRecord) -> None:
        """Add a step's loss, which waits for the device; a loss that is not finite is left out of the mean."""
        loss = float(record.loss)
        if math.isfinite(loss):
            self.epoch_nll += loss * record.num_targets
            self.epoch_tokens += record.num_targets
        self.epoch_seconds += record.seconds

    def end_epoch(self) -> tuple[float, float]:
        """Mean loss (nats per token) and seconds of the epoch that ends here; the sums begin again at zero."""
        mean = self.epoch_nll / self.epoch_tokens if self.epoch_tokens else math.nan
        seconds = self.epoch_seconds
        self.epoch_nll, self.epoch_tokens, self.epoch_seconds = 0.0, 0, 0.0
        return mean, seconds


@dataclass(frozen=True)
class TrainingState:
    """The objects that training changes; a checkpoint saves and restores them in place."""

    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    progress: Progress

    @classmethod
    def begin(cls, model: PreTrainedModel, dtype: torch.dtype, *, lr: float, weight_decay: float) -> TrainingState:
        """The state before step 1; gradients are scaled where the compute dtype is fp16."""
        optimizer = make_optimizer(model, lr, weight_decay)
        allocate_states(optimizer)
        scaler = torch.amp.GradScaler(model.device.type, enabled=dtype == torch.float16)
        return cls(model, optimizer, scaler, Progress())


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `loss`, `grad_norm` and `skipped` stay on the device until they are read.

    Attributes:
        step: Counted from 1, as `epoch` is.
        ends_epoch: Whether this was the epoch's last step.
        num_targets: Targets of this step.
        tokens: Targets so far.
        loss: Mean nll of the step's targets, nats per token.
        grad_norm: Norm of the gradient before clipping.
        skipped: Whether the update was left out because the loss or the gradient was not finite.
        seconds: Of this step.
        total_seconds: Training time so far.
        memory_bytes: Peak memory so far.
        micro_batch_size: Blocks per forward pass.
    """

    step: int
    epoch: int
    ends_epoch: bool
    num_targets: int
    tokens: int
    loss: torch.Tensor
    lr: float
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    seconds: float
    total_seconds: float
    memory_bytes: int
    micro_batch_size: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Targets per second in this step."""
        return self.num_targets / self.seconds
