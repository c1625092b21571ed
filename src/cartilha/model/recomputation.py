"""Gradient checkpointing (arXiv:1604.06174): a layer keeps its input alone and is computed anew in the backward pass.

transformers has a switch for it, which works in training mode only; our models train in evaluation mode, because there
the mode decides dropout and nothing else.
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


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Compute every layer a second time in the backward pass; in place, and the figures stay the same.

    Raises:
        UserError: The architecture's layers are not marked as such.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"Models of the type {model.config.model_type} cannot be trained with --gradient_checkpointing; "
            "leave it out."
        )
    for layer in layers:
        layer.forward = functools.partial(_computed_twice, layer.forward)


def _computed_twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Without reentry: saved tensors are tracked one by one, and arguments may be anything (our segments).
    again = None if torch.compiler.is_compiling() else same_again()
    if again is None:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)
