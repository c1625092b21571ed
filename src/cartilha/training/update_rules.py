"""The optimizers that `--optimizer` takes by name: what makes them, and which tensors they keep for each parameter.

Torch is imported where an optimizer is made, because a wrong name is refused before torch is loaded.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cartilha.errors import UserError

if TYPE_CHECKING:
    from torch.optim import Optimizer

ADAM_BETAS = (0.9, 0.95)
EPSILON = 1e-8  # AdamW's
FUSED_ON = ("cpu", "cuda")  # devices with a kernel that makes one pass over weights, gradients and states
SMALL_STEP = 2048  # tokens; steps of fewer take RMSProp, and a lower rate
# The first is as small as a float32 square allows: torch's 1e-7 is above the mean squares of a clipped gradient. With a
# second one of 1, steps do not shrink with the weights, so that a rate means about what it means to AdamW.
ADAFACTOR_EPSILONS = (1e-16, 1.0)

Groups = list[dict[str, Any]]  # as torch.optim takes them: `params` and `weight_decay`
Shape = tuple[int, ...]

# Of bfloat16 weights, so many are stepped at a time in float32: temporaries of 24 MiB, whatever the matrix.
SLICE = 2**20
CODE_BLOCK = 256  # moments of 8 bits that share a scale, as in torchao
SMALL = 4096  # smaller tensors keep float32 moments, as in torchao


@dataclass(frozen=True)
class UpdateRule:
    """How parameters are updated, and the optimizer's states of each, so that memory and checkpoints know them.

    Attributes:
        make: The optimizer of groups of parameters, with a learning rate that the loop sets anew at each step.
        states: Names and shapes of the tensors that it keeps for a parameter of the given shape, all zero at the
            beginning; a count of the steps is a tensor named `step` without dimensions. They are float32, except those
            whose name ends in `_codes`, which are bytes.
        shards: Whether it can step parameters that are shared out over processes (DTensor).
    """

    make: Callable[[Groups, float], Optimizer]
    states: Callable[[Shape], dict[str, Shape]]
    shards: bool = True

    def state_bytes(self, shape: Shape) -> int:
        """Bytes of the states of a parameter, without counts of steps."""
        return sum(state_itemsize(key) * math.prod(found) for key, found in self.states(shape).items() if found)


def state_itemsize(key: str) -> int:
    """Bytes per number of the state of this name."""
    return 1 if key.endswith("_codes") else 4


def _fused(groups: Groups) -> bool:
    return next(parameter.device.type for group in groups for parameter in group["params"]) in FUSED_ON


def _adamw(groups: Groups, lr: float) -> Optimizer:
    from torch.optim import AdamW

    return AdamW(groups, lr=lr, betas=ADAM_BETAS, eps=EPSILON, fused=_fused(groups))


def _rmsprop(groups: Groups, lr: float) -> Optimizer:
    from cartilha.training.rmsprop import RMSProp

    return RMSProp(groups, lr, fused=_fused(groups))


def _made_by(module: str, name: str, **settings: Any) -> Callable[[Groups, float], Optimizer]:
    """What makes an optimizer by a class, whose module is imported then."""
    return lambda groups, lr: getattr(importlib.import_module(module), name)(groups, lr=lr, **settings)


def _factors(shape: Shape) -> dict[str, Shape]:
    if len(shape) < 2:
        return {"step": (), "variance": shape}
    return {"step": (), "row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


def _moments(*names: str) -> Callable[[Shape], dict[str, Shape]]:
    return lambda shape: {"step": ()} | dict.fromkeys(names, shape)


def _moments_in_8bit(*names: str) -> Callable[[Shape], dict[str, Shape]]:
    def states(shape: Shape) -> dict[str, Shape]:
        size = math.prod(shape)
        if size < SMALL or size % CODE_BLOCK:
            return _moments(*names)(shape)
        coded: dict[str, Shape] = {"step": ()}
        for name in names:
            coded |= {f"{name}_codes": shape, f"{name}_scale": (size // CODE_BLOCK,)}
        return coded

    return states


def _factors_of_slabs(shape: Shape) -> dict[str, Shape]:
    factors = _factors(shape)
    return {**factors, "col_var": (-(-math.prod(shape) // SLICE), shape[1])} if len(shape) == 2 else factors


ADAMW = UpdateRule(_adamw, _moments("exp_avg", "exp_avg_sq"))  # arXiv:1711.05101
RMSPROP = UpdateRule(_rmsprop, _moments("exp_avg_sq"))
_make_muon = _made_by("cartilha.training.muon", "Muon", adjust_lr_fn="match_rms_adamw")  # steps as large as AdamW's
MUON = UpdateRule(_make_muon, lambda shape: {"momentum_buffer": shape})  # arXiv:2502.16982
_make_adafactor = _made_by("torch.optim", "Adafactor", eps=ADAFACTOR_EPSILONS)
ADAFACTOR = UpdateRule(_make_adafactor, _factors, shards=False)  # arXiv:1804.04235

# The rule of the matrices of hidden layers, and that of all other parameters: embeddings, head, norms and biases.
OPTIMIZERS: dict[str, tuple[UpdateRule, UpdateRule]] = {
    "adamw": (ADAMW, ADAMW),
    "rmsprop": (RMSPROP, RMSPROP),
    "muon": (MUON, ADAMW),
    "adafactor": (ADAFACTOR, ADAFACTOR),
}

# The rule of all parameters where the weights are bfloat16 (`--memory lean`), for the optimizers that have such a form.
LEAN_OPTIMIZERS: dict[str, UpdateRule] = {
    "adamw": UpdateRule(_made_by("cartilha.training.lean", "AdamW8bit"), _moments_in_8bit("exp_avg", "exp_avg_sq")),
    "rmsprop": UpdateRule(_made_by("cartilha.training.lean", "AdamW8bit"), _moments_in_8bit("exp_avg_sq")),
    "adafactor": UpdateRule(_made_by("cartilha.training.lean", "AdafactorInSlabs"), _factors_of_slabs),
}


def resolve_optimizer(name: str, batch_tokens: int) -> str:
    """The optimizer of a name; `auto` is RMSProp in steps of fewer than `SMALL_STEP` tokens, else AdamW."""
    return name if name != "auto" else "rmsprop" if batch_tokens < SMALL_STEP else "adamw"


def check_optimizer(name: str) -> None:
    """Refuse, with a UserError, a name that is neither `auto` nor in `OPTIMIZERS`."""
    if name not in ("auto", *OPTIMIZERS):
        raise UserError(f"There is no optimizer {name!r}; choose from auto, {', '.join(OPTIMIZERS)}.")


def can_shard(name: str) -> bool:
    """Whether the optimizer can step parameters that are shared out over processes."""
    return name == "auto" or all(rule.shards for rule in OPTIMIZERS[name])


def has_lean_form(name: str) -> bool:
    """Whether the optimizer has a form for bfloat16 weights."""
    return name in ("auto", *LEAN_OPTIMIZERS)


def check_lean(name: str) -> None:
    """Refuse, with a UserError, an optimizer that has no form for bfloat16 weights."""
    if not has_lean_form(name):
        raise UserError(
            f"The optimizer {name} has no form for bfloat16 weights; with --memory lean choose one of "
            f"{', '.join(LEAN_OPTIMIZERS)}."
        )
