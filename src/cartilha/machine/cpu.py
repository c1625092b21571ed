"""The CPU: which dtypes it has, how fast it multiplies, and settings of the libraries that compute on it."""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import time
import timeit
from contextlib import suppress
from pathlib import Path

from cartilha.errors import log


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(*names: str) -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(names):
                return line.split(":", 1)[1].strip()
    return ""


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (avx512_bf16 or AMX); emulated bf16 is 44 to 499 times slower."""
    flags = frozenset(_cpuinfo("flags", "Features").split()) or _flags_from_torch()  # without /proc/cpuinfo
    return bool(flags & {"avx512_bf16", "amx_bf16", "amx-bf16", "bf16"})


def _flags_from_torch() -> frozenset[str]:
    import torch

    probes = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return frozenset(flag for flag, probe in probes.items() if getattr(torch.cpu, probe, lambda: False)())


MIN_HALF_PRECISION_GAIN = 1.3  # a smaller gain is not worth the accuracy that half precision costs, and may be noise
PRODUCT_SIZE, MIN_ROUNDS, MAX_ROUNDS, ENOUGH_S = 1024, 3, 6, 0.2


@functools.cache
def cpu_matmul_rates() -> dict[str, float]:
    """GFLOP/s of a matrix product in float32, and in bfloat16 where the CPU has it, measured in about 0.2 s.

    The dtypes take turns and the fastest product of each counts, so that other programs change their ratio little.
    The time is that on the clock: processor time would miss a thread that waits for the others.
    """
    import torch

    names = ("float32", "bfloat16") if cpu_has_bfloat16() else ("float32",)
    generator = torch.Generator().manual_seed(0)  # torch's own generator belongs to the run
    numbers = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, generator=generator)
    factors = {name: numbers.to(getattr(torch, name)) for name in names}
    seconds = dict.fromkeys(names, math.inf)
    begun, rounds = time.perf_counter(), 0
    with torch.autocast("cpu", enabled=False):  # autocast would turn one dtype into the other
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and time.perf_counter() - begun < ENOUGH_S):
            for name, factor in factors.items():
                once = timeit.timeit(functools.partial(torch.mm, factor, factor), number=1)
                seconds[name] = min(seconds[name], once)
            rounds += 1
    return {name: 2 * PRODUCT_SIZE**3 / least / 1e9 for name, least in seconds.items()}


@functools.cache  # said once, however many models are loaded
def fastest_cpu_dtype(real: tuple[str, ...]) -> str:
    """The faster one of these dtypes, measured: Intel cores without AMX compute bf16 at half the rate of float32."""
    if "bfloat16" not in real:
        return "float32"
    rates = cpu_matmul_rates()
    half, full = rates["bfloat16"], rates["float32"]
    chosen = "bfloat16" if half >= MIN_HALF_PRECISION_GAIN * full else "float32"
    log.info(
        "This CPU multiplies %.0f GFLOP/s in bfloat16 and %.0f in float32: computing in %s (bfloat16 is taken from %s "
        "times the rate of float32 on).",
        *(half, full, chosen, MIN_HALF_PRECISION_GAIN),
    )
    return chosen


@functools.cache
def settle_cpu_functions() -> None:
    """Call each of MKL's elementwise functions once from a single thread; done once per process.

    MKL chooses a function's kernel at its first call. When two threads make that call together, one of them can get a
    kernel with half the digits for its part of the tensor. In one process of thirty this made a loss wrong by 1e-6 and
    half of Adam's first step by 3e-4 (pytorch issue 188792; docs/log.md, experiment 31).
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)  # one element is computed by one thread
        for name in _MKL_FUNCTIONS.split():
            getattr(torch, name)(one)


# The functions that torch takes from MKL (ATen/cpu/vml.h).
_MKL_FUNCTIONS = "acos asin atan cos erf erfc erfinv exp log log2 log10 sin sqrt tan tanh trunc"


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor; returns whether this was possible.

    By default each large tensor on a CPU is mapped afresh, and the kernel clears its pages again at every layer, which
    costs about a tenth of a forward pass (docs/log.md). In training the peak grows by a few per cent.
    """
    return _keep_up_to(2**31 - 1)


def give_back_freed_memory(size: int = 2**16) -> bool:
    """Have glibc give tensors of so many bytes back as soon as they are freed; returns whether it can.

    A sharded model frees and takes its layers all the time, which left twice its memory in holes. Lean weights,
    adapters and layers that are computed twice leave fewer: 0.8 of the memory. But fresh pages must be cleared, so
    that steps take 1.6 to 1.9 times as long (docs/log.md, section 63).
    """
    return _keep_up_to(size)


def give_back_holes() -> None:
    """Have glibc give back what is free between the tensors that it holds, such as after loading and validation."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _keep_up_to(size: int) -> bool:
    """Have glibc keep freed memory up to this many bytes."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    return all(mallopt(parameter, size) == 1 for parameter in (m_trim_threshold, m_mmap_threshold))
