"""What a step takes at its peak, under a limit where one is asked for, beside what the plan says of it."""

from __future__ import annotations

from typing import Any

import torch

from cartilha.machine.memory import is_out_of_memory
from training_speed.setup import Shape, model_config
from training_speed.variants import peak_memory, train_ours

GIB = 2**30


def measure(
    shape: Shape, dtype: str, kernel: str, limit_gib: float | None = None, compiled: bool = False
) -> dict[str, Any]:
    """A few steps with all rows in one forward pass; the loop halves the micro-batch where memory runs out.

    Args:
        shape: Of the step.
        dtype: Compute dtype; `float16` with its gradient scaler.
        kernel: Of attention: `mask` where the card has no flash attention.
        limit_gib: Of torch's memory on a CUDA device, its context not counted.
        compiled: Whether the body is compiled.
    """
    cuda = shape.device == "cuda"
    if cuda:
        if limit_gib is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * GIB / total))
        torch.cuda.reset_peak_memory_stats()
    micro_batch = shape.micro_batch
    try:
        for record in train_ours(shape, dtype, compiled, kernel):
            micro_batch = record.micro_batch_size
            loss = float(record.loss)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"fits": False, "planned_bytes": planned(shape, dtype, kernel), "error": str(error)[:200]}
    measured, plan = peak_memory(shape.device), planned(shape, dtype, kernel)
    return {
        "fits": micro_batch == shape.micro_batch, "micro_batch_in_force": micro_batch, "loss": loss, **measured,
        "planned_bytes": plan, "planned_by_measured": plan / measured["peak_bytes"],
    }  # fmt: skip


def planned(shape: Shape, dtype: str, kernel: str) -> int:
    """As `cartilha plan` has it; of a CUDA device what torch's allocator holds, so without the context."""
    from cartilha.training.device_facts import PROGRAM_BYTES
    from cartilha.training.memory import MemoryModel
    from cartilha.training.trace import Computation

    on_gpu = shape.device == "cuda"
    overhead = 64 * 2**20 if on_gpu else PROGRAM_BYTES
    total = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    how = Computation(getattr(torch, dtype), kernel, on_cpu=not on_gpu, gpu_bytes=total)
    model = MemoryModel(model_config(shape), how, overhead_bytes=overhead)
    return model.step(shape.micro_batch, shape.block_size, accumulates=False).total
