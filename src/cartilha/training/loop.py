"""The training loop: a generator that yields one record a step. Whoever iterates decides what happens between steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from cartilha.blocks.packing import Block, stack
from cartilha.blocks.sampler import BlockSampler
from cartilha.errors import counted
from cartilha.machine.memory import is_out_of_memory, peak_memory_bytes
from cartilha.machine.processes import world
from cartilha.model.compiling import CompiledBody
from cartilha.model.forward import batch_nll
from cartilha.model.weight_gradients import weight_gradients_in_place
from cartilha.training.distributed import agree, sum_over_ranks
from cartilha.training.loader import StepLoader
from cartilha.training.optimizer import choose_trained, clear_gradients, learning_rate, step_unless
from cartilha.training.streams import random_state, restore_random_state

log = logging.getLogger("cartilha")

LossKind = Literal["nll", "perplexity"]


@dataclass(frozen=True)
class Schedule:
    """How long training lasts and how its learning rate runs.

    Attributes:
        num_steps: Steps at most.
        peak_lr: The rate after the warm-up.
        warmup_fraction: Share of the run in which the rate rises.
        final_lr_fraction: Share of the peak at which the decay ends.
        time_budget_s: Seconds of training at most; the rate follows whichever of steps and time is further on, so that
            it decays to the end of either.
        embeddings_first: Share of the steps, at the beginning, that trains the token embeddings alone. Each of the two
            phases has a warm-up and a decay of its own.
        embeddings_lr: Peak rate of that phase.
    """

    num_steps: int
    peak_lr: float
    warmup_fraction: float
    final_lr_fraction: float
    time_budget_s: float | None = None
    embeddings_first: float = 0.0
    embeddings_lr: float = 0.0

    def _position(self, step: int, seconds: float) -> float:
        """Steps taken or, where that is more, the share of the time budget used up, in steps."""
        return max(step, seconds / self.time_budget_s * self.num_steps if self.time_budget_s else 0.0)

    @property
    def _num_embedding_steps(self) -> int:
        return max(round(self.embeddings_first * self.num_steps), int(self.embeddings_first > 0))

    def trains_embeddings_only(self, step: int, seconds: float = 0.0) -> bool:
        """Whether step `step` (from 0) belongs to the first phase, which has at least one step where there is one."""
        return self._position(step, seconds) < self._num_embedding_steps

    def lr(self, step: int, seconds: float = 0.0) -> float:
        """The learning rate of step `step` (from 0), which begins after `seconds` of training."""
        position, first = self._position(step, seconds), self._num_embedding_steps
        if position < first:
            begin, end, peak = 0, first, self.embeddings_lr
        else:
            begin, end, peak = first, self.num_steps, self.peak_lr
        return learning_rate(
            position - begin,
            end - begin,
            peak=peak,
            warmup_fraction=self.warmup_fraction,
            final_fraction=self.final_lr_fraction,
        )

    def is_over(self, step: int, seconds: float) -> bool:
        """Whether training ends after `step` steps and `seconds` of training."""
        return step >= self.num_steps or (self.time_budget_s is not None and seconds >= self.time_budget_s)


@dataclass
class Progress:
    """What has been done so far; with the seed it is all the data state that a resume needs.

    Attributes:
        step: Steps taken.
        tokens: Targets trained on.
        seconds: Training time, without evaluation and checkpoints.
        epoch_nll: Summed nll of the current epoch so far, in nats (kept by `hooks.EpochLoss`).
        epoch_tokens: Targets in `epoch_nll`.
        epoch_seconds: Training time of the current epoch so far.
        skipped_steps: Steps whose update was left out because a loss or gradient was not finite.
        skipped_in_a_row: How many of them are the latest steps.
        loss_spikes: Steps whose loss stood far above the ones before.
        loss_level: Running mean of the losses (kept by `watch.LossWatch`, as the three above).
        loss_spread: Running mean of their distance from it.
        losses_seen: Losses in these means.
        micro_batch_size: Blocks a forward pass, halved where memory ran out; 0 before the first step.
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


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `loss`, `grad_norm` and `skipped` stay on the device until they are read.

    Attributes:
        step: Counted from 1.
        epoch: Counted from 1.
        ends_epoch: Whether this was the epoch's last step.
        num_targets: Targets of this step.
        tokens: Targets so far.
        loss: Mean nll of the step's targets, nats a token.
        lr: The learning rate used.
        grad_norm: Norm of the gradient before clipping.
        skipped: Whether the update was left out because the loss or the gradient was not finite.
        seconds: Of this step.
        total_seconds: Training time so far.
        memory_bytes: Peak memory so far.
        micro_batch_size: Blocks a forward pass.
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


