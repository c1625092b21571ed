"""The loss of a mixture's routers beside the nll (arXiv:2101.03961), where the configuration asks for it.

transformers adds it to the loss of a model whose `output_router_logits` is set, with a factor that has several names.
Two planted values of that loss show the factor, and the arguments of the function that computes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cartilha.errors import log
from cartilha.model.head import head_of

PROBE_TOKENS = 8
PLANTED = 2.0**20  # so large that the nll beside it hides no digit of the factor
OF_ROUTERS = "load_balancing_loss_func"  # as the modules of transformers call the function


@dataclass(frozen=True)
class RouterLoss:
    """What is added to the mean nll of some tokens: `factor` times transformers' function of the routers' logits."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]  # after the logits: the number of experts, and how many of them compute a token, ...
    factor: float

    def __call__(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """The loss, times its factor; each layer's logits have the shape (num_tokens, num_experts)."""
        return self.factor * self.function(router_logits, *self.arguments)


def router_loss_of(model: PreTrainedModel) -> RouterLoss | None:
    """What `find_router_loss` found for this model."""
    found: Any = getattr(model, "router_loss", None)
    return found if isinstance(found, RouterLoss) else None


@torch.no_grad()
def find_router_loss(model: PreTrainedModel) -> RouterLoss | None:
    """Find out whether transformers adds a loss of the routers, and which; it is kept with the model."""
    module: Any = sys.modules[type(model).__module__]
    function = getattr(module, OF_ROUTERS, None)
    if function is None or not getattr(model.config, "output_router_logits", False):
        return None
    asked: list[tuple[Any, ...]] = []
    shapes: list[int] = []
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % len(head_of(model).weight)

    def loss_with(planted: float) -> float:
        def plant(router_logits: Any, *arguments: Any) -> Tensor:
            asked.append(arguments)
            shapes.extend(int(logits.shape[-1]) for logits in router_logits)
            return torch.tensor(planted, device=model.device)

        setattr(module, OF_ROUTERS, plant)
        try:
            return float(model(input_ids=ids, labels=ids, use_cache=False).loss)
        finally:
            setattr(module, OF_ROUTERS, function)

    factor = (loss_with(PLANTED) - loss_with(0.0)) / PLANTED
    if not asked or factor == 0:
        return None
    if set(shapes) != {asked[0][0]}:  # Doge routes by two halves of a key
        log.warning("The routers' own loss of models of the type %s is left out.", model.config.model_type)
        return None
    loss = RouterLoss(function, asked[0], float(f"{factor:.6g}"))
    model.router_loss = loss  # type: ignore[assignment]  # torch types attributes as modules and tensors
    return loss
