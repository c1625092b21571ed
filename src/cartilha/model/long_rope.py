"""Long RoPE (Phi-3's): one set of frequencies for texts beyond the original context, another for shorter ones.

transformers chooses one set for a whole batch, by its longest text, so that a short document beside a long one would
get other figures than alone. Here each document gets those of its own length.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def original_context(config: PretrainedConfig) -> int | None:
    """The longest text that gets the frequencies of short ones; None where there is only one set."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for settings in (parameters, *parameters.values()):  # one for all layers, or one for each kind of layer
        if isinstance(settings, dict) and settings.get("rope_type") == "longrope":
            return int(settings["original_max_position_embeddings"])
    return None


class LongRopeByDocument(torch.nn.Module):
    """Takes the place of a model's rotary embedding.

    Args:
        rotary: The model's own, which knows how to make cosines and sines of frequencies.
        boundary: The original context.
    """

    def __init__(self, rotary: Any, boundary: int) -> None:
        super().__init__()
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, rotary.inv_freq.device, seq_len=boundary + 1)
        self.short, self.long, self.boundary = rotary, type(rotary)(rotary.config), boundary
        self.short.inv_freq = rotary.original_inv_freq.to(frequencies.device)
        self.long.inv_freq = frequencies
        self.short.rope_type = self.long.rope_type = "default"  # neither is to choose by itself any more

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cosines and sines, each of shape (num_rows, row_length, rotated size).

        Args:
            x: Says the dtype.
            position_ids: From 0 at the beginning of each document, shape (num_rows, row_length).
        """
        document = (position_ids == 0).cumsum(dim=1)
        last = position_ids.new_zeros(position_ids.shape[0], position_ids.shape[1] + 1)
        last = last.scatter_reduce(1, document, position_ids, "amax")
        is_long = (last.gather(1, document) >= self.boundary)[..., None]
        both = zip(self.long(x, position_ids), self.short(x, position_ids), strict=True)
        return tuple(torch.where(is_long, long, short) for long, short in both)


def choose_by_document(model: PreTrainedModel) -> None:
    """Have a model, in place, choose the frequencies for each document by itself."""
    boundary = original_context(model.config)
    for module in list(model.modules()) if boundary is not None else ():
        for name, rotary in list(module.named_children()):
            if getattr(rotary, "rope_type", None) == "longrope" and boundary is not None:
                setattr(module, name, LongRopeByDocument(rotary, boundary))
