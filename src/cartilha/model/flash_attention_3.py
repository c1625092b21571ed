"""FlashAttention-3 (arXiv:2407.08608) in place of torch's variable-length attention, where it is installed and right.

torch knows how to call it (`torch.nn.attention`), for cards of capability 9 (H100, H200). What it gives is held against
torch's own attention once, before anything is computed by it.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from cartilha.errors import first_line, log

PACKAGE, IMPLEMENTATION = "flash_attn_interface", "FA3"
LARGEST_DIFFERENCE = 0.02  # norm of the difference to norm; bfloat16 rounds by 0.004


@functools.cache
def flash_attention_3(device_type: str) -> bool:
    """Have torch compute variable-length attention by it in this process, and say so; False where it cannot be used."""
    # torch 2.10 has no such function.
    implementations: list[str] = getattr(nn.attention, "list_flash_attention_impls", list)()
    if importlib.util.find_spec(PACKAGE) is None or IMPLEMENTATION not in implementations:
        return False
    own = _attended(device_type)
    try:
        nn.attention.activate_flash_attention_impl(IMPLEMENTATION)
        pairs = zip(_attended(device_type), own, strict=True)
        differences = [float((found - expected).norm() / expected.norm()) for found, expected in pairs]
        if all(difference <= LARGEST_DIFFERENCE for difference in differences):
            log.info("Attention is computed by FlashAttention-3, which is installed.")
            return True
        reason = f"it differs from torch's own by {max(differences):.2g}"
    except Exception as error:  # it may be built for another card, or another version of torch
        reason = first_line(error)
    if nn.attention.current_flash_attention_impl() is not None:
        nn.attention.restore_flash_attention_impl()
    log.warning("FlashAttention-3 is installed and cannot be used (%s): torch's own attention is.", reason)
    return False


def _attended(device_type: str) -> list[Tensor]:
    """Attention within segments of 100, 1, 0 and 27 tokens with shared keys, and its gradients, all float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((128, 4, 64), (128, 2, 64), (128, 2, 64))
    heads = [torch.randn(shape, generator=generator).to(device_type, torch.bfloat16) for shape in shapes]
    query, key, value = inputs = [tensor.requires_grad_() for tensor in heads]
    bounds = torch.tensor([0, 100, 101, 101, 128], dtype=torch.int32, device=device_type)
    output = varlen_attn(query, key, value, bounds, bounds, 128, 128, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(output, Tensor)
    return [tensor.detach().float() for tensor in (output, *torch.autograd.grad(output.float().square().sum(), inputs))]
