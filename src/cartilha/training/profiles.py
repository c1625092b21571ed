"""Memory profiles: what a training keeps, from the fullest to the leanest, and which of them fits a device.

`full` keeps float32 weights, gradients and states: 16 bytes per parameter with AdamW, 12 with RMSProp. `lean` keeps
bfloat16 weights and the optimizer's lean states, and gives gradients back in the backward pass of a step of one
micro-batch: 4 bytes with AdamW, 3 with RMSProp, 2 with Adafactor. Either may compute layers a second time instead of
keeping what they computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PretrainedConfig

from cartilha.config import PlanConfig, TrainConfig
from cartilha.errors import UserError, first_line
from cartilha.model.adapters import Adapter
from cartilha.training.device_facts import DeviceFacts
from cartilha.training.memory import MemoryModel, StepMemory, best_step
from cartilha.training.optimizer import StateSize
from cartilha.training.trace import Computation
from cartilha.training.update_rules import has_lean_form


@dataclass(frozen=True)
class Profile:
    """How a training keeps its weights, and whether it computes layers twice."""

    lean: bool
    checkpointing: bool
    adapter: Adapter | None = None

    @property
    def name(self) -> str:
        """Its name in tables and messages."""
        return f"{self.memory}, layers twice" if self.checkpointing else self.memory

    @property
    def memory(self) -> Literal["full", "lean"]:
        """`full` or `lean`, as `--memory` takes it."""
        return "lean" if self.lean else "full"

    @property
    def options(self) -> str:
        """The options that ask for it."""
        return f"--memory {self.memory}{' --gradient_checkpointing' if self.checkpointing else ''}"

    @property
    def in_half(self) -> bool:
        """Whether some weights are kept in half precision, so that a step is not computed in float32."""
        return self.lean or (self.adapter is not None and self.adapter.in_half)

    @property
    def weights(self) -> torch.dtype:
        """The type of the weights."""
        return torch.bfloat16 if self.lean else torch.float32

    def size(self, config: PretrainedConfig, optimizer: str) -> StateSize:
        """What the training of a model holds in any case."""
        return StateSize.planned(config, optimizer, self.adapter, self.weights)

    def computation(self, facts: DeviceFacts, *, dropout: bool = False) -> Computation:
        """How a step is computed on a device."""
        how = {"checkpointing": self.checkpointing, "lean": self.lean}
        return facts.computation(**how, dropout=dropout, adapter=self.adapter)


def profiles(config: TrainConfig | PlanConfig, *, recomputes: bool) -> list[Profile]:
    """The profiles that `--memory` allows, the fullest first.

    `full` is one; `lean` and `auto` add that which computes layers twice, if the model `recomputes` them. An adapter
    has no lean profile: its base may be bfloat16 by an option of its own.
    """
    memory, adapter = config.memory, Adapter.of(config)
    lean = {"full": [False], "lean": [True], "auto": [False, True]}[memory]
    if memory == "auto" and (not has_lean_form(config.optimizer) or adapter is not None):
        lean = [False]
    adds_twice = recomputes and memory != "full"
    twice = [True] if config.gradient_checkpointing else [False, True] if adds_twice else [False]
    return [Profile(is_lean, again, adapter) for is_lean in lean for again in twice]


@dataclass(frozen=True)
class Fit:
    """A profile on a device, with the largest micro-batch (in blocks) that fits, or 0, and the memory of a step."""

    profile: Profile
    size: StateSize
    block_size: int
    micro_batch_size: int
    step: StepMemory
    shares: int = 1  # cards that share out the model

    @property
    def options(self) -> str:
        """The options that ask for it."""
        return f"{self.profile.options}{' --shard full' if self.shares > 1 else ''}"


def fit(
    profile: Profile,
    config: PretrainedConfig,
    facts: DeviceFacts,
    optimizer: str,
    shape: tuple[int, int],
    shares: int = 1,
) -> Fit:
    """How a profile fits a device; `shape` has the tokens per block and the blocks per step."""
    size, how = profile.size(config, optimizer), profile.computation(facts)
    memory = MemoryModel(config, how, overhead_bytes=facts.overhead_bytes, size=size, shares=shares)
    try:
        return Fit(profile, size, shape[0], *best_step(memory, facts, *shape), shares)
    except UserError:
        raise
    except Exception as error:  # an architecture may do something that tensors without contents cannot follow
        raise UserError(
            f"The memory of a step cannot be planned for models of the type {config.model_type} ({first_line(error)}); "
            "try --micro_batch_size 1 with --memory full."
        ) from error


def fullest_fit(
    candidates: Sequence[Profile],
    config: PretrainedConfig,
    facts: DeviceFacts,
    optimizer: str,
    shape: tuple[int, int],
) -> Fit:
    """The first of the profiles that fits a device (see `fit`), or the last one."""
    for profile in candidates:
        found = fit(profile, config, facts, optimizer, shape)
        if found.micro_batch_size:
            break
    return found
