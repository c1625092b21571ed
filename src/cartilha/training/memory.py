"""How much memory a training step takes, and how many blocks a forward pass may hold.

Weights, gradients and the optimizer's states (`StateSize`) take 16 bytes per parameter with AdamW, whatever the batch,
4 to 6 in the lean profile (`profiles.py`), and fewer of those that an adapter leaves frozen. What a step keeps besides
is traced (`trace.py`). It is a straight line in the number of tokens, once they fill a chunk of logits.
"""

from __future__ import annotations

import bisect
import functools
from copy import copy
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from cartilha.errors import UserError
from cartilha.model.attention import KERNELS
from cartilha.model.loss import CHUNK_TOKENS, chunk_tokens
from cartilha.model.parts import text_config
from cartilha.model.rows import ROWS
from cartilha.training.device_facts import DeviceFacts
from cartilha.training.optimizer import StateSize
from cartilha.training.trace import Computation, Parts, StepBytes, parts_of, traced_step
from cartilha.training.update_rules import SLICE, has_lean_form

HEADROOM = 1.05  # allocators hand out memory in pieces and cannot use all of what lies between them
SAFETY = 0.95  # of what is free: other programs need memory, too
SLICE_BYTES = 24 * SLICE  # what a lean optimizer computes with: weights, gradient, moments, codes, random bits


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a process holds at the peak of a training step."""

    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    logits_chunk: int  # with its gradients, and the temporaries at the peak
    overhead: int  # the program, the device's context, and what the allocator cannot use
    gathered: int = 0  # of a sharded model: weights in use and gradients on their way, with the chunk of logits
    checkpoint_copy: int = 0  # of the state, written while training goes on; a GPU's is in the host's memory
    other_parts: int = 0  # of the model that are not trained; a GPU's are in the host's memory

    @property
    def total(self) -> int:
        """All of these."""
        return sum(vars(self).values())


class MemoryModel:
    """The memory of training steps of one model on one kind of device, whose program and context take an overhead."""

    def __init__(
        self,
        config: PretrainedConfig,
        how: Computation,
        *,
        overhead_bytes: int,
        size: StateSize | None = None,
        shares: int = 1,
    ) -> None:
        self._config = text_config(config)
        self._how = replace(how, sharded=shares > 1, gpu_bytes=0)
        self._chunk = chunk_tokens(int(self._config.vocab_size), how.dtype, how.gpu_bytes)
        self._overhead = overhead_bytes
        self.size = size or StateSize.planned(config, adapter=how.adapter)
        self.shares = shares  # processes that a sharded model is shared out over

    @property
    def dtype(self) -> torch.dtype:
        """What a step computes in."""
        return self._how.dtype

    def with_size(self, size: StateSize) -> MemoryModel:
        """The same with other states."""
        other = copy(self)
        other.size = size
        return other

    def step(self, micro_batch_size: int, block_size: int, *, accumulates: bool) -> StepMemory:
        """Memory of a step; where it has several micro-batches (`accumulates`), gradients lie beside activations."""
        if self.shares > 1:
            return self._sharded_step(micro_batch_size, block_size)
        weights, own = self.size.weight_bytes, self.size.gradient_bytes
        gives_back = self.size.is_lean and not accumulates
        kept = self._traced(micro_batch_size, block_size, gives_back)
        if gives_back:
            gradients, peak = 0.0, max(kept.body, kept.end) + SLICE_BYTES
        elif accumulates or self._how.on_cpu:  # on a CPU gradients stay where they are
            gradients, peak = float(own), max(kept.body, kept.end)
        elif kept.body >= own - kept.head + kept.end:
            # At the peak the head's gradient alone is there, and is traced: the others come while activations go.
            gradients, peak = 0.0, kept.body
        else:
            gradients, peak = own - kept.head, kept.end
        # CUDA's caching allocator wastes little in such regular steps, as does glibc's heap where large tensors
        # are given back at once (`cpu.give_back_freed_memory`). Where it keeps what is freed, it has holes between the
        # activations, and gradients that lie between those of a step's first micro-batch keep the next one's from
        # fitting. The factors are fitted to measurements (docs/log.md).
        unusable = (HEADROOM - 1) * (gradients + peak)
        if self._how.on_cpu and not (self.size.saves_memory or self._how.checkpointing):
            unusable += 0.2 * kept.activations + (0.6 * min(own, kept.activations) if accumulates else 0)
        kept_always = 0 if self._how.on_cpu else weights + self.size.optimizer_bytes
        activations = min(kept.activations, peak)
        return StepMemory(
            weights=weights,
            gradients=round(gradients),
            optimizer_states=self.size.optimizer_bytes,
            activations=round(activations),
            logits_chunk=round(peak - activations),
            overhead=round(self._overhead + unusable + (HEADROOM - 1) * kept_always),
            other_parts=self.size.other_bytes if self._how.on_cpu else 0,
        )

    @functools.cached_property
    def _parts(self) -> Parts:
        return parts_of(self._config, self._how.adapter)

    def _sharded_step(self, micro_batch_size: int, block_size: int) -> StepMemory:
        """Of a sharded model: a share of all states, and for the moment what is gathered and not yet summed."""
        kept = self._traced(micro_batch_size, block_size, gives_back=False)
        parts, half = self._parts, self._how.dtype.itemsize
        # Two layers, the next one being fetched, each in one piece and as its weights; gradients, as they are and as
        # they are sent, in float32.
        in_layers = kept.body + (2 * half + 2 * half) * parts.layer + (half + 4) * parts.trained_layer
        at_the_end = kept.end + 4 * parts.trained_outside  # sent together
        peak = max(in_layers, at_the_end) + 4 * parts.outside
        activations = min(kept.activations, peak)
        resident = (self.size.weight_bytes, self.size.gradient_bytes, self.size.optimizer_bytes)
        weights, gradients, states = (-(-part // self.shares) for part in resident)
        return StepMemory(
            weights=weights,
            gradients=gradients,
            optimizer_states=states,
            activations=round(activations),
            logits_chunk=0,
            gathered=round(peak - activations),
            overhead=round(self._overhead + (HEADROOM - 1) * (weights + gradients + states + peak)),
        )

    def _traced(self, rows: int, row_length: int, gives_back: bool) -> StepBytes:
        # Beyond the tokens that fill a chunk of logits, on the line through two larger points; a GPU's larger chunk is
        # filled along another line.
        few, full = (-(-tokens // row_length) for tokens in (CHUNK_TOKENS, self._chunk))
        if rows <= few:
            return self._trace(rows, row_length, gives_back)
        begin, end = (few, full) if rows <= full else (full, 2 * full)
        one, two = (self._trace(rows, row_length, gives_back) for rows in (begin, end))
        return one.toward(two, (rows - begin) / (end - begin))

    def _trace(self, rows: int, row_length: int, gives_back: bool) -> StepBytes:
        # Where what is kept depends on the number of tokens alone, one long row stands for all.
        if self._how.kernel != ROWS and KERNELS[self._how.kernel].counts_tokens_only:
            rows, row_length = 1, rows * row_length
        how = replace(self._how, gives_back=gives_back, chunk=min(self._chunk, rows * row_length))
        return traced_step(self._config, rows, row_length, how)


def best_step(model: MemoryModel, facts: DeviceFacts, block_size: int, blocks_per_step: int) -> tuple[int, StepMemory]:
    """The largest micro-batch (in blocks) planned to fit, 0 if none does, and the step's memory with it (or with 1).

    It divides the step's blocks if such a size is near. Beyond the device's `max_tokens` a larger one brings nothing.
    """

    def planned(size: int) -> StepMemory:
        return model.step(size, block_size, accumulates=size < blocks_per_step)

    def fits(size: int) -> bool:
        return planned(size).total <= SAFETY * facts.memory_bytes

    most = max(1, min(blocks_per_step, facts.max_tokens // block_size))
    # More blocks never take less memory, except the whole step at once: it has no gradients beside its activations.
    if not fits(1):
        return (most, planned(most)) if most == blocks_per_step and fits(most) else (0, planned(1))
    low = bisect.bisect_left(range(2, most + 1), True, key=lambda size: not fits(size)) + 1
    if low < most and fits(most):
        low = most
    divisor = max(size for size in range(1, low + 1) if blocks_per_step % size == 0)
    size = divisor if divisor * 2 > low else low
    return size, planned(size)


def check_states_fit(size: StateSize, available_bytes: int, ref: str, device: str, shares: int = 1) -> None:
    """Refuse, with a UserError, a model whose weights, gradients and optimizer states alone do not fit the device.

    Of a sharded model, one of its `shares` must fit.
    """
    available_bytes *= shares
    if size.training_bytes > available_bytes:
        each = size.training_bytes / size.num_parameters
        could_be_lean = not size.is_lean and shares == 1 and has_lean_form(size.optimizer)  # which is not sharded
        remedy = ", and with --memory lean four times as many" if could_be_lean else ", and with --lora larger models"
        remedy = "" if size.num_frozen else remedy
        what = "bfloat16 weight" if size.is_lean else "float32 weight, gradient"
        what = "frozen weights, the adapter's own with gradients," if size.num_frozen else what
        raise UserError(
            f"Training {ref} cannot fit on {device}: its {show_count(size.num_parameters)} parameters take "
            f"{each:.3g} bytes each ({what} and the states of {size.optimizer}), "
            f"{size.training_bytes / 2**30:.1f} GiB before any text, and there are {available_bytes / 2**30:.1f} GiB; "
            f"up to {show_count(round(0.8 * available_bytes / each))} parameters would fit{remedy}."
        )


def show_count(number: int) -> str:
    """A count of parameters as people write it: 125.2 M, 6.9 B."""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
