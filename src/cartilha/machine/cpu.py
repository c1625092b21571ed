"""A CPU and its arithmetic: which dtypes it has, how fast it multiplies, and what its libraries are told.

torch is imported inside the functions that need it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import time
from pathlib import Path

log = logging.getLogger("cartilha")


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_has_bfloat16(flags: frozenset[str] | None = None) -> bool:
    """Whether the CPU multiplies bf16 in hardware (avx512_bf16 or AMX); emulated bf16 is 44 to 499 times slower.

    Args:
        flags: The CPU's feature names, for tests; by default read from the system.
    """
    if flags is None:
        flags = _cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "amx-bf16", "bf16"})


def _cpu_flags() -> frozenset[str]:
    """Feature names from /proc/cpuinfo; elsewhere from torch, which knows AVX512-BF16 and AMX on Windows too."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    import torch

    flags = set()
    for name, probe in (("avx512_bf16", "_is_avx512_bf16_supported"), ("amx_bf16", "_is_amx_tile_supported")):
        if getattr(torch.cpu, probe, lambda: False)():
            flags.add(name)
    return frozenset(flags)


MIN_HALF_PRECISION_GAIN = 1.2  # below this, half precision on a CPU costs accuracy for nothing


@functools.cache
def cpu_matmul_rate(dtype_name: str) -> float:
    """GFLOP/s of a matrix product of this machine in this dtype: the best of a few, in about 0.1 s."""
    import torch

    size = 1024
    generator = torch.Generator().manual_seed(0)  # torch's own is the run's, and is left alone
    left, right = (torch.randn(size, size, generator=generator).to(getattr(torch, dtype_name)) for _ in range(2))
    seconds = []
    with torch.autocast("cpu", enabled=False):  # it would turn one dtype into the other
        for _ in range(6):
            started = time.perf_counter()
            left @ right
            seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e9


def fastest_cpu_dtype(real: tuple[str, ...]) -> str:
    """bf16 where it is faster, measured: an Intel core without AMX has the instructions, at half float32's rate."""
    if "bfloat16" not in real:
        return "float32"
    half, full = cpu_matmul_rate("bfloat16"), cpu_matmul_rate("float32")
    chosen = "bfloat16" if half >= MIN_HALF_PRECISION_GAIN * full else "float32"
    log.info("This CPU multiplies %.0f GFLOP/s in bfloat16 and %.0f in float32: computing in %s.", half, full, chosen)
    return chosen


@functools.cache
def settle_cpu_functions() -> None:
    """Call each of MKL's elementwise functions once, alone, before threads do; once a process.

    MKL chooses its kernel at a function's first call. Where two threads make that call together, one of them can be
    given a kernel of half the digits for its part of the tensor: a loss wrong by 1e-6, half of Adam's first step by
    3e-4, in one process of thirty (pytorch issue 188792; docs/log.md, experiment 31).
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)  # a single element is computed by this thread alone
        for name in _MKL_FUNCTIONS:
            getattr(torch, name)(one)


# What torch hands to MKL (ATen/cpu/vml.h).
_MKL_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp"),
    *("log", "log2", "log10", "sin", "sqrt", "tan", "tanh", "trunc"),
)


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor instead of giving it back to the system; once a process.

    By default each large tensor on a CPU is mapped afresh, and the kernel clears its pages again at every layer, which
    costs about a tenth of a forward pass (docs/log.md). In training the peak grows by a few per cent.

    Returns:
        Whether the C library took it; elsewhere than with glibc nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1  # malloc.h
    return all(mallopt(parameter, largest) == 1 for parameter in (m_trim_threshold, m_mmap_threshold))
