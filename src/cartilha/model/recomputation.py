"""Gradient checkpointing (arXiv:1604.06174): a layer keeps only its input and is computed again in the backward pass.

transformers' own switch works in training mode only, and our models are trained in evaluation mode (no dropout).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cartilha.errors import UserError
from cartilha.model.weight_gradients import same_again


def layers_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that can be computed again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Have a model, in place, compute its layers again in the backward pass, to the same figures, or refuse it."""
    layers = layers_of(model)
    if not layers:
        kind = model.config.model_type
        raise UserError(f"Models of the type {kind} cannot be trained with --gradient_checkpointing; leave it out.")
    for layer in layers:
        layer.forward = functools.partial(_computed_twice, layer.forward)


def _computed_twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    again = None if torch.compiler.is_compiling() else same_again()
    if again is not None:
        kwargs["context_fn"] = lambda: (nullcontext(), again)
    # Without reentry, arguments may be of any type, such as the segments.
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
