"""Stepping each parameter in the backward pass, as soon as its gradient is there, which is then given back.

The gradients are never all in memory (arXiv:2306.09782). Their norm over all parameters is not known before the last
one, so each is clipped by itself, to a share of the bound that makes the bound hold for all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cartilha.training.lean import SteppedInSlices
from cartilha.training.state import TrainingState


def clip_each(parameters: Sequence[Tensor], max_norm: float, num_parameters: int) -> Tensor:
    """Clip each gradient to a norm of `max_norm` times the root of its share of all parameters.

    Returns the norm of all of them before, a float32 scalar. Afterwards it is at most `max_norm`.
    """
    squares = []
    for parameter in parameters:
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            squares.append(norm.square())
            bound = max_norm * math.sqrt(parameter.numel() / num_parameters)
            parameter.grad.mul_((bound / (norm + 1e-6)).clamp_(max=1.0))
    return torch.stack(squares).sum().sqrt()


class StepsInBackward:
    """While `is_active`, a backward pass steps the parameters of a lean optimizer and leaves no gradients."""

    def __init__(self, state: TrainingState, optimizer: SteppedInSlices, max_norm: float) -> None:
        self._scaler, self._optimizer, self._max_norm = state.scaler, optimizer, max_norm
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.num_parameters = sum(parameter.numel() for parameter in parameters)
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in parameters]
        # The scaler looks at gradients, and none is left after the pass: this one tells it whether all were finite.
        self._witness = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, device=state.model.device))], lr=0.0)
        self.begin(is_active=False)

    def begin(self, *, is_active: bool) -> None:
        """Begin a pass; if it is not active, its gradients stay."""
        self.is_active, self.num_left_out, self._norms = is_active, 0, list[Tensor]()

    @property
    def has_stepped(self) -> bool:
        """Whether weights have moved in this pass, so that it cannot be repeated."""
        return len(self._norms) > self.num_left_out

    def _arrived(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if not self.is_active or gradient is None:
            return
        if self._scaler.is_enabled():
            gradient.mul_(1.0 / self._scaler.get_scale())
        norm = clip_each([parameter], self._max_norm, self.num_parameters)
        self._norms.append(norm)
        if torch.isfinite(norm):
            self._optimizer.step_parameter(parameter)
        else:
            self.num_left_out += 1
        parameter.grad = None

    def end(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of all gradients before clipping, and whether some parameter was left as it was."""
        grad_norm = torch.stack(self._norms).square().sum().sqrt()
        skipped = ~torch.isfinite(grad_norm + loss)
        if self._scaler.is_enabled():
            (witness,) = self._witness.param_groups[0]["params"]
            witness.grad = torch.where(skipped, torch.inf, 0.0).to(witness).reshape(1)
            self._scaler.unscale_(self._witness)
            self._scaler.update()
        return grad_norm, skipped

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()


@contextmanager
def stepping_in_backward(state: TrainingState, max_norm: float) -> Iterator[StepsInBackward | None]:
    """The means of giving gradients back while a model is trained; None where the optimizer needs all of them."""
    if not isinstance(state.optimizer, SteppedInSlices):
        yield None
        return
    steps = StepsInBackward(state, state.optimizer, max_norm)
    try:
        yield steps
    finally:
        steps.close()
