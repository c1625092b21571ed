"""The head: how logits follow from the last hidden states, found from the model itself.

Most heads are one matrix. Some add a bias (Phi, GPT-J), some scale (Cohere, Granite, MiniCPM), some cap the logits
(Gemma 2). The fused loss computes logits by itself, so it must do what the model does: known values are planted in the
head's place, and what the model makes of them must come out to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

PROBE_TOKENS = 16
PLANTED_RANGE = 12.0  # planted logits are sinh of -12 to 12: small ones show a scale, those up to 81,377 any cap
TINY = 2.0**-20  # so small that no cap bends it
SAME_STATES = 1e-3  # of their spread; what a position sees and should not moves them by far more


class HeadError(ValueError):
    """What a model does that no `HeadShape` describes, as the end of a sentence about it."""


@dataclass(frozen=True)
class HeadShape:
    """What a model does beside the product with the head's matrix.

    logits = cap * tanh(scale * (input_scale * states @ weight.T + bias) / cap); without a cap no tanh.

    Attributes:
        input_scale: Factor of the hidden states before the head.
        scale: Factor of what the head gives.
        cap: Bound of the logits' size; None for none (Gemma 2: arXiv:2408.00118, section 2).
    """

    input_scale: float = 1.0
    scale: float = 1.0
    cap: float | None = None

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and cap what the head gives; its memory is used again."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is None:
            return logits
        bounded = logits.div_(self.cap).tanh_()  # which autograd, where it is on, must find as it is
        return bounded * self.cap if bounded.requires_grad else bounded.mul_(self.cap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """The derivative of the finished logits by what the head gives: a factor, or one for each logit."""
        return self.scale if self.cap is None else (logits / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass(frozen=True)
class Head:
    """The head of a model.

    Attributes:
        weight: Shape (num_ids, hidden_size).
        bias: Shape (num_ids,), or None.
        shape: Scales and cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    shape: HeadShape = HeadShape()

    def logits(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Float32 logits of scaled hidden states (`forward.hidden_states` scales them); the product runs in `dtype`.

        Args:
            states: Shape (num_tokens, hidden_size).
            dtype: Of the matrix product.
        """
        return self.finish((states.to(dtype) @ self.weight.to(dtype).T).float())

    def finish(self, product: torch.Tensor) -> torch.Tensor:
        """The logits from states @ weight.T, whose memory is used again."""
        return self.shape.finish(product if self.bias is None else product.add_(self.bias))


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """The head's matrix, shape (num_ids, hidden_size)."""
    return head_of(model).weight


def head_of(model: PreTrainedModel) -> Head:
    """The model's head; one that was not looked at yet (`find_head_shape`) is taken for a plain matrix.

    Raises:
        HeadError: It is no linear layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise HeadError("their head is not a matrix")
    return Head(layer.weight, layer.bias, getattr(model, "head_shape", HeadShape()))


@torch.no_grad()
def find_head_shape(model: PreTrainedModel) -> HeadShape:
    """Run a few tokens through the model to see how its logits follow from its hidden states; kept with the model.

    Raises:
        HeadError: They follow in another way than `HeadShape` says, or a position sees what comes after it.
    """
    if model.base_model is model:  # Llama 4 in transformers 5
        raise HeadError("their layers cannot be run without their head")
    head = head_of(model).weight
    length = min(PROBE_TOKENS, int(getattr(model.config, "max_position_embeddings", None) or PROBE_TOKENS))
    ids = torch.arange(2 * length, device=model.device).view(2, length) * 7919 % len(head)
    ids[1, : length // 2] = ids[0, : length // 2]
    planted = torch.linspace(-PLANTED_RANGE, PLANTED_RANGE, len(head), dtype=torch.float64).sinh_().float()
    planted[0] = TINY
    planted = planted.to(head.device).expand(2, length, len(head)).clone()
    inputs: list[torch.Tensor] = []

    def plant(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        inputs.append(arguments[0])
        return planted.clone()  # some models change logits in place

    hook = model.get_output_embeddings().register_forward_hook(plant)
    try:
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        logits = model(**arguments).logits
        states = model.base_model(**arguments).last_hidden_state
    finally:
        hook.remove()
    if not _same(states[0, : length // 2], states[1, : length // 2]):
        raise HeadError("a position sees what comes after it")
    if len(inputs) != 1 or inputs[0].shape != states.shape or logits.shape != planted.shape:
        raise HeadError("their logits are not those of the last hidden states")
    shape = _fitted(states, inputs[0], planted, logits)
    model.head_shape = shape  # type: ignore[assignment]  # torch types attributes as modules and tensors
    return shape


def _fitted(states: torch.Tensor, inputs: torch.Tensor, planted: torch.Tensor, logits: torch.Tensor) -> HeadShape:
    ratio = float((inputs.double() * states.double()).sum() / states.double().square().sum())
    input_scale = next((s for s in _candidates(ratio) if _same(inputs, states * s)), None)
    if input_scale is None:
        raise HeadError("they change the hidden states before the head by more than a scale")
    slope, largest = float(logits[0, 0, 0]) / TINY, float(logits.max())
    for scale in _candidates(slope):
        for cap in (None, *(cap for cap in _candidates(largest) if cap > 0)):
            shape = HeadShape(input_scale, scale, cap)
            if any(torch.equal(found, logits) for found in _variants(shape, planted)):
                return shape
    raise HeadError("they change the logits after the head by more than a scale or a soft cap")


def _variants(shape: HeadShape, planted: torch.Tensor) -> Iterator[torch.Tensor]:
    """The finished logits, multiplied by the scale, and divided by its inverse, which rounds otherwise."""
    yield shape.finish(planted.clone())
    yield HeadShape(cap=shape.cap).finish(planted / (1 / shape.scale))


def _candidates(value: float) -> list[float]:
    """What a configuration may say where this was measured: one, a round number, or one divided by a round number."""
    if not math.isfinite(value) or value == 0:
        return []
    if abs(value - 1.0) < 1e-6:
        return [1.0]
    return [number for digits in (3, 5, 7) for number in (_rounded(value, digits), 1 / _rounded(1 / value, digits))]


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    spread = float(expected.std())
    return found.shape == expected.shape and float((found - expected).abs().max()) <= SAME_STATES * spread
