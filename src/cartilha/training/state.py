"""What changes while a model is trained, and the record of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from transformers import PreTrainedModel

from cartilha.training.optimizer import allocate_states, make_optimizer


@dataclass
class Progress:
    """What has been done so far; with the seed it is all the data state that a resume needs."""

    step: int = 0
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # training time, without evaluation and checkpoints
    epoch_nll: float = 0.0  # summed nll of the current epoch so far, in nats
    epoch_tokens: int = 0  # targets in `epoch_nll`
    epoch_seconds: float = 0.0
    skipped_steps: int = 0  # steps without an update, because the loss or the gradient was not finite
    skipped_in_a_row: int = 0  # how many of them are the latest steps
    loss_spikes: int = 0  # steps whose loss was far above the ones before
    loss_level: float = 0.0  # running mean of the losses; `LossWatch` keeps this and the numbers around it
    loss_spread: float = 0.0  # running mean of their distance from it
    losses_seen: int = 0  # losses in these means
    micro_batch_size: int = 0  # blocks per forward pass, halved where memory ran out; 0 before the first step

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
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress

    @classmethod
    def begin(
        cls, model: PreTrainedModel, dtype: torch.dtype, *, lr: float, weight_decay: float, optimizer: str = "adamw"
    ) -> TrainingState:
        """The state before step 1; gradients are scaled where the compute dtype is fp16."""
        made = make_optimizer(model, lr, weight_decay, optimizer)
        allocate_states(model, made, optimizer)
        scaler = torch.amp.GradScaler(model.device.type, enabled=dtype == torch.float16)
        return cls(model, made, scaler, Progress())


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `loss`, `grad_norm` and `skipped` come late from the device: reading them waits for it."""

    step: int  # counted from 1
    epoch: int  # counted from 1
    ends_epoch: bool  # whether this was the epoch's last step
    num_targets: int  # of this step
    tokens: int  # targets so far
    loss: SupportsFloat  # mean nll of the step's targets, nats per token
    lr: float
    grad_norm: SupportsFloat  # before clipping
    skipped: object  # true if the update was left out because the loss or the gradient was not finite
    seconds: float  # of this step
    total_seconds: float  # training time so far
    memory_bytes: int  # peak memory so far
    micro_batch_size: int = 1  # blocks per forward pass

    @property
    def tokens_per_second(self) -> float:
        """Targets per second in this step."""
        return self.num_targets / self.seconds


def rates(progress: Progress, first: StepRecord | None) -> dict[str, float | None]:
    """Tokens per second of all steps, and of those after this process's first one, which includes the compilation."""
    after = progress.seconds - first.total_seconds if first else 0.0
    return {
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
        "tokens_per_second_after_first_step": (progress.tokens - first.tokens) / after if first and after else None,
    }
