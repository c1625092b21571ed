"""A longer context for models with rotary positions, written into the configuration as transformers understands it.

`yarn` (arXiv:2309.00071) slows down the rotations that a longer text would take beyond what training has seen, and
keeps the fast ones. `theta` raises the base, so that the slowest rotation is slowed down by the whole factor
(arXiv:2309.16039). Either needs training on texts of the new length.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from cartilha.config import TrainConfig
from cartilha.errors import UserError
from cartilha.model.configuration import NO_LIMIT, context_length


@dataclass(frozen=True)
class LongerContext:
    """A number of positions that a model is to take, and how."""

    length: int
    method: Literal["yarn", "theta"] = "yarn"

    @classmethod
    def of(cls, config: TrainConfig) -> LongerContext | None:
        """What `--context` asks for, if anything."""
        return None if config.context is None else cls(config.context, config.context_method)

    def applied(self, config: PretrainedConfig, reference: str) -> PretrainedConfig:
        """The model's configuration with the longer context; a UserError says why the model cannot take it."""
        before = context_length(config)
        if reason := _obstacle(config):
            raise UserError(f"--context cannot extend {reference}, since {reason}; leave it out.")
        if self.length <= before:
            raise UserError(
                f"--context {self.length} is within the context of {reference} ({before} tokens); leave it out."
            )
        settings = copy.deepcopy(config).to_dict()
        settings["rope_parameters"] = self._rotations(settings["rope_parameters"], config, self.length / before)
        settings["max_position_embeddings"] = self.length
        settings.pop("model_type")
        extended: PretrainedConfig = AutoConfig.for_model(config.model_type, **settings)
        return extended

    def _rotations(self, before: dict[str, Any], config: PretrainedConfig, factor: float) -> dict[str, Any]:
        if self.method == "yarn":
            original = context_length(config)
            return before | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        heads = int(config.num_attention_heads)
        size = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
        rotated = size * (before.get("partial_rotary_factor") or 1.0)
        return before | {"rope_theta": before["rope_theta"] * factor ** (rotated / (rotated - 2))}


def _obstacle(config: PretrainedConfig) -> str | None:
    """Why a model's positions cannot be extended; None if they can."""
    settings = getattr(config, "rope_parameters", None)
    if not settings:
        if context_length(config) == NO_LIMIT:
            return "its type names no longest text, and takes texts of any length"
        return f"models of the type {config.model_type} have no rotary positions"
    if "rope_theta" not in settings:
        return "its layers have rotary positions of several kinds"
    kind = settings.get("rope_type", "default")
    return None if kind == "default" else f"its rotary positions are extended already (rope_type {kind})"
