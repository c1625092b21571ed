"""What this machine can do, and the plan of one run: its micro-batch, and what memory and time it should take."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from cartilha.errors import counted, first_line
from cartilha.machine.cpu import cpu_matmul_rate
from cartilha.machine.devices import dtype_name
from cartilha.machine.memory import available_memory_bytes
from cartilha.model.attention import choose_kernel
from cartilha.model.products import cpu_product_dtype
from cartilha.training.checkpoint import BYTES_PER_PARAMETER as CHECKPOINT_BYTES_PER_PARAMETER
from cartilha.training.device_facts import (
    GIB,
    MAX_TOKENS_GPU,
    PROGRAM_BYTES,
    DeviceFacts,
    flops_per_token,
    max_tokens_on_this_cpu,
)
from cartilha.training.memory import SAFETY, MemoryModel, StepMemory, largest_micro_batch

log = logging.getLogger("cartilha")


def this_machine(device: torch.device, dtype: torch.dtype) -> DeviceFacts:
    """The machine that this runs on: its free memory, and its rate of matrix products, measured in a moment.

    Memory that this process holds already counts as available: the plan counts it, too.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = torch.cuda.get_device_capability(device)
        return DeviceFacts(
            name=properties.name,
            memory_bytes=available_memory_bytes(device),
            dtype=dtype,
            kernel=choose_kernel("cuda", capability, dtype),
            peak_flops=_cuda_matmul_flops(device, dtype),
            share=0.5,  # of what matrix products alone reach
            overhead_bytes=64 * 2**20,  # workspaces; the context is there already and is not free any more
            max_tokens=MAX_TOKENS_GPU,
        )
    return DeviceFacts(
        name="this machine",
        memory_bytes=available_memory_bytes(device),
        dtype=dtype,
        kernel=choose_kernel(device.type, None, dtype),
        peak_flops=1e9 * cpu_matmul_rate(dtype_name(cpu_product_dtype(dtype))),
        share=0.65,
        overhead_bytes=PROGRAM_BYTES,
        max_tokens=max_tokens_on_this_cpu(dtype),
        kind=device.type,
    )


def _cuda_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, without waiting for anything between products."""
    size, repeats = 4096, 20
    left = torch.ones(size, size, device=device, dtype=dtype)
    left @ left
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        left @ left
    torch.cuda.synchronize(device)
    return repeats * 2 * size**3 / (time.perf_counter() - started)


@dataclass(frozen=True)
class RunPlan:
    """What a run is expected to take, made before its first step.

    Attributes:
        micro_batch_size: Blocks a forward pass.
        memory: Of a step, by its parts; None where the architecture could not be traced.
        tokens_per_second: Estimated from the machine's rate of matrix products.
        values: What plan.json holds.
        background_checkpoints: Whether training may go on while a checkpoint is written.
    """

    micro_batch_size: int
    memory: StepMemory | None
    tokens_per_second: float
    values: dict[str, Any]
    background_checkpoints: bool = True

    @property
    def memory_bytes(self) -> int | None:
        """Of all parts together."""
        return self.memory.total if self.memory else None

    def with_checkpoints(self, facts: DeviceFacts, num_parameters: int) -> RunPlan:
        """The plan with the copy of the state that is written in the background; see `with_copy`."""
        if self.memory is None:
            return self
        copied = with_copy(self.memory, facts, num_parameters)
        if copied is None:
            log.info("There is no memory for a copy of the state: training waits while checkpoints are written.")
            return replace(self, background_checkpoints=False)
        values = {**self.values, "memory_bytes": copied.total, "memory": asdict(copied)}
        return replace(self, memory=copied, values=values)


def with_copy(step: StepMemory, facts: DeviceFacts, num_parameters: int) -> StepMemory | None:
    """A step with the copy of the state that is written beside it, where the device's memory is the host's.

    Returns:
        None where there is no room: training waits for its checkpoints then.
    """
    copied = replace(step, checkpoint_copy=CHECKPOINT_BYTES_PER_PARAMETER * num_parameters)
    return copied if copied.total <= SAFETY * facts.memory_bytes else None


def best_step(model: MemoryModel, facts: DeviceFacts, block_size: int, blocks_per_step: int) -> tuple[int, StepMemory]:
    """The largest micro-batch that fits the device, 0 where none does, and the step's memory with it (or with 1).

    Args:
        model: Says what a step takes.
        facts: Of the device.
        block_size: Tokens a block.
        blocks_per_step: Blocks of a step that one process takes.
    """
    size = largest_micro_batch(
        model,
        block_size=block_size,
        blocks_per_step=blocks_per_step,
        available_bytes=facts.memory_bytes,
        max_tokens=facts.max_tokens,
    )
    return size, model.step(max(1, size), block_size, accumulates=max(1, size) < blocks_per_step)


def plan_run(
    config: PretrainedConfig,
    facts: DeviceFacts,
    *,
    num_parameters: int,
    block_size: int,
    blocks_per_step: int,
    micro_batch_size: int | None,
    checkpointing: bool = False,
    dropout: bool = False,
) -> RunPlan:
    """Plan a run on this machine.

    Args:
        config: The model's.
        facts: Of the machine.
        num_parameters: Of the model.
        block_size: Tokens a block.
        blocks_per_step: Blocks of a step that this process takes.
        micro_batch_size: Asked for; None to choose the largest that fits.
        checkpointing: Whether activations are computed twice instead of kept.
        dropout: Whether the dropout that the configuration asks for is drawn.
    """
    facts = facts.for_model(config, dropout=dropout)
    rate = facts.peak_flops * facts.share / flops_per_token(config, num_parameters, block_size)
    memory, size = None, micro_batch_size or 1
    try:
        model = MemoryModel(
            config,
            facts.computation(checkpointing=checkpointing, dropout=dropout),
            overhead_bytes=facts.overhead_bytes,
            num_parameters=num_parameters,
        )
        if micro_batch_size is None:
            chosen, memory = best_step(model, facts, block_size, blocks_per_step)
            size = max(1, chosen)
            if chosen == 0:
                log.warning(
                    "One block of %d tokens is planned to take %.1f GiB of the %.1f that are free: it is tried all the "
                    "same; a smaller --block_size or --gradient_checkpointing takes less.",
                    block_size,
                    memory.total / GIB,
                    facts.memory_bytes / GIB,
                )
        else:
            memory = model.step(size, block_size, accumulates=size < blocks_per_step)
    except Exception as error:  # an architecture may do something that tensors without contents cannot follow
        log.warning(
            "The memory of a step could not be planned (%s): %s; name another with --micro_batch_size.",
            first_line(error),
            f"micro-batches of {counted(size, 'block')} are tried",
        )
    values = {
        "device": facts.name,
        "available_bytes": facts.memory_bytes,
        "block_size": block_size,
        "micro_batch_size": size,
        "num_parameters": num_parameters,
        "flops_per_token": flops_per_token(config, num_parameters, block_size),
        "memory_bytes": memory.total if memory else None,
        "memory": asdict(memory) if memory else None,
        "tokens_per_second": rate,
        "estimated": True,
    }
    return RunPlan(size, memory, rate, values)
