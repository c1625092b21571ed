"""Gradient checkpointing (arXiv:1604.06174): a layer keeps its input alone and is computed anew in the backward pass.

transformers has a switch for it, which works in training mode only; our models train in evaluation mode, because there
the mode decides dropout and nothing else.
"""

from __future__ import annotations

import functools

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cartilha.errors import UserError


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
        # Without reentry: saved tensors are tracked one by one, and arguments may be anything (our segments).
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
