"""What the machine is and has: device, compute dtype, threads, seeds, memory and versions.

torch is imported inside the functions that need it, so that `--help` and `prepare` start without it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import random
import shutil
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cartilha.cpu import cpu_has_bfloat16, cpu_name, fastest_cpu_dtype
from cartilha.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

log = logging.getLogger("cartilha")

T = TypeVar("T")


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `mps`; `auto` prefers CUDA, then MPS, and says when it takes the CPU.

    Raises:
        UserError: The named device is not there.
    """
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    chosen = name
    if name == "auto":
        chosen = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
        if chosen == "cpu":
            log.info("No GPU was found: computing on the CPU.")
    elif not available[name]:
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"The device {name} is not available on this machine; use --device auto or one of: {usable}.")
    if chosen != "cuda" or world()[1] == 1:
        return torch.device(chosen)
    index, num_devices = local_rank(), torch.cuda.device_count()
    if index >= num_devices:
        raise UserError(
            f"torchrun started more processes here than there are GPUs ({num_devices}); "
            f"use --nproc-per-node {num_devices}."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def hardware_dtypes(device_type: str, capability: tuple[int, int] | None, bf16_cpu: bool) -> tuple[str, ...]:
    """Compute dtypes that the hardware really has, the best first (design rule: never an emulated one by default).

    Args:
        device_type: `cpu`, `cuda` or `mps`.
        capability: CUDA compute capability; None elsewhere. bf16 is emulated below 8.0 although torch claims support.
        bf16_cpu: Whether the CPU has bf16 instructions.
    """
    if device_type == "cuda":
        assert capability is not None
        return ("bfloat16", "float16", "float32") if capability >= (8, 0) else ("float16", "float32")
    if device_type == "cpu":
        return ("bfloat16", "float32") if bf16_cpu else ("float32",)
    return ("float32",)  # MPS: until half precision is proven there


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype for `auto` or a name; on a CPU with bf16, `auto` measures which one is faster.

    Under torchrun all processes take that of rank 0: each would measure for itself.

    Raises:
        UserError: The dtype is not in the device's hardware, so it would be emulated or wrong.
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
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return from_rank_0(dtype)


def has_cxx_compiler() -> bool:
    """Whether torch.compile can build CPU kernels here; without a compiler the plain code runs and says so.

    torch tries $CXX, else one compiler for each system, and no other.
    """
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", default)) is not None


def compile_pays(device_type: str, compiler: bool) -> bool:
    """Whether the loss is worth compiling: on CUDA, where Triton fuses it and needs a compiler for its launcher.

    On the CPU the in-place code is within a few per cent of it (docs/log.md, experiment 3), MPS is unproven.
    """
    if device_type == "cuda" and not compiler:
        log.warning("There is no C++ compiler, so the loss is not compiled: training is a little slower.")
    return device_type == "cuda" and compiler


def usable_cores() -> int:
    """Cores that this process may use, which on a shared machine may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def world() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its own machine, as torchrun says: which GPU it takes; 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def start_processes(device: torch.device | None = None) -> None:
    """Meet the other processes, once: gloo for what lies in the host's memory, NCCL for CUDA tensors where it is there.

    Args:
        device: Where tensors will travel from; None where only plain objects do.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        import torch

        on_cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
        # Hours: rank 0 writes samples and checkpoints while the others wait.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(hours=6))


def gather_objects(mine: T) -> list[T]:
    """Every rank's value, in the order of the ranks; without torchrun just this one's."""
    num_ranks = world()[1]
    if num_ranks == 1:
        return [mine]
    import torch.distributed as dist

    start_processes()
    gathered: list[T | None] = [None] * num_ranks
    dist.all_gather_object(gathered, mine)
    return cast("list[T]", gathered)


def from_rank_0(mine: T) -> T:
    """What rank 0 has; without torchrun just this process's value."""
    return gather_objects(mine)[0]


def seed_everything(seed: int) -> None:
    """Seed torch on every device (dropout, fresh weights), and Python and numpy, which some models draw from.

    The data order has generators of its own.
    """
    import numpy as np
    import torch

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def peak_memory_bytes(device_type: str) -> int:
    """Peak resident set on the CPU, peak reserved memory on CUDA, since the process (or the last reset) began."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved())
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Torch has a type for what its CUDA allocator lacks; everything else raises a RuntimeError with these words."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on Windows
    "MPS backend out of memory",
    "CUDA error: out of memory",  # what CUDA itself takes: pinned memory, events, contexts
    "[CUDA]: out of memory",  # Triton, loading a kernel
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be taken: free device memory on CUDA, available memory of the machine elsewhere.

    A container's limit (cgroup v2) counts where it is below the machine's memory.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    # Processes of one machine share its memory.
    available = int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        if limit != "max":
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return available


def available_memory_bytes(device: torch.device) -> int:
    """Memory that this process may have in all: what is free, and what it holds already."""
    if device.type == "cuda":
        import torch

        return free_memory_bytes(device) + int(torch.cuda.memory_reserved(device))
    import psutil

    return free_memory_bytes(device) + int(psutil.Process().memory_info().rss)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine in words and numbers, for the provenance of a result."""
    import psutil
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "platform": platform.platform(),
    }


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device; to a CUDA device from pinned memory, so that the host need not wait for it."""
    import torch

    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# What the ids of a text depend on; torch has no part in them.
TEXT_PACKAGES = ("cartilha", "tokenizers", "numpy", "pyarrow")
MODEL_PACKAGES = ("cartilha", "torch", "transformers", "tokenizers", "numpy", "pyarrow")


def versions(packages: Sequence[str] = MODEL_PACKAGES) -> dict[str, str]:
    """Versions of what a number depends on: Python's and those of these packages."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if (
        "torch" in found and "torch" in sys.modules
    ):  # its own version names the build (+cpu, +cu130), which the package's does not
        found["torch"] = str(sys.modules["torch"].__version__)
    return found
