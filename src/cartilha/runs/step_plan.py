"""What this machine can do, and the plan of one run: its micro-batch, and what memory and time it should take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils.benchmark import Timer
from transformers import PretrainedConfig

from cartilha.errors import UserError, counted, first_line, log
from cartilha.machine.cpu import cpu_matmul_rates
from cartilha.machine.devices import dtype_name
from cartilha.machine.memory import available_memory_bytes
from cartilha.machine.peaks import data_sheet_flops
from cartilha.model.adapters import Adapter
from cartilha.model.attention import choose_kernel
from cartilha.model.products import cpu_product_dtype
from cartilha.training.device_facts import (
    GIB,
    MAX_TOKENS_GPU,
    PROGRAM_BYTES,
    DeviceFacts,
    flops_per_token,
    max_tokens_on_this_cpu,
    parameter_flops,
    utilization,
)
from cartilha.training.memory import SAFETY, MemoryModel, StepMemory, best_step
from cartilha.training.optimizer import StateSize
from cartilha.training.update_rules import has_lean_form

CUDA_SHARE, CPU_SHARE = 0.5, 0.65  # of the rate of matrix products alone that training reaches


def this_machine(device: torch.device, dtype: torch.dtype) -> DeviceFacts:
    """The machine that this runs on: its free memory, and its rate of matrix products, measured in a moment.

    Memory that this process holds already counts as available: the plan counts it, too.
    """
    memory, on_cuda = available_memory_bytes(device), device.type == "cuda"
    kernel = choose_kernel(device.type, torch.cuda.get_device_capability(device) if on_cuda else None, dtype)
    if on_cuda:
        name, flops = torch.cuda.get_device_name(device), _cuda_matmul_flops(device, dtype)
        workspaces = 64 * 2**20  # the context is there already and is not free any more
        total = torch.cuda.get_device_properties(device).total_memory
        facts = DeviceFacts(name, memory, dtype, kernel, flops, CUDA_SHARE, workspaces, MAX_TOKENS_GPU)
        return replace(facts, total_bytes=total, sheet_flops=data_sheet_flops(name, dtype_name(dtype)))
    flops, most = 1e9 * cpu_matmul_rates()[dtype_name(cpu_product_dtype(dtype))], max_tokens_on_this_cpu(dtype)
    return DeviceFacts("this machine", memory, dtype, kernel, flops, CPU_SHARE, PROGRAM_BYTES, most, kind=device.type)


def _cuda_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, without synchronising between products."""
    size = 4096
    timer = Timer("left @ left", globals={"left": torch.ones(size, size, device=device, dtype=dtype)})
    return float(2 * size**3 / timer.timeit(20).mean)


@dataclass(frozen=True)
class StepShape:
    """What one process computes per step, and how (`Computation`)."""

    block_size: int  # tokens per block
    blocks_per_step: int  # this process's share of the step's blocks
    micro_batch_size: int | None = None  # blocks per forward pass; None to choose the largest number that fits
    checkpointing: bool = False
    dropout: bool = False
    adapter: Adapter | None = None
    shares: int = 1  # processes that a sharded model is shared out over


ROOM = 1.5  # times the plan; where freed memory was kept, runs took up to 1.3 times it (docs/log.md, section 63)


