"""The optimizer of a model and the memory of its states, and what a step trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_
from transformers import PretrainedConfig, PreTrainedModel

from cartilha.config import AUTO_BATCH_TOKENS, Count
from cartilha.machine.processes import world
from cartilha.model.adapters import Adapter, frozen_size, trained_parameters
from cartilha.model.head import head_of
from cartilha.model.parts import count_other_parameters, text_config
from cartilha.model.sharding import zeros_beside
from cartilha.training.muon import Muon
from cartilha.training.trace import idle_parameters, model_without_contents
from cartilha.training.update_rules import LEAN_OPTIMIZERS, OPTIMIZERS, SMALL_STEP, UpdateRule, state_itemsize


def _by_rule(model: PreTrainedModel, name: str) -> dict[UpdateRule, list[nn.Parameter]]:
    """The parameters that are trained, tied ones once, by the rule of the optimizer `name` that they follow.

    bfloat16 weights follow its lean rule.
    """
    of_matrices, of_others = OPTIMIZERS[name]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables.add(id(getattr(model.get_output_embeddings(), "weight", None)))
    found: dict[UpdateRule, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_hidden_matrix = parameter.dim() == 2 and id(parameter) not in tables
            rule = of_matrices if is_hidden_matrix else of_others
            is_lean = parameter.dtype == torch.bfloat16
            found.setdefault(LEAN_OPTIMIZERS[name] if is_lean else rule, []).append(parameter)
    return found


def make_optimizer(
    model: PreTrainedModel, lr: float, weight_decay: float, name: str = "adamw"
) -> torch.optim.Optimizer:
    """The optimizer `name` over all parameters: matrices decay (decoupled), vectors (biases, norms) do not."""
    parts = []
    for rule, parameters in _by_rule(model, name).items():
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        parts.append(rule.make([group for group in groups if group["params"]], lr))
    return parts[0] if len(parts) == 1 else _Together(parts)


class _Together(torch.optim.Optimizer):
    """Optimizers of different parameters as one: it has the groups and states of all, and steps them in turn."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def choose_trained(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, embeddings_only: bool, allocate: bool = True
) -> list[torch.nn.Parameter]:
    """Choose what the next step trains: all of the optimizer's parameters, or the token embeddings (and head) alone.

    The other parameters then get no gradient, which saves their share of the backward pass, and optimizers skip a
    parameter without one: its weights do not decay, and its states start when it is first trained. On a CPU, gradients
    are allocated here (see `clear_gradients`), unless they are given back in the backward pass.
    """
    head = head_of(model)
    embeddings = {id(model.get_input_embeddings().weight), id(head.weight), id(head.bias)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.requires_grad_(not embeddings_only or id(parameter) in embeddings)
        if not parameter.requires_grad or not allocate:
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


def allocate_states(model: PreTrainedModel, optimizer: torch.optim.Optimizer, name: str = "adamw") -> None:
    """Allocate the states of the optimizer `name`, all zero, before step 1, which then already needs a step's memory.

    The optimizer would allocate the same ones only at its first step, after the activations are freed.
    """
    fused = {id(p): bool(group.get("fused")) for group in optimizer.param_groups for p in group["params"]}
    for rule, parameters in _by_rule(model, name).items():
        for parameter in parameters:
            # Torch keeps counts of steps in the host's memory, unless a fused kernel reads them.
            of_counts = parameter.device if fused[id(parameter)] else "cpu"
            for key, shape in rule.states(tuple(parameter.shape)).items():
                dtype = torch.uint8 if state_itemsize(key) == 1 else torch.float32
                zeros = zeros_beside(parameter, shape, dtype) if shape else torch.zeros((), device=of_counts)
                optimizer.state[parameter][key] = zeros


@dataclass(frozen=True)
class StateSize:
    """What a model's training holds in any case: weights, gradients, and an optimizer's states.

    All of it is float32, except what an adapter leaves frozen, and the weights and gradients of `--memory lean`.
    """

    num_parameters: int
    optimizer: str
    optimizer_bytes: int
    num_frozen: int = 0  # parameters below an adapter, without gradient and states
    frozen_bytes: int = 0
    itemsize: int = 4  # bytes per trained weight, and per gradient
    other_bytes: int = 0  # of parts that are not trained; they are in the host's memory
    num_idle: int = 0  # parameters of experts that do not compute the average token

    @classmethod
    def of(cls, model: PreTrainedModel, optimizer: str = "adamw", other_bytes: int = 0) -> StateSize:
        """The size for this model, whose parameters need no contents; counts of steps are left out."""
        states = [
            rule.state_bytes(tuple(parameter.shape))
            for rule, parameters in _by_rule(model, optimizer).items()
            for parameter in parameters
        ]
        num_trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
        num_frozen, frozen_bytes = frozen_size(model)
        itemsize = max(parameter.element_size() for parameter in trained_parameters(model).values())
        sizes = num_frozen, frozen_bytes, itemsize, other_bytes, idle_parameters(model)
        return cls(num_trained + num_frozen, optimizer, sum(states), *sizes)

    @classmethod
    def planned(
        cls,
        config: PretrainedConfig,
        optimizer: str = "adamw",
        adapter: Adapter | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> StateSize:
        """The size for a model of this configuration (of the whole, if it has other parts) with weights in `dtype`.

        Nothing is allocated. Other parts are taken to be stored in the dtype that the configuration names.
        """
        stored = 4 if config.dtype in (None, torch.float32) else 2
        other_bytes = stored * count_other_parameters(config)
        return cls.of(model_without_contents(text_config(config), adapter, dtype), optimizer, other_bytes)

    @property
    def is_lean(self) -> bool:
        """Whether the weights that are trained are bfloat16."""
        return self.itemsize == 2

    @property
    def saves_memory(self) -> bool:
        """Whether a CPU whose memory is short gives all freed tensors back at once: lean weights, or an adapter."""
        return self.is_lean or self.num_frozen > 0

    @property
    def num_trained(self) -> int:
        """Parameters that are trained."""
        return self.num_parameters - self.num_frozen

    @property
    def num_active_parameters(self) -> int:
        """Those that compute the average token: all of them, but for a mixture of experts."""
        return self.num_parameters - self.num_idle

    @property
    def num_frozen_active(self) -> int:
        """Those of them that are frozen; idle experts are, where anything is."""
        return max(0, self.num_frozen - self.num_idle)

    @property
    def weight_bytes(self) -> int:
        """Of the weights."""
        return self.gradient_bytes + self.frozen_bytes

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients, and of the weights that have one."""
        return self.itemsize * self.num_trained

    @property
    def training_bytes(self) -> int:
        """Of weights, gradients and states, whatever the batch; lean gradients need not all be there at once."""
        return self.weight_bytes + (0 if self.is_lean else self.gradient_bytes) + self.optimizer_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Of the trained weights and their states."""
        return self.gradient_bytes + self.optimizer_bytes


ADAPTER_RATE = 10  # times the rate of full training (docs/adapters.md)
FRESH_RATE = 3  # times the rate of trained weights (docs/log.md)


def resolve_lr(
    lr: float | Literal["auto"],
    num_parameters: int,
    batch_tokens: Count = "auto",
    *,
    of_adapter: bool = False,
    is_fresh: bool = False,
) -> float:
    """The peak learning rate; `auto` is 3e-4 at 125 M parameters and falls with the square root of their number.

    Below `SMALL_STEP` tokens per step it also falls with the square root of these (docs/log.md). It is at most 3e-3.
    """
    if lr != "auto":
        return lr
    small = 1.0 if batch_tokens == "auto" else min(1.0, batch_tokens / SMALL_STEP)
    times = (ADAPTER_RATE if of_adapter else 1) * (FRESH_RATE if is_fresh else 1)
    return min(3e-3, times * 3e-4 * math.sqrt(small * 125e6 / num_parameters))


def resolve_batch_tokens(batch_tokens: Count, block_size: int, device_type: str) -> int:
    """Tokens per step; `auto` takes whole blocks of what suits the device (docs/log.md), at least one per process."""
    if batch_tokens != "auto":
        return batch_tokens
    return max(world()[1], AUTO_BATCH_TOKENS[device_type] // block_size) * block_size


CLIPS_IN_STEP = ("cuda",)  # devices on which a fused optimizer divides the gradients while it reads them


def clip(
    parameters: Sequence[torch.nn.Parameter], max_norm: float, norm: torch.Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """Clip gradients of this norm to `max_norm`, at once or in the optimizer's next step, which saves one reading.

    On a CPU they are clipped at once: the fused kernel rounds otherwise there, for no time (docs/log.md, section 56).
    """
    fused: Any = optimizer
    if optimizer.defaults.get("fused") and norm.device.type in CLIPS_IN_STEP:
        fused.grad_scale = ((norm + 1e-6) / max_norm).clamp_(min=1.0)  # what the kernel divides by
    else:
        clip_grads_with_norm_(parameters, max_norm, norm)


def step_unless(skip: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step unless `skip`, a boolean on the device, is true; weights and moments then stay.

    Fused kernels and `Muon` read the flag themselves (torch has it for gradient scaling), so that the host need not
    wait.
    """
    parts: Any = optimizer.parts if isinstance(optimizer, _Together) else [optimizer]
    for part in parts:
        if part.defaults.get("fused") or isinstance(part, Muon):
            part.found_inf = skip.float()
            part.step()
        elif not skip:
            part.step()
