"""Memory: what is free, what was used at most, and whether an error says that it ran out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