def train_steps(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    sampler: BlockSampler,
    schedule: Schedule,
    progress: Progress,
    *,
    dtype: torch.dtype,
    micro_batch_size: int,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler,
    loss_kind: LossKind = "nll",
    body: CompiledBody | None = None,
) -> Iterator[StepRecord]:
    """Train from `progress.step` to the schedule's end, yielding after each step.

    The loss of a step is the mean over all of its targets, however they fall into micro-batches and ranks: each
    micro-batch's summed nll is divided by the step's number of targets, known beforehand from the packing. A step whose
    loss or gradient is not finite changes no weight: its blocks are passed over.

    Args:
        model: Float32 weights, on its device.
        optimizer: From `make_optimizer`; its learning rate is set here.
        sampler: Gives the blocks of a step.
        schedule: Number of steps and learning rates.
        progress: Where to begin; updated in place.
        dtype: Compute dtype.
        micro_batch_size: Blocks a forward pass to begin with; halved where memory runs out.
        max_grad_norm: Gradients are clipped to this norm.
        scaler: Enabled for fp16 only.
        loss_kind: `perplexity` differentiates exp(mean nll) of the whole step (docs/measures.md).
        body: The model's, compiled; micro-batches of the usual size go through it.
    """
    progress.micro_batch_size = micro_batch_size
    pace = _OneStepAhead(model.device)
    with StepLoader(sampler, *world()) as loader:
        while not schedule.is_over(progress.step, progress.seconds):
            started = time.perf_counter()
            step = progress.step
            data = loader.take(step)
            lr = schedule.lr(step, progress.seconds)
            embeddings_only = schedule.trains_embeddings_only(step, progress.seconds)
            parameters = choose_trained(model, optimizer, embeddings_only=embeddings_only)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = _gradients(model, parameters, data.blocks, data.num_targets, progress, dtype, scaler, body)
            sum_over_ranks(parameters, loss)
            scaler.unscale_(optimizer)
            if loss_kind == "perplexity":  # d exp(loss) = exp(loss) d loss, with the loss of the whole step
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], loss.exp())
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            skipped = ~torch.isfinite(grad_norm + loss)
            step_unless(skipped, optimizer)
            scaler.update()
            clear_gradients(parameters)
            ends_epoch = sampler.position(step + 1).epoch > sampler.position(step).epoch
            pace.wait(to_the_end=ends_epoch or step + 1 == schedule.num_steps)
            seconds, progress.micro_batch_size = agree(time.perf_counter() - started, progress.micro_batch_size)
            progress.step += 1
            progress.tokens += data.num_targets
            progress.seconds += seconds
            yield StepRecord(
                step=progress.step,
                epoch=sampler.position(step).epoch + 1,
                ends_epoch=ends_epoch,
                num_targets=data.num_targets,
                tokens=progress.tokens,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                skipped=skipped,
                seconds=seconds,
                total_seconds=progress.seconds,
                memory_bytes=peak_memory_bytes(model.device.type),
                micro_batch_size=progress.micro_batch_size,
            )


def _gradients(
    model: PreTrainedModel,
    parameters: Sequence[torch.nn.Parameter],
    blocks: Sequence[Block],
    num_targets: int,
    progress: Progress,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
    body: CompiledBody | None,
) -> torch.Tensor:
    """Add up the gradients of the blocks' share of the step's mean nll, and return that share.

    Where memory runs out the micro-batch is halved and the step's gradients are made anew, from the same random state:
    no weight has moved, so the step comes out the same up to rounding. So they are where the compiled body fails in the
    backward pass, plainly then. A micro-batch with fewer rows than usual, as at an epoch's end, is not worth a graph.
    """
    before = random_state()
    while True:
        size = min(progress.micro_batch_size, len(blocks))
        usual = body if size == progress.micro_batch_size else None
        try:
            return _accumulate(model, blocks, size, num_targets, dtype, scaler, usual)
        except Exception as error:
            out_of_memory = is_out_of_memory(error)
            plainly = usual is not None and usual.give_up(error)
            if not plainly and (not out_of_memory or size <= 1):
                raise
        # Outside of the handler: the error's traceback held on to the tensors of the pass that failed.
        clear_gradients(parameters)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        restore_random_state(before)
        if not out_of_memory:
            continue
        progress.micro_batch_size = (size + 1) // 2
        log.warning(
            "Memory ran out in step %d with micro-batches of %s: going on with %d, and more of them; "
            "the result stays the same.",
            progress.step + 1,
            counted(size, "block"),
            progress.micro_batch_size,
        )


def _accumulate(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    micro_batch_size: int,
    num_targets: int,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
    body: CompiledBody | None,
) -> torch.Tensor:
    loss = torch.zeros((), device=model.device)
    factor = scaler.get_scale() / num_targets if model.device.type == "cpu" else 1.0  # elsewhere asking would wait
    for begin in range(0, len(blocks), max(1, micro_batch_size)):
        batch = stack(blocks[begin : begin + micro_batch_size])
        usual = body if len(batch.input_ids) == micro_batch_size else None
        own = nullcontext() if usual is not None else weight_gradients_in_place(model.device.type, factor)
        with own:
            share = batch_nll(model, batch, dtype, usual) / num_targets
        scaler.scale(share).backward()
        loss += share.detach()
    return loss


class _OneStepAhead:
    """Lets the host prepare a step while a CUDA device computes the one before; elsewhere nothing is waited for.

    Launches return at once. Waiting for the step before keeps the clock honest (in a steady run a step's time is then
    the device's) without ever leaving the device idle, and keeps the host from running away.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Event | None = None

    def wait(self, *, to_the_end: bool) -> None:
        """Wait for the step before the one just launched, or `to_the_end` of that one, too."""
        if self._device.type != "cuda":
            return
        before, self._last = self._last, torch.cuda.Event()
        self._last.record(torch.cuda.current_stream(self._device))
        event = self._last if to_the_end else before
        if event is not None:
            event.synchronize()
