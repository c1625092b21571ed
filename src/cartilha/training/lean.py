"""Optimizers for bfloat16 weights: slices of them are stepped in float32, and rounded back stochastically.

A step of AdamW is often smaller than half the distance between two bfloat16 numbers, so that rounding to the nearest
would lose it. Stochastic rounding keeps it in the mean (arXiv:2010.06192). torch's own optimizers do the arithmetic;
AdamW's moments are kept in 8 bits, with the map of numbers that bitsandbytes and torchao have (arXiv:2110.02861).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cartilha.training.rmsprop import step_adamw
from cartilha.training.update_rules import ADAFACTOR_EPSILONS, CODE_BLOCK, FUSED_ON, SLICE, Groups

_DROPPED_BITS = 12  # of a float32 number, when its code is looked up: 11 bits of the mantissa are left


def round_stochastically(values: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """Write float32 `values` to the bfloat16 `out`: up or down, with chances that make the mean right.

    `values` are overwritten.
    """
    bits = values.view(torch.int32)
    # The 16 bits that bfloat16 lacks are added to a random number, whose carry rounds up.
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    bits.add_(noise).bitwise_and_(-(1 << 16))
    out.copy_(values)


class SteppedInSlices(torch.optim.Optimizer, ABC):
    """An optimizer whose parameters can be stepped one by one, with temporaries of a slice's size.

    The random numbers of the rounding follow from the number of the step and the place of the parameter, so that a
    resumed run, and every process of several, draws the same ones.
    """

    def __init__(self, groups: Groups, lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self._generators: dict[torch.device, torch.Generator] = {}
        self._places = {p: (n, group) for n, (group, p) in enumerate(self._parameters())}

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        return ((group, parameter) for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step all parameters that have a gradient."""
        for _, parameter in self._parameters():
            if parameter.grad is not None:
                self.step_parameter(parameter)

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Step one parameter by its gradient."""
        place, group = self._places[parameter]
        state = self.state[parameter]
        state["step"] += 1
        generator = self._generators.setdefault(parameter.device, torch.Generator(parameter.device))
        generator.manual_seed(int(state["step"]) << 20 | place)
        assert parameter.grad is not None
        for weights, gradient, part in self._slices(parameter, parameter.grad, state):
            master = weights.float()  # the weights themselves, if they are float32
            self._step_slice(master, gradient.float(), part, group, int(state["step"]))
            if weights.dtype == torch.bfloat16:
                round_stochastically(master, weights, generator)

    @abstractmethod
    def _slices(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Views of weights and gradient, with the parts of the state that belong to them."""

    @abstractmethod
    def _step_slice(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        """Take the step number `step` (from 1) with a slice of float32 weights, in place."""


class AdamW8bit(SteppedInSlices):
    """AdamW (arXiv:1711.05101) with moments of 8 bits, each block of 256 with a scale of its own.

    If the states hold no mean of the gradients, it is RMSProp.
    """

    def _slices(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        weights, flat = parameter.view(-1), gradient.reshape(-1)
        for begin in range(0, len(weights), SLICE):
            end = begin + SLICE
            part = {key: value.view(-1)[begin:end] for key, value in state.items() if key.startswith("exp_avg")}
            for key in [key for key in part if key.endswith("_scale")]:
                part[key] = state[key][begin // CODE_BLOCK : end // CODE_BLOCK]
            yield weights[begin:end], flat[begin:end], part

    def _step_slice(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        coded = {name: signed for name, signed in _MOMENTS if f"{name}_codes" in state}
        decoded = {name: _decoded(state[f"{name}_codes"], state[f"{name}_scale"], coded[name]) for name in coded}
        found = state | decoded
        means = [found["exp_avg"]] if "exp_avg" in found else None
        # Only `step` is counted up by torch: it needs the number of steps before this one.
        steps = [torch.full((), step - 1.0, device=weights.device)]
        how = {**group, "fused": weights.device.type in FUSED_ON}
        step_adamw([weights], [gradient], (means, [found["exp_avg_sq"]]), steps, how)
        for name, signed in coded.items():
            _encode(found[name], state[f"{name}_codes"], state[f"{name}_scale"], signed)


_MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))  # and whether they are signed


def _decoded(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    values = _map(signed, codes.device).index_select(0, codes.int())
    return values.view(-1, CODE_BLOCK).mul_(scale[:, None]).view(-1)


def _encode(values: Tensor, codes: Tensor, scale: Tensor, signed: bool) -> None:
    blocks = values.view(-1, CODE_BLOCK)
    scale.copy_(blocks.abs().amax(dim=1).clamp_(min=1e-12))
    blocks.div_(scale[:, None])
    index = values.view(torch.int32).bitwise_right_shift_(_DROPPED_BITS).bitwise_and_((1 << 32 - _DROPPED_BITS) - 1)
    torch.index_select(_codes(signed, codes.device), 0, index, out=codes)


@functools.cache
def _map(signed: bool, device: torch.device) -> Tensor:
    """The numbers that the codes stand for, ascending: 0, 1, and more and more of them in each decade below 1."""
    decades = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent if signed else exponent + 1) + 1)
        decades.append(10.0 ** (exponent - 6) * ((edges[1:] + edges[:-1]) / 2))
    numbers = torch.cat(decades)
    both = torch.cat([-numbers, numbers]) if signed else numbers
    return torch.cat([both, torch.tensor([0.0, 1.0])]).sort().values.to(device)


@functools.cache
def _codes(signed: bool, device: torch.device) -> Tensor:
    """The code of each float32 number by its first 20 bits: that of the nearest number that there is a code for."""
    middle = torch.arange(1 << 32 - _DROPPED_BITS).bitwise_left_shift_(_DROPPED_BITS).add_(1 << _DROPPED_BITS - 1)
    values = middle.to(torch.int32).view(torch.float32).nan_to_num_(0.0)
    numbers = _map(signed, torch.device("cpu"))
    between = (numbers[1:] + numbers[:-1]) / 2
    return torch.bucketize(values, between).to(torch.uint8).to(device)


class AdafactorInSlabs(SteppedInSlices):
    """torch's Adafactor (arXiv:1804.04235); large matrices are factored slab by slab, each some of the rows."""

    def _slices(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        if parameter.dim() < 2:
            yield parameter, gradient, state
            return
        num_slabs = len(state["col_var"]) if parameter.dim() == 2 else -(-parameter.numel() // SLICE)
        size = -(-len(parameter) // num_slabs)
        for number, begin in enumerate(range(0, len(parameter), size)):
            rows = slice(begin, begin + size)
            columns = slice(number, number + 1) if parameter.dim() == 2 else rows
            part = {"row_var": state["row_var"][rows], "col_var": state["col_var"][columns]}
            yield parameter[rows], gradient[rows], part

    def _step_slice(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int
    ) -> None:
        master = torch.nn.Parameter(weights, requires_grad=False)
        master.grad = gradient
        settings = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": ADAFACTOR_EPSILONS}
        torchs = torch.optim.Adafactor([master], foreach=False, **settings)
        torchs.state[master] = {**state, "step": torch.tensor(step - 1.0)}
        torchs.step()
