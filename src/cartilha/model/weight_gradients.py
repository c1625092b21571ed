"""On a CPU, a weight's gradient is added to those already there by the product that makes it.

Autograd makes the gradient of each use of a weight as a tensor of its own and adds it afterwards. For every micro-batch
that is memory for the largest matrix twice and a pass over all gradients, which a CPU feels: 5 % of a step of four
micro-batches (docs/log.md). Matrix products can add to what is there as they go (Megatron-LM does so on GPUs as
"gradient accumulation fusion"). Whatever is done otherwise in a model goes through autograd as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from cartilha.model.products import add_product, cpu_product_dtype

_factor: ContextVar[float | None] = ContextVar("factor of the nll whose gradients are added in place", default=None)


@contextmanager
def weight_gradients_in_place(device_type: str, factor: float) -> Iterator[None]:
    """A forward pass within it, and its backward pass, add the gradients of weights to `weight.grad` by themselves.

    `torch.autograd.grad` must not be asked for those gradients then, and a forward pass must have its backward pass:
    the head's gradient is added by the first. On other devices than CPUs nothing changes.

    Args:
        device_type: Of the model.
        factor: What the summed nll is multiplied by before `backward()`.
    """
    if device_type != "cpu":
        yield
        return
    token = _factor.set(factor)
    try:
        with _OwnLayers():
            yield
    finally:
        _factor.reset(token)


def same_again() -> AbstractContextManager[None] | None:
    """For a part of this forward pass that is computed a second time in the backward pass; None outside of one."""
    factor = _factor.get()
    return None if factor is None else weight_gradients_in_place("cpu", factor)


def factor_in_place(weight: torch.Tensor) -> float | None:
    """Whether this weight's gradient is to be added by whoever computes it: the factor of the nll; None if not."""
    is_ours = weight.requires_grad and weight.is_leaf and weight.device.type == "cpu" and torch.is_grad_enabled()
    return _factor.get() if is_ours else None


def gradient_of(weight: torch.Tensor) -> torch.Tensor:
    """The weight's gradient so far, to be added to; zeros where there is none."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _OwnLayers(TorchFunctionMode):
    """Computes linear layers and embeddings as the classes below do; every other function as ever."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = _OWN.get(func)
        found = own(*args, **(kwargs or {})) if own else None
        return func(*args, **(kwargs or {})) if found is None else found


def _linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    return None if factor_in_place(weight) is None else _Linear.apply(states, weight, bias, False)


def _addmm(bias: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> Any:
    """GPT-2's linear layer, whose weight has the shape (in, out)."""
    return None if kwargs or factor_in_place(weight) is None else _Linear.apply(states, weight, bias, True)


def _embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    unusual = max_norm is not None or scale_grad_by_freq or sparse
    return None if unusual or factor_in_place(weight) is None else _Embedding.apply(ids, weight, padding_idx)


_OWN: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
}


class _Linear(torch.autograd.Function):
    """states @ weight.T + bias, in autocast's dtype where it is on; the weight is kept once, as it is.

    What is kept and given on is in that dtype; the product itself may be computed in float32 (`cpu_product_dtype`).
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool
    ) -> torch.Tensor:
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
        ctx.product_dtype = cpu_product_dtype(half)
        with torch.autocast("cpu", enabled=False):
            matrix = (weight.T if is_transposed else weight).to(ctx.product_dtype)
            offset = bias if bias is None else bias.to(ctx.product_dtype)
            result = F.linear(states.to(ctx.product_dtype), matrix, offset).to(half)
        ctx.save_for_backward(states.to(half))
        # The weight itself, whose `grad` is added to: a saved tensor may come back as an alias.
        ctx.weight, ctx.is_transposed, ctx.states_dtype = weight, is_transposed, states.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (states,), weight = ctx.saved_tensors, ctx.weight
        gradient = grad_outputs[0].to(ctx.product_dtype)
        matrix = (weight.T if ctx.is_transposed else weight).to(ctx.product_dtype)
        by_states = (gradient @ matrix).to(ctx.states_dtype) if ctx.needs_input_grad[0] else None
        rows, inputs = gradient.flatten(0, -2), states.flatten(0, -2).to(ctx.product_dtype)
        left, right = (inputs, rows) if ctx.is_transposed else (rows, inputs)
        add_product(gradient_of(weight), left.T, right)
        return by_states, None, rows.sum(dim=0) if ctx.needs_input_grad[2] else None, None


class _Embedding(torch.autograd.Function):
    """Rows of the weight; the row of `padding_idx` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, ...]:
        (ids,), weight = ctx.saved_tensors, ctx.weight
        rows, gradient = ids.flatten(), grad_outputs[0].flatten(0, -2).to(weight.dtype)
        if ctx.padding_idx is not None:
            gradient = gradient.masked_fill((rows == ctx.padding_idx)[:, None], 0.0)
        gradient_of(weight).index_add_(0, rows, gradient)
        return None, None, None
