"""torch.compile, with the plain code behind it: what cannot be compiled is announced once and computed as before.

The model's body is compiled for training on CUDA, where it fuses what lies between the matrix products. One graph
serves all steps: what changes from batch to batch reaches it as tensors of one shape (`attention.Segments`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel

from cartilha.errors import first_line
from cartilha.machine.devices import compile_pays
from cartilha.machine.memory import is_out_of_memory
from cartilha.model.attention import knows_attention

log = logging.getLogger("cartilha")

P = ParamSpec("P")
R = TypeVar("R")

CompileChoice = Literal["auto", "always", "never"]

MIN_STEPS_TO_COMPILE = 100  # shorter runs would spend more time compiling than they save


class CompiledOrPlain(Generic[P, R]):
    """A compiled function until it fails, as a rule at its first call; then the plain one, and a line says so.

    Args:
        compiled: What `torch.compile` gave.
        plain: The same, not compiled.
        name: Of what is compiled, to begin the line with.
    """

    def __init__(self, compiled: Callable[P, R], plain: Callable[P, R], name: str) -> None:
        self._compiled = compiled
        self._plain = plain
        self._name = name
        self.is_compiled = True

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """What the function gives."""
        if self.is_compiled:
            try:
                return self._compiled(*args, **kwargs)
            except Exception as error:
                if not self.give_up(error):
                    raise
        return self._plain(*args, **kwargs)

    def give_up(self, error: Exception) -> bool:
        """Compute plainly from now on, because of this error; False where that is no remedy for it."""
        cause = getattr(error, "inner_exception", error)  # torch wraps what a backend raises
        if not self.is_compiled or is_out_of_memory(cause):
            return False
        self.is_compiled = False
        log.warning("%s could not be compiled (%s): computing it plainly, slower.", self._name, first_line(cause))
        return True


class CompiledBody(CompiledOrPlain[..., Any]):
    """The model's body (all but the head), compiled for training: each shape of batch has one graph.

    Backward passes are compiled when they first run, so that whoever runs them hands their errors to `give_up`.

    Args:
        model: With `use_document_attention`.
        backend: Of torch.compile; tests count graphs with others.
    """

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
        body = model.base_model
        # Shapes are constants: of micro-batches there is one size, or a few after memory ran out.
        super().__init__(torch.compile(body, dynamic=False, backend=backend), body, "The model")
        self._capacity = 0

    def capacity(self, num_segments: int) -> int:
        """Room for the segments of a batch, the same for batches alike: it grows, by doubling, and never shrinks.

        Flash attention starts a block of threads for each segment and pays, though little, for those of no length; so
        the bound is the batches' own and not that of the worst text, which is a document every two positions.
        """
        while self._capacity < num_segments:
            # A quarter of room above the first batch, in powers of two.
            self._capacity = max(2 * self._capacity, 2 ** (num_segments * 5 // 4).bit_length())
        return self._capacity


def training_body(model: PreTrainedModel, choice: CompileChoice, num_steps: int) -> CompiledBody | None:
    """The model's compiled body where one is wanted, or None.

    Args:
        model: On its device.
        choice: `auto` compiles where it pays: on CUDA, with a compiler, for runs that are long enough.
        num_steps: Of the whole run, so that a resumed one computes as before.
    """
    if not knows_attention(model.config):  # rows of other lengths in every batch would be another graph each
        return None
    if choice == "never" or (choice == "auto" and num_steps < MIN_STEPS_TO_COMPILE):
        return None
    if choice == "auto" and not compile_pays(model.device.type):
        return None
    return CompiledBody(model)
