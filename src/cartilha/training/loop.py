"""The training loop: a generator that yields one record per step. The caller decides what happens between steps."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils import get_total_norm

from cartilha.blocks.packing import Block, empty_block, stack
from cartilha.blocks.sampler import BlockSampler
from cartilha.errors import OutOfMemoryError, counted, log
from cartilha.machine.memory import is_out_of_memory, peak_memory_bytes
from cartilha.machine.processes import world
from cartilha.model.compiling import CompiledBody
from cartilha.model.forward import batch_nll
from cartilha.model.sharding import is_sharded, whole
from cartilha.model.weight_gradients import weight_gradients_in_place
from cartilha.training.at_once import StepsInBackward, clip_each, stepping_in_backward
from cartilha.training.distributed import agree, sum_over_ranks
from cartilha.training.late import HostCopy, read_late
from cartilha.training.optimizer import choose_trained, clear_gradients, clip, step_unless
from cartilha.training.schedule import Schedule
from cartilha.training.state import StepRecord, TrainingState
from cartilha.training.streams import random_state, restore_random_state


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed."""

    dtype: torch.dtype
    micro_batch_size: int  # blocks per forward pass to begin with; halved where memory runs out
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    loss: Literal["nll", "perplexity"] = "nll"  # perplexity: exp(mean nll) of the whole step (docs/measures.md)
    body: CompiledBody | None = None  # the model's, compiled; micro-batches of the usual size go through it
    first_seconds: float = 0.0  # that step 1 is expected to take, the same on all ranks; a time budget's rate needs it


def train_steps(
    state: TrainingState, sampler: BlockSampler, schedule: Schedule, settings: StepSettings
) -> Iterator[StepRecord]:
    """Train from `state.progress` to the schedule's end, in place, and yield after each step.

    The loss of a step is the mean over all of its targets, however they fall into micro-batches and ranks: each
    micro-batch's summed nll is divided by the step's number of targets, known from the packing. A step whose loss or
    gradient is not finite changes no weight. A lean optimizer steps in the backward pass of a step of one micro-batch;
    it then leaves only the parameters as they are whose own gradient is not finite.
    """
    progress = state.progress
    progress.micro_batch_size = settings.micro_batch_size
    device = state.model.device
    before: HostCopy | None = None
    at_once: StepsInBackward | None
    with (
        closing(prepared_steps(sampler, progress.step, even=is_sharded(state.model))) as prepared,
        stepping_in_backward(state, settings.max_grad_norm) as at_once,
    ):
        while not schedule.is_over(progress.step, progress.seconds):
            started = time.perf_counter()
            step = progress.step
            data = next(prepared)
            expected_seconds = progress.seconds / step if step else settings.first_seconds
            lr = schedule.lr(step, progress.seconds, expected_seconds)
            embeddings_only = schedule.trains_embeddings_only(step, progress.seconds)
            gives_back = at_once is not None and _fits_at_once(data, progress.micro_batch_size, settings)
            parameters = choose_trained(
                state.model, state.optimizer, embeddings_only=embeddings_only, allocate=not gives_back
            )
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            launched, (loss, grad_norm, skipped) = read_late(*_update(state, data, parameters, settings, at_once))
            ends_epoch = (step + 1) % sampler.steps_per_epoch == 0
            # Launches return at once. The host waits for the step before, so that it is one step ahead at most, the
            # device is never idle, and the time of a step is that of the device, once the run is steady.
            if waited := launched if ends_epoch or step + 1 == schedule.num_steps else before:
                waited.wait()
            before = launched
            seconds, progress.micro_batch_size = agree(time.perf_counter() - started, progress.micro_batch_size)
            progress.step += 1
            progress.tokens += data.num_targets
            progress.seconds += seconds
            yield StepRecord(
                step=progress.step,
                epoch=step // sampler.steps_per_epoch + 1,
                ends_epoch=ends_epoch,
                num_targets=data.num_targets,
                tokens=progress.tokens,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                skipped=skipped,
                seconds=seconds,
                total_seconds=progress.seconds,
                memory_bytes=peak_memory_bytes(device.type),
                micro_batch_size=progress.micro_batch_size,
            )


@dataclass(frozen=True)
class StepBlocks:
    """What one step trains on."""

    blocks: list[Block]  # this rank's share
    num_targets: int  # of the whole step, all ranks together


