"""Long RoPE (Phi-3): one set of frequencies for texts longer than the original context, another for shorter ones.

transformers chooses one set for a whole batch, by its longest text. A short document beside a long one would then get
other figures than alone. Here each document gets the frequencies for its own length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def original_context(config: PretrainedConfig) -> int | None:
    """The longest text that gets the frequencies of short ones; None where there is only one set."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for settings in (parameters, *parameters.values()):  # for all layers, or for each kind of layer
        if isinstance(settings, dict) and settings.get("rope_type") == "longrope":
            return int(settings["original_max_position_embeddings"])
    return None


class LongRopeByDocument(torch.nn.Module):
    """Replaces a model's rotary embedding, which makes the cosines and sines; `boundary` is the original context."""

    def __init__(self, rotary: Any, boundary: int) -> None:
        super().__init__()
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, rotary.inv_freq.device, seq_len=boundary + 1)
        self.short, self.long, self.boundary = rotary, type(rotary)(rotary.config), boundary
        self.short.inv_freq = rotary.original_inv_freq.to(frequencies.device)
        self.long.inv_freq = frequencies
        self.short.rope_type = self.long.rope_type = "default"  # neither may choose any more

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines in the dtype of `x`, each of shape (num_rows, row_length, rotated size).

        `position_ids` begin with 0 in each document and have the shape (num_rows, row_length).
        """
        document = (position_ids == 0).cumsum(dim=1)
        last = position_ids.new_zeros(position_ids.shape[0], position_ids.shape[1] + 1)
        last = last.scatter_reduce(1, document, position_ids, "amax")
        is_long = (last.gather(1, document) >= self.boundary)[..., None]
        both = zip(self.long(x, position_ids), self.short(x, position_ids), strict=True)
        return tuple(torch.where(is_long, long, short) for long, short in both)


def choose_by_document(model: PreTrainedModel) -> None:
    """Have a model, in place, choose the frequencies document by document."""
    boundary = original_context(model.config)
    if boundary is None:
        return
    for module in list(model.modules()):
        for name, rotary in list(module.named_children()):
            if getattr(rotary, "rope_type", None) == "longrope":
                setattr(module, name, LongRopeByDocument(rotary, boundary))
