"""The fused loss and attention alone, beside what the hardware needs for their operations and their bytes at least."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from cartilha.machine.peaks import data_sheet_flops
from training_speed.flops import best_seconds, gemm_flops
from training_speed.setup import Shape, make_sampler, model_config

BOOLEAN_MASK = "mask, boolean"


def gemm(shape: Shape, dtype: str) -> dict[str, Any]:
    """Operations a second of the model's own matrix products, and the maker's figure where it is known."""
    rate = gemm_flops(model_config(shape), shape.tokens_per_step, getattr(torch, dtype), shape.device)
    return {"gemm_flops": rate, "known_peak": data_sheet_flops(_device_name(shape), dtype)}


def loss(shape: Shape, dtype: str, chunks: list[int], repeats: int = 5) -> dict[str, Any]:
    """Head and loss, forward and backward, at several sizes of a chunk.

    The floor: three products of 2 T d V operations; the logits written and read once, their gradient written once and
    read twice, the head read for both of its products a chunk and its gradient read and written in float32.
    """
    from cartilha.model import loss as fused
    from cartilha.model.head import Head

    config, compute = model_config(shape), getattr(torch, dtype)
    tokens, hidden, ids = shape.tokens_per_step, config.hidden_size, config.vocab_size
    states = torch.randn(tokens, hidden, device=shape.device).requires_grad_()
    weight = (0.02 * torch.randn(ids, hidden, device=shape.device)).requires_grad_()
    targets = torch.randint(0, ids, (tokens,), device=shape.device)
    peak, bandwidth = _limits(shape, dtype)
    rows = []
    for chunk in chunks:
        step = functools.partial(fused.linear_cross_entropy, states, Head(weight), targets, compute, chunk)
        seconds = best_seconds(lambda step=step: step().backward(), shape.device, repeats)
        moved = compute.itemsize * 5 * tokens * ids + -(-tokens // chunk) * ids * hidden * (2 * compute.itemsize + 8)
        floor = {"operations_s": 6.0 * tokens * hidden * ids / peak, "bytes_s": moved / bandwidth}
        rows.append({"chunk_tokens": chunk, "seconds": seconds, **floor, "share": sum(floor.values()) / seconds})
    return {"rows": rows, "peak_flops": peak, "bandwidth": bandwidth}


def attention(shape: Shape, dtype: str, kernels: list[str], repeats: int = 5) -> dict[str, Any]:
    """A layer's attention over a packed batch, forward and backward, and what segments of no length cost.

    The floor: 2 products forward and 5 backward (one of them anew) of n^2 d / 2 multiplications a head and segment.
    `BOOLEAN_MASK` stands for the mask as it was before it was made additive once for all layers. FlashAttention-3 comes
    last, since torch's own attention is not there any more then, and only where it is installed.
    """
    from cartilha.blocks.packing import stack
    from cartilha.model.attention import KERNELS, Kernel, document_attention
    from cartilha.model.flash_attention_3 import flash_attention_3

    config, compute = model_config(shape), getattr(torch, dtype)
    batch = stack(make_sampler(shape).blocks(0))
    lengths, heads = batch.segment_lengths.tolist(), config.num_attention_heads
    size = config.hidden_size // heads
    inputs = [
        torch.randn(shape.micro_batch, heads, shape.block_size, size, device=shape.device).to(compute).requires_grad_()
        for _ in range(3)
    ]
    peak, _ = _limits(shape, dtype)
    floor = 7 * sum(n * n for n in lengths) * size * heads / peak
    rows = []
    for kernel in [*kernels, *(["flash attention 3"] if "varlen" in kernels else [])]:
        if kernel == "flash attention 3" and not flash_attention_3(shape.device):
            continue
        of_segments = kernel in ("varlen", "flash attention 3")
        for capacity in (len(lengths), 2 * len(lengths), 8 * len(lengths)) if of_segments else (0,):
            made = KERNELS["mask" if kernel == BOOLEAN_MASK else kernel]
            with torch.autocast(shape.device, compute, enabled=compute != torch.float32):
                segments: Any = made.of(lengths, shape.block_size, torch.device(shape.device), capacity)
            if kernel == BOOLEAN_MASK:
                segments = dataclasses.replace(segments, added=segments.mask)

            def forward_and_backward(segments: Kernel = segments) -> None:
                with torch.autocast(shape.device, compute, enabled=compute != torch.float32):
                    attended = document_attention(torch.nn.Identity(), *inputs, None, segments=segments)[0]
                attended.sum().backward()

            seconds = best_seconds(forward_and_backward, shape.device, repeats)
            rows.append({"kernel": kernel, "capacity": capacity, "seconds": seconds, "share": floor / seconds})
    return {"rows": rows, "num_segments": len(lengths), "floor_s": floor}


def _limits(shape: Shape, dtype: str) -> tuple[float, float]:
    """Operations a second (the maker's figure, else of a large product) and bytes a second (of a large copy)."""
    compute = getattr(torch, dtype)
    side = 8192 if shape.device == "cuda" else 1024
    left, right = (torch.randn(side, side, device=shape.device).to(compute) for _ in range(2))
    measured = 2.0 * side**3 / best_seconds(lambda: left @ right, shape.device, 3)
    source = torch.zeros(2**28 if shape.device == "cuda" else 2**24, dtype=torch.uint8, device=shape.device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / best_seconds(lambda: target.copy_(source), shape.device, 3)
    return data_sheet_flops(_device_name(shape), dtype) or measured, bandwidth


def _device_name(shape: Shape) -> str:
    return torch.cuda.get_device_name() if shape.device == "cuda" else "cpu"
