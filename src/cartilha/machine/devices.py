"""Which device and dtype to compute with, the cores, the compiler and the seeds.

torch is imported inside the functions that need it, so that `--help` and `prepare` start without it.
"""

from __future__ import annotations

import functools
import os
import platform
import random
import shutil
import sys
from typing import TYPE_CHECKING, Any

from cartilha.errors import UserError, log
from cartilha.machine.cpu import cpu_has_bfloat16, cpu_name, fastest_cpu_dtype
from cartilha.machine.processes import from_rank_0, world

if TYPE_CHECKING:
    import numpy as np
    import torch


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `mps`; `auto` prefers CUDA, then MPS, and logs when it takes the CPU."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
        if name == "cpu":
            _announce_cpu()
    elif not available[name]:
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"The device {name} is not available on this machine; use --device auto or one of: {usable}.")
    if name != "cuda" or world()[1] == 1:
        return torch.device(name)
    # A process's number on its own machine is that of its GPU.
    index, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= num_gpus:
        raise UserError(
            f"torchrun started more processes here than there are GPUs ({num_gpus}); use --nproc-per-node {num_gpus}."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@functools.cache  # once per process
def _announce_cpu() -> None:
    log.info("No GPU was found: computing on the CPU.")


def hardware_dtypes(device_type: str, capability: tuple[int, int] | None, bf16_cpu: bool) -> tuple[str, ...]:
    """Compute dtypes that the hardware has (none that it would emulate), the best first.

    `capability` is CUDA's: below 8.0 bf16 is emulated, although torch claims support. `bf16_cpu` says whether the CPU
    has bf16 instructions. MPS has float32 alone, until half precision is proven there.
    """
    if device_type == "cuda":
        assert capability is not None
        return ("bfloat16", "float16", "float32") if capability >= (8, 0) else ("float16", "float32")
    return ("bfloat16", "float32") if device_type == "cpu" and bf16_cpu else ("float32",)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype for `auto` or a name; on a CPU with bf16, `auto` measures which one is faster.

    Under torchrun all processes take the dtype of rank 0, since each would measure for itself. A dtype that the
    hardware does not have is refused: it would be emulated or wrong.
    """
    import torch

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    real = hardware_dtypes(device.type, capability, device.type == "cpu" and cpu_has_bfloat16())
    if name == "auto":
        name = fastest_cpu_dtype(real) if device.type == "cpu" else real[0]
    elif name not in real:
        raise UserError(
            f"This {device.type} device has no {name} in hardware; use --dtype auto or one of: {', '.join(real)}."
        )
    dtype: torch.dtype = getattr(torch, name)
    return from_rank_0(dtype)


def half_dtype(device: torch.device) -> torch.dtype:
    """The dtype of half precision that a device computes in where it must: bfloat16, or a card's own float16."""
    import torch

    has_none = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if has_none else torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, `float16` or `float32`."""
    return str(dtype).removeprefix("torch.")


def has_cxx_compiler() -> bool:
    """Whether torch.compile finds a compiler: $CXX, or else the one that torch tries on this system."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", default)) is not None


def compile_pays(device_type: str) -> bool:
    """Whether compiling is worth it: on CUDA, where Triton needs a compiler for its launcher.

    On a CPU the loss is within a few per cent of a compiled one (docs/log.md, experiment 3). MPS is unproven.
    """
    if device_type == "cuda" and not has_cxx_compiler():
        log.warning("There is no C++ compiler, so the loss is not compiled: training is a little slower.")
        return False
    return device_type == "cuda"


def usable_cores() -> int:
    """Cores that this process may use; on a shared machine they may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_everything(seed: int) -> None:
    """Seed torch on every device (dropout, fresh weights), Python and numpy; the data order has its own generators."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine, for the provenance of a result."""
    import psutil
    import torch

    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "platform": platform.platform(),
    }


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device; for CUDA through pinned memory, so that the host does not wait for it."""
    import torch

    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
