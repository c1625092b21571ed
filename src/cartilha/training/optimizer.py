"""AdamW with decoupled weight decay (arXiv:1711.05101), and what a step trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from cartilha.config import AUTO_BATCH_TOKENS, Count
from cartilha.model.head import head_of

ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-8


def make_optimizer(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters: matrices decay, vectors (biases, norms) do not; tied weights are listed once."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")  # one pass over weights, gradients and states
    return torch.optim.AdamW(groups, lr=lr, betas=ADAM_BETAS, eps=ADAM_EPSILON, fused=fused)


def choose_trained(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, embeddings_only: bool
) -> list[torch.nn.Parameter]:
    """Choose what the next step trains: all of the optimizer's parameters, or the token embeddings (and head) alone.

    The other parameters then get no gradient, which saves their share of the backward pass, and AdamW skips a parameter
    without one: its weights do not decay, and its moments start when it is first trained. On a CPU, gradients are
    allocated here (see `clear_gradients`).
    """
    head = head_of(model)
    embeddings = {id(model.get_input_embeddings().weight), id(head.weight), id(head.bias)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.requires_grad_(not embeddings_only or id(parameter) in embeddings)
        if not parameter.requires_grad:
            parameter.grad = None
        elif parameter.grad is None and parameter.device.type == "cpu":
            parameter.grad = torch.zeros_like(parameter)
    return [parameter for parameter in parameters if parameter.requires_grad]


def clear_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Forget a step's gradients; on a CPU they stay where they are, as zeros.

    Allocated again, they would lie between the activations of the next step's first micro-batch, and leave holes that
    the second one's do not fit into (docs/log.md).
    """
    for parameter in parameters:
        if parameter.device.type == "cpu" and parameter.grad is not None:
            parameter.grad.zero_()
        else:
            parameter.grad = None


def allocate_states(optimizer: torch.optim.AdamW) -> None:
    """Allocate AdamW's moments, all zero, before step 1, so that the first step already needs all memory of a step.

    The optimizer would allocate the same ones only at its first step, after the activations are freed.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device if group["fused"] else "cpu"),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def resolve_lr(lr: float | Literal["auto"], num_parameters: int) -> float:
    """The peak learning rate; `auto` falls with the square root of the model's size, 3e-4 at 125 M, at most 3e-3."""
    return min(3e-3, 3e-4 * math.sqrt(125e6 / num_parameters)) if lr == "auto" else lr


def resolve_batch_tokens(batch_tokens: Count, block_size: int, device_type: str) -> int:
    """Tokens per step; `auto` takes whole blocks of what suits the device (docs/log.md, experiment 36)."""
    if batch_tokens != "auto":
        return batch_tokens
    return max(1, AUTO_BATCH_TOKENS[device_type] // block_size) * block_size


def step_unless(skip: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step unless `skip`, a boolean on the device, is true; weights and moments then stay.

    The fused kernels read the flag themselves (they have it for gradient scaling), so that the host need not wait.
    """
    fused: Any = optimizer
    if optimizer.defaults.get("fused"):
        fused.found_inf = skip.float()
        optimizer.step()
    elif not skip:
        optimizer.step()
