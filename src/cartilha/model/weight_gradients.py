"""On a CPU, a weight's gradient is added to the earlier ones by the matrix product that computes it.

Autograd makes the gradient of each use of a weight a separate tensor and adds it afterwards. Every micro-batch then
needs the largest matrix twice and a pass over all gradients, 5 % of a step of four (docs/log.md). Here the product adds
to them directly, as in Megatron-LM's "gradient accumulation fusion". Only linear layers and embeddings are changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cartilha.model.products import add_product, cpu_product_dtype

_factor: ContextVar[float | None] = ContextVar("factor of the nll", default=None)
_returned: ContextVar[bool] = ContextVar("gradients are returned to autograd", default=False)


@contextmanager
def weight_gradients_in_place(device_type: str, factor: float, *, returned: bool = False) -> Iterator[None]:
    """A forward pass in this context, with its backward pass, adds the gradients of weights to `weight.grad` directly.

    `torch.autograd.grad` must not ask for these gradients, and every forward pass needs its backward pass, since it has
    already added the head's gradient. `factor` is what the summed nll is multiplied by before `backward()`. If they are
    to be `returned`, gradients go to autograd instead, whose hooks then run. Only on CPUs anything changes.
    """
    if device_type != "cpu":
        yield
        return
    tokens = _factor.set(factor), _returned.set(returned)
    try:
        with _OwnLayers():
            yield
    finally:
        _factor.reset(tokens[0])
        _returned.reset(tokens[1])


def same_again() -> AbstractContextManager[None] | None:
    """The same context for a part of the forward pass that is computed again in the backward pass; None outside."""
    factor = _factor.get()
    return None if factor is None else weight_gradients_in_place("cpu", factor, returned=_returned.get())


def factor_in_place(weight: Tensor) -> float | None:
    """The factor of the nll if whoever computes this weight's gradient must add it in place; None if autograd does."""
    in_place = weight.requires_grad and computes_in_place(weight) and not _returned.get()
    return _factor.get() if in_place else None


def computes_in_place(weight: Tensor) -> bool:
    """Whether products with this weight are ours; those with a frozen one are, too, for the sake of their dtype."""
    is_ours = weight.is_leaf and weight.device.type == "cpu" and weight.is_floating_point()
    return is_ours and torch.is_grad_enabled() and _factor.get() is not None


def gradient_of(weight: Tensor) -> Tensor:
    """The weight's gradient so far, to add to; zeros if there is none."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _OwnLayers(TorchFunctionMode):
    """Computes linear layers and embeddings with the classes below, and calls every other function as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = _OWN.get(func)
        found = own(*args, **(kwargs or {})) if own else None
        return func(*args, **(kwargs or {})) if found is None else found


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return _Linear.apply(states, weight, bias, False) if computes_in_place(weight) else None


def _addmm(bias: Tensor, states: Tensor, weight: Tensor, **kwargs: Any) -> Any:
    """GPT-2's linear layer, whose weight has the shape (in, out)."""
    return _Linear.apply(states, weight, bias, True) if not kwargs and computes_in_place(weight) else None


def _embedding(
    ids: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, **options: Any
) -> Any:
    unusual = max_norm is not None or options.get("scale_grad_by_freq") or options.get("sparse")
    return None if unusual or factor_in_place(weight) is None else _Embedding.apply(ids, weight, padding_idx)


_OWN: dict[Any, Callable[..., Any]] = {F.linear: _linear, torch.addmm: _addmm, F.embedding: _embedding}


class _Linear(torch.autograd.Function):
    """states @ weight.T + bias; the weight is kept once, as it is, and a frozen one gets no gradient.

    Inputs are kept and results are returned in autocast's dtype if it is on. The product itself may be computed in
    float32 (`cpu_product_dtype`).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else states.dtype
        ctx.product_dtype = cpu_product_dtype(half)
        with torch.autocast("cpu", enabled=False):
            matrix = (weight.T if is_transposed else weight).to(ctx.product_dtype)
            offset = bias if bias is None else bias.to(ctx.product_dtype)
            result = F.linear(states.to(ctx.product_dtype), matrix, offset).to(half)
        # A frozen weight needs no states for its gradient.
        ctx.save_for_backward(states.to(half) if weight.requires_grad else None)
        # Not by save_for_backward, which may return an alias: gradients are added to the weight's own `grad`.
        ctx.weight, ctx.is_transposed, ctx.states_dtype = weight, is_transposed, states.dtype
        ctx.returned = _returned.get()
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (states,), weight = ctx.saved_tensors, ctx.weight
        gradient = grad_outputs[0].to(ctx.product_dtype)
        matrix = (weight.T if ctx.is_transposed else weight).to(ctx.product_dtype)
        by_states = (gradient @ matrix).to(ctx.states_dtype) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        by_weight = None
        if weight.requires_grad:
            inputs = states.flatten(0, -2).to(ctx.product_dtype)
            left, right = (inputs, rows) if ctx.is_transposed else (rows, inputs)
            if ctx.returned:
                by_weight = (left.T @ right).to(weight.dtype)
            else:
                add_product(gradient_of(weight), left.T, right)
        return by_states, by_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None, None


class _Embedding(torch.autograd.Function):
    """Rows of the weight; the row of `padding_idx` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        (ids,), weight = ctx.saved_tensors, ctx.weight
        rows, gradient = ids.flatten(), grad_outputs[0].flatten(0, -2).to(weight.dtype)
        if ctx.padding_idx is not None:
            gradient = gradient.masked_fill((rows == ctx.padding_idx)[:, None], 0.0)
        gradient_of(weight).index_add_(0, rows, gradient)
        return None, None, None
