"""Matrix products that are added to float32 sums."""

from __future__ import annotations

import functools

import torch


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float = 1.0) -> None:
    """Add `factor * left @ right` to `total`, which is float32; the product is not rounded where that can be had."""
    if left.dtype == torch.float32:
        total.addmm_(left, right, alpha=factor)
    elif sums_in_float32(left.device.type, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, alpha=factor, out=total)
    else:
        total.add_(left @ right, alpha=factor)


@functools.cache
def sums_in_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether half-precision products can be added to a float32 matrix at once, as CUDA can: found by doing it."""
    factor = torch.full((16, 16), 1 / 16, dtype=dtype, device=device_type)
    total = torch.ones(16, 16, device=device_type)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 1 + 1 / 16).all())
