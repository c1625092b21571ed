"""The head: how logits follow from the last hidden states, found from the model itself.

Some heads add a bias (Phi, GPT-J), scale (Cohere, Granite, MiniCPM) or cap (Gemma 2), and the fused loss must do so,
too. Known values replace the head's output once; `HeadShape` must give what the model makes of them, to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cartilha.errors import UserError, first_line
from cartilha.machine.memory import is_out_of_memory

PROBE_TOKENS = 16
PLANTED_RANGE = 12.0  # planted logits are sinh of -12 to 12: small ones show a scale, those up to 81,377 any cap
TINY = 2.0**-20  # so small that no cap bends it
SAME_STATES = 1e-3  # of their spread; a position that sees what comes after it moves them by far more


def unsupported(model: PreTrainedModel, reason: str) -> UserError:
    """The error for models of this type; `reason` is a sentence about them."""
    return UserError(
        f"Models of the type {model.config.model_type} are not supported, since {reason}; choose a decoder of text "
        "such as opt, gpt2, llama or qwen3."
    )


def body_of(model: PreTrainedModel) -> Any:
    """All of a model but its head, which gives the last hidden states."""
    if model.base_model is not model:
        return model.base_model
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    if len(parts) != 1:
        raise unsupported(model, "their layers cannot be run without their head")
    return parts[0]  # Llama 4: its models of text are named as parts of models of images


@dataclass(frozen=True)
class HeadShape:
    """What a model does besides the product with the head's matrix.

    logits = cap * tanh(scale * (input_scale * states @ weight.T + bias) / cap); without a cap no tanh.
    """

    input_scale: float = 1.0  # of the hidden states before the head
    scale: float = 1.0  # of the head's output
    cap: float | None = None  # bound of the logits' size (Gemma 2: arXiv:2408.00118, section 2)

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and cap the head's output, whose memory is reused."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.cap is None:
            return logits
        bounded = logits.div_(self.cap).tanh_()  # which autograd needs unchanged
        return bounded * self.cap if bounded.requires_grad else bounded.mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of the finished logits by the head's output: one factor, or one for each logit."""
        return self.scale if self.cap is None else (logits / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass(frozen=True)
class Head:
    """The head of a model: a weight of shape (num_ids, hidden_size), perhaps a bias (num_ids,), scales and cap."""

    weight: Tensor
    bias: Tensor | None = None
    shape: HeadShape = HeadShape()

    def logits(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """Float32 logits of hidden states as `forward.hidden_states` gives them; the product is in `dtype`."""
        return self.finish((states.to(dtype) @ self.weight.to(dtype).T).float())

    def finish(self, product: Tensor) -> Tensor:
        """The logits from states @ weight.T, whose memory is reused."""
        return self.shape.finish(product if self.bias is None else product.add_(self.bias))


def head_inputs(model: PreTrainedModel, states: Tensor) -> Tensor:
    """What the head reads: the last hidden states, through the model's own layers before it, and scaled, if so."""
    before: Any = getattr(model, "before_head", ())
    scale = head_of(model).shape.input_scale
    for layers in before:
        states = layers(states)
    return states if scale == 1.0 else states * scale


def head_of(model: PreTrainedModel) -> Head:
    """The model's head, a plain matrix unless `find_head_shape` has found more; one of another kind is refused."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        raise unsupported(model, "their head is not a matrix")
    return Head(layer.weight, layer.bias, getattr(model, "head_shape", HeadShape()))


@torch.no_grad()
def find_head_shape(model: PreTrainedModel) -> HeadShape:
    """Find out with a few tokens how logits follow from hidden states; the shape is kept with the model.

    A UserError refuses a model that no `HeadShape` describes, and one whose positions see what comes after them: every
    figure would be wrong.
    """
    body, head = body_of(model), head_of(model).weight
    longest = int(getattr(model.config, "max_position_embeddings", None) or PROBE_TOKENS)
    length = min(PROBE_TOKENS, longest) if longest > 0 else PROBE_TOKENS  # XLNet says -1, for no limit
    ids = torch.arange(2 * length, device=model.device).view(2, length) * 7919 % len(head)
    ids[1, : length // 2] = ids[0, : length // 2]
    planted = torch.linspace(-PLANTED_RANGE, PLANTED_RANGE, len(head), dtype=torch.float64).sinh_().float()
    planted[0] = TINY
    planted = planted.to(head.device).expand(2, length, len(head)).clone()
    inputs: list[Tensor] = []

    def plant(module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(arguments[0])
        return planted.clone()  # some models change logits in place

    hook = model.get_output_embeddings().register_forward_hook(plant)
    try:
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        logits = model(**arguments).logits
        states = body(**arguments).last_hidden_state
    except Exception as error:  # models of other people may do anything here
        if is_out_of_memory(error):
            raise
        raise unsupported(model, f"a few tokens of text end in an error ({first_line(error)[:120]})") from error
    finally:
        hook.remove()
    if not _same(states[0, : length // 2], states[1, : length // 2]):
        raise unsupported(model, "a position sees what comes after it")
    if len(inputs) != 1 or inputs[0].shape != states.shape or logits.shape != planted.shape:
        raise unsupported(model, "their logits are not those of the last hidden states")
    input_scale = _input_scale(states, inputs[0])
    if input_scale is None and (before := _layers_before_the_head(model, states, inputs[0])) is not None:
        # A module of its own would be saved twice. torch types attributes as modules and tensors.
        model.before_head, input_scale = (before,), 1.0  # type: ignore[assignment]
    if input_scale is None:
        raise unsupported(model, "they change the hidden states before the head by more than a scale")
    shape = _fitted(input_scale, planted, logits)
    if shape is None:
        raise unsupported(model, "they change the logits after the head by more than a scale or a soft cap")
    model.head_shape = shape  # type: ignore[assignment]  # torch types attributes as modules and tensors
    return shape


def _input_scale(states: Tensor, inputs: Tensor) -> float | None:
    ratio = float((inputs.double() * states.double()).sum() / states.double().square().sum())
    return next((scale for scale in _candidates(ratio) if _same(inputs, states * scale)), None)


def _layers_before_the_head(model: PreTrainedModel, states: Tensor, inputs: Tensor) -> torch.nn.Module | None:
    """The part of the model, beside its body and its head, that makes the head's inputs (ModernBERT's decoder)."""
    others = [part for part in model.children() if part not in (body_of(model), model.get_output_embeddings())]
    for part in others:
        try:
            if _same(part(states), inputs):
                return part
        except Exception as error:  # parts for something else take other inputs
            if is_out_of_memory(error):
                raise
    return None


def _fitted(input_scale: float, planted: Tensor, logits: Tensor) -> HeadShape | None:
    slope, largest = float(logits[0, 0, 0]) / TINY, float(logits.max())
    for scale in _candidates(slope):
        for cap in (None, *(cap for cap in _candidates(largest) if cap > 0)):
            shape = HeadShape(input_scale, scale, cap)
            multiplied = shape.finish(planted.clone())
            divided = HeadShape(cap=cap).finish(planted / (1 / scale))  # which rounds differently
            if torch.equal(multiplied, logits) or torch.equal(divided, logits):
                return shape
    return None


def _candidates(value: float) -> list[float]:
    """Factors that a configuration may name where this one was measured: 1, a round number, or 1 / a round number."""
    if not math.isfinite(value) or value == 0:
        return []
    if abs(value - 1.0) < 1e-6:
        return [1.0]
    rounded = [(float(f"{value:.{digits}e}"), float(f"{1 / value:.{digits}e}")) for digits in (2, 4, 6)]
    return [number for direct, inverse in rounded for number in (direct, 1 / inverse)]


def _same(found: Tensor, expected: Tensor) -> bool:
    spread = float(expected.std())
    return found.shape == expected.shape and float((found - expected).abs().max()) <= SAME_STATES * spread