@dataclass(frozen=True)
class RunPlan:
    """What a run is expected to take, made before its first step."""

    device: DeviceFacts
    size: StateSize
    block_size: int
    micro_batch_size: int
    flops_per_token: int  # of training
    memory: StepMemory | None  # of a step; None where the architecture could not be traced
    background_checkpoints: bool = True  # whether training may go on while a checkpoint is written

    @property
    def tokens_per_second(self) -> float:
        """Estimated from the device's rate of matrix products."""
        return self.device.peak_flops * self.device.share / self.flops_per_token

    @property
    def memory_bytes(self) -> int | None:
        """Of all parts together."""
        return self.memory.total if self.memory else None

    @property
    def is_tight(self) -> bool:
        """Whether a CPU has too little memory to keep freed tensors for the next ones, or this is not known."""
        return self.memory is None or ROOM * self.memory.total > self.device.memory_bytes

    def utilization(self, tokens_per_second: float) -> dict[str, Any]:
        """The share of the device's peak that one process uses at this speed."""
        of_parameters = parameter_flops(self.size.num_active_parameters, self.size.num_frozen_active)
        return utilization(self.device, tokens_per_second, self.flops_per_token, of_parameters)

    @property
    def values(self) -> dict[str, Any]:
        """The contents of plan.json."""
        return {
            "device": self.device.name,
            "attention": self.device.kernel,
            "available_bytes": self.device.memory_bytes,
            "block_size": self.block_size,
            "micro_batch_size": self.micro_batch_size,
            "num_parameters": self.size.num_parameters,
            "num_active_parameters": self.size.num_active_parameters,
            "flops_per_token": self.flops_per_token,
            "memory_bytes": self.memory_bytes,
            "memory": asdict(self.memory) if self.memory else None,
            "tokens_per_second": self.tokens_per_second,
            "utilization": self.utilization(self.tokens_per_second),
            "estimated": True,
        }

    def with_checkpoints(self) -> RunPlan:
        """The plan with the copy of the state that is written in the background; see `with_copy`."""
        if self.memory is None:
            return self
        copied = with_copy(self.memory, self.device, self.size)
        if copied is None:
            log.info("There is no memory for a copy of the state: training waits while checkpoints are written.")
            return replace(self, background_checkpoints=False)
        return replace(self, memory=copied)


def with_copy(step: StepMemory, facts: DeviceFacts, size: StateSize) -> StepMemory | None:
    """A step with the copy of the state that is written beside it, where the device's memory is the host's.

    None where there is no room: training then waits while checkpoints are written.
    """
    copied = replace(step, checkpoint_copy=size.checkpoint_bytes)
    return copied if copied.total <= SAFETY * facts.memory_bytes else None


def refuse_beyond_context(block_size: int, context_length: int, model: str) -> None:
    """Refuse, with a UserError, blocks longer than the model's context."""
    if block_size > context_length:
        raise UserError(
            f"A block size of {block_size} is beyond the context of {model} ({context_length} tokens); "
            f"use --block_size {context_length} or less."
        )


def _remedy(states: StateSize, shape: StepShape) -> str:
    """What would take less memory."""
    options = [] if shape.checkpointing else ["--gradient_checkpointing"]
    options += ["--memory lean"] if not states.is_lean and has_lean_form(states.optimizer) else []
    return " or ".join(["a smaller --block_size", *options])


def plan_run(config: PretrainedConfig, facts: DeviceFacts, states: StateSize, shape: StepShape) -> RunPlan:
    """Plan a run of a model on this machine."""
    facts = facts.for_model(config, dropout=shape.dropout)
    how = facts.computation(
        checkpointing=shape.checkpointing, dropout=shape.dropout, adapter=shape.adapter, lean=states.is_lean
    )
    memory, size = None, shape.micro_batch_size or 1
    try:
        model = MemoryModel(config, how, overhead_bytes=facts.overhead_bytes, size=states, shares=shape.shares)
        if shape.micro_batch_size is None:
            size, memory = best_step(model, facts, shape.block_size, shape.blocks_per_step)
            if size == 0:
                size = 1
                log.warning(
                    "One block of %d tokens is planned to take %.1f GiB, and %.1f GiB are free: it is tried anyway; "
                    "%s takes less.",
                    *(shape.block_size, memory.total / GIB, facts.memory_bytes / GIB, _remedy(states, shape)),
                )
        else:
            memory = model.step(size, shape.block_size, accumulates=size < shape.blocks_per_step)
    except Exception as error:  # an architecture may do something that tensors without contents cannot follow
        log.warning(
            "The memory of a step could not be planned (%s): micro-batches of %s are tried; name another with "
            "--micro_batch_size.",
            *(first_line(error), counted(size, "block")),
        )
    flops = flops_per_token(config, states.num_active_parameters, shape.block_size, states.num_frozen_active)
    return RunPlan(facts, states, shape.block_size, size, flops, memory)
