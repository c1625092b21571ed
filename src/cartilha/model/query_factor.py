"""The factor of attention's scores, left to the kernel by layers that multiply their queries by it.

OPT multiplies all queries by head_size^-0.5 and asks for scores without a factor: one more pass over them, forward and
backward. A power of two (a head of 64 numbers has 1/8) changes no bit wherever it is applied. Most types pass their
factor on, so that nothing changes for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from cartilha.model.packed_or_rows import SAME_STATES, probe_states

Factors = Sequence[tuple[nn.Module, float]]


@torch.no_grad()
def query_factors(model: PreTrainedModel) -> Factors:
    """The layers whose factor, a power of two, the kernel can apply instead, by the proof of a few tokens.

    It is what transformers calls their `scaling`. Under dropout nothing can be proven.
    """
    named = [(module, getattr(module, "scaling", None)) for module in model.modules()]
    found = [(module, value) for module, value in named if isinstance(value, float) and math.frexp(value)[0] == 0.5]
    if model.training or not found:
        return []
    expected = probe_states(model)
    with left_to_kernel(found):
        difference = (probe_states(model) - expected).abs().max()
    return found if difference <= SAME_STATES * expected.std() else []


@contextmanager
def left_to_kernel(factors: Factors) -> Iterator[None]:
    """A context in which these layers multiply by 1, and `document_attention` by their factor."""
    for module, factor in factors:
        module.scaling, module.factor_of_kernel = 1.0, factor  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, factor in factors:
            module.scaling, module.factor_of_kernel = factor, 1.0  # type: ignore[assignment]