def prepared_steps(sampler: BlockSampler, step: int, *, even: bool = False) -> Generator[StepBlocks, None, None]:
    """This rank's blocks of `step` (from 0) and of all steps after it.

    If they are to be `even`, a rank with fewer blocks than others gets blocks without targets besides.

    While a step runs, a thread prepares the next one: cutting blocks out of the memory-mapped store is work for numpy
    and the disk, and the device need not wait for it.
    """

    def prepare(step: int) -> StepBlocks:
        blocks = sampler.blocks(step, *world())
        most = -(-sampler.position(step).num_blocks // world()[1])
        spare = [empty_block(sampler.block_size)] * (most - len(blocks)) if even else []
        return StepBlocks([*blocks, *spare], sampler.num_targets(step))

    with ThreadPoolExecutor(1, thread_name_prefix="cartilha-loader") as thread:
        begun = thread.submit(prepare, step)
        while True:
            blocks, step = begun.result(), step + 1
            begun = thread.submit(prepare, step)
            yield blocks


def _fits_at_once(data: StepBlocks, micro_batch_size: int, settings: StepSettings) -> bool:
    """Whether one backward pass has the step's whole gradient, so that parameters can be stepped in it."""
    return len(data.blocks) <= micro_batch_size and world()[1] == 1 and settings.loss == "nll"


def _update(
    state: TrainingState,
    data: StepBlocks,
    parameters: Sequence[torch.nn.Parameter],
    settings: StepSettings,
    at_once: StepsInBackward | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take one optimizer step; returns its loss, its gradient's norm before clipping, and whether it was left out."""
    loss = _gradients(state, data, parameters, settings, at_once)
    if at_once is not None and at_once.is_active:
        return loss, *at_once.end(loss)
    sum_over_ranks(parameters, loss, gradients=not is_sharded(state.model))
    state.scaler.unscale_(state.optimizer)
    if settings.loss == "perplexity":  # d exp(loss) = exp(loss) d loss, with the loss of the whole step
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], loss.exp())
    if at_once is not None:  # as in a step of one micro-batch, so that their number changes nothing
        grad_norm = clip_each(parameters, settings.max_grad_norm, at_once.num_parameters)
    else:
        grad_norm = whole(get_total_norm([p.grad for p in parameters if p.grad is not None]))
        clip(parameters, settings.max_grad_norm, grad_norm, state.optimizer)
    skipped = ~torch.isfinite(grad_norm + loss)
    step_unless(skipped, state.optimizer)
    state.scaler.update()
    clear_gradients(parameters)
    return loss, grad_norm, skipped


def _gradients(
    state: TrainingState,
    data: StepBlocks,
    parameters: Sequence[torch.nn.Parameter],
    settings: StepSettings,
    at_once: StepsInBackward | None,
) -> torch.Tensor:
    """Add up the gradients of this rank's share of the step's mean nll, and return that share.

    If memory runs out, the micro-batch is halved and the gradients are computed again from the same random state: no
    weight has moved, so the step comes out the same up to rounding. A sharded model cannot do that, since the other
    ranks wait in the pass that failed. If the compiled body fails in the backward pass, the step is repeated without
    it. A micro-batch with fewer rows than usual is not worth a graph.
    """
    progress = state.progress
    before = random_state()
    while True:
        size = min(progress.micro_batch_size, len(data.blocks))
        body = settings.body if size == progress.micro_batch_size else None
        returned = at_once is not None and _fits_at_once(data, size, settings)
        if at_once is not None:
            at_once.begin(is_active=returned)
        try:
            return _accumulate(state, data, size, settings.dtype, body, returned=returned)
        except Exception as error:
            out_of_memory = is_out_of_memory(error)
            without_graph = body is not None and body.give_up(error)
            if out_of_memory and is_sharded(state.model):
                raise OutOfMemoryError(
                    f"Memory ran out in step {progress.step + 1} with micro-batches of {counted(size, 'block')}, and "
                    "the processes of a sharded model cannot repeat a step; use a smaller --micro_batch_size and "
                    "--resume auto."
                ) from error
            if not without_graph and (not out_of_memory or size <= 1):
                raise
            if at_once is not None and at_once.has_stepped:
                raise
        # Outside of the handler: the error's traceback held on to the tensors of the pass that failed.
        clear_gradients(parameters)
        if state.model.device.type == "cuda":
            torch.cuda.empty_cache()
        restore_random_state(before)
        if not out_of_memory:
            continue
        progress.micro_batch_size = (size + 1) // 2
        log.warning(
            "Memory ran out in step %d with micro-batches of %s: going on with %d, and more of them; "
            "the result stays the same.",
            *(progress.step + 1, counted(size, "block"), progress.micro_batch_size),
        )


def _accumulate(
    state: TrainingState,
    data: StepBlocks,
    micro_batch_size: int,
    dtype: torch.dtype,
    body: CompiledBody | None,
    *,
    returned: bool,
) -> torch.Tensor:
    model, scaler = state.model, state.scaler
    device = model.device
    loss = torch.zeros((), device=device)
    # get_scale() synchronises on CUDA.
    factor = scaler.get_scale() / data.num_targets if device.type == "cpu" else 1.0
    in_place = not is_sharded(model)  # gradients of a sharded model go to other ranks
    for begin in range(0, len(data.blocks), max(1, micro_batch_size)):
        batch = stack(data.blocks[begin : begin + micro_batch_size])
        usual = body if len(batch.input_ids) == micro_batch_size else None
        own = weight_gradients_in_place(device.type, factor, returned=returned)
        with own if in_place and usual is None else nullcontext():
            share = batch_nll(model, batch, dtype, usual) / data.num_targets
        scaler.scale(share).backward()
        loss += share.detach()
    return loss
