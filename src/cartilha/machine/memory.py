"""Memory: how much is free, how much was used at most, and whether an error means that it ran out."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch


def peak_memory_bytes(device_type: str) -> int:
    """The highest resident set of the process so far; on CUDA the highest reserved memory since the last reset."""
    if device_type == "cuda":
        # `max_memory_reserved` would make a sorted dictionary of all of them, in Python, at every step.
        statistics = torch.cuda.memory_stats_as_nested_dict()
        return int(statistics["reserved_bytes"]["all"]["peak"]) if statistics else 0
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Only torch's CUDA allocator has a type of error for it; others raise a RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on Windows
    "MPS backend out of memory",
    "CUDA error: out of memory",  # CUDA itself: pinned memory, events, contexts
    "[CUDA]: out of memory",  # Triton, loading a kernel
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be taken: of the device on CUDA, else of the machine or its container (cgroup v2)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # The processes on one machine share its memory.
    available = int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with suppress(OSError, ValueError):  # the limit is "max" where there is none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        available = min(available, max(0, limit - used))
    return available


def available_memory_bytes(device: torch.device) -> int:
    """Memory that this process may have in all: what is free and what it already holds."""
    own = torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return free_memory_bytes(device) + int(own)
