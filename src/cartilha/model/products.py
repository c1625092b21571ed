"""Matrix products that are added to float32 sums, and the dtype of products on a CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cartilha.errors import log
from cartilha.machine.cpu import cpu_matmul_rates
from cartilha.machine.devices import dtype_name

PIECE = 1 << 22  # numbers of a product at a time that is rounded before it is added
MIN_FLOAT32_GAIN = 1.2  # a smaller gain over half precision is lost again in the casts


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
    """Add `factor * left @ right` to `total`; if it is float32, if possible without rounding the product before."""
    if total.dtype != torch.float32:
        total.add_(left @ right, alpha=factor)
    elif left.dtype == torch.float32:
        total.addmm_(left, right, alpha=factor)
    elif sums_in_float32(left.device.type, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, alpha=factor, out=total)
    else:  # in pieces: a product in another dtype than the sum takes a copy of itself in that of the sum
        size = max(1, PIECE // total[0].numel())
        for begin in range(0, len(total), size):
            rows = slice(begin, begin + size)
            total[rows].add_(left[rows] @ right, alpha=factor)


@functools.cache
def sums_in_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this device can add half-precision products to a float32 matrix without rounding them (CUDA can)."""
    factor = torch.full((16, 16), 1 / 16, dtype=dtype, device=device_type)
    total = torch.ones(16, 16, device=device_type)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 1 + 1 / 16).all())


@functools.cache
def cpu_product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU multiplies activations of `dtype`: float32 where that is faster.

    Cores with AVX512-BF16 and without AMX multiply bfloat16 at half the rate of float32 (docs/log.md, experiment 32).
    Nothing is lost: products of half-precision numbers are summed in float32 either way, and weights stay unrounded.
    """
    if dtype == torch.float32:
        return dtype
    name, rates = dtype_name(dtype), cpu_matmul_rates()
    half, full = rates.get(name, 0.0), rates["float32"]  # emulated, where it has no rate
    if full < MIN_FLOAT32_GAIN * half:
        return dtype
    words = "This CPU multiplies %.0f GFLOP/s in %s and %.0f in float32: training multiplies in float32."
    log.info(words, half, name, full)
    return torch.float32
