"""What a token costs and what the hardware could do: the two sides of a share of peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch


def matrices(config: Any) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many) of every weight that is multiplied; tables that are only looked up are none."""
    hidden, inner, layers = config.hidden_size, config.ffn_dim, config.num_hidden_layers
    return [
        (hidden, hidden, 4 * layers),
        (hidden, inner, layers),
        (inner, hidden, layers),
        (hidden, config.vocab_size, 1),
    ]


def flops_per_token(config: Any, block_size: int) -> tuple[float, float]:
    """Of training: 6N, N being the weights that are multiplied; and with the causal half of attention, 6 L d T."""
    products = 6.0 * sum(rows * columns * count for rows, columns, count in matrices(config))
    return products, products + 6.0 * config.num_hidden_layers * config.hidden_size * block_size


def best_seconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """The shortest of a few times; the first call is not counted."""
    times = []
    for _ in range(repeats + 1):
        _synchronize(device)
        started = time.perf_counter()
        function()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def gemm_flops(config: Any, num_tokens: int, dtype: torch.dtype, device: str, repeats: int = 3) -> float:
    """Operations a second of the model's own products: forward, and both gradients, of each matrix as often as it is.

    The head is taken in pieces of 1,024 tokens, as the fused loss has it.
    """
    seconds = operations = 0.0
    for inputs, outputs, count in matrices(config):
        pieces = max(1, num_tokens // 1024) if outputs == config.vocab_size else 1
        rows = num_tokens // pieces
        states, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inputs), (outputs, inputs)))
        gradient = torch.randn(rows, outputs, device=device).to(dtype)
        for left, right in ((states, weight.T), (gradient, weight), (gradient.T, states)):
            seconds += count * pieces * best_seconds(_product(left, right), device, repeats)
            operations += count * pieces * 2.0 * rows * inputs * outputs
    return operations / seconds


def _product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: left @ right


def median(values: Iterable[float]) -> float:
    import statistics

    return statistics.median(values)
