"""torch.compile with a fallback: what cannot be compiled is computed without compilation, and a warning says so.

The model's body is compiled for training on CUDA, where the compiler fuses what lies between the matrix products. One
graph serves all steps: what changes from batch to batch reaches it as tensors of one shape (`attention.Kernel`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from cartilha.errors import first_line, log
from cartilha.machine.devices import compile_pays
from cartilha.machine.memory import is_out_of_memory
from cartilha.model.head import body_of
from cartilha.model.packed_or_rows import how_it_runs
from cartilha.model.query_factor import left_to_kernel, query_factors
from cartilha.model.recomputation import layers_of
from cartilha.model.router import router_loss_of
from cartilha.model.sharding import is_sharded
from cartilha.model_reference import cache_directory

MIN_STEPS_TO_COMPILE = 30  # shorter runs would spend more time compiling than they save


def keep_compiled_code() -> None:
    """Have torch keep what it compiles in the user's cache, where the next process finds it."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "inductor"))


@dataclass
class CompiledOrPlain:
    """Calls a compiled function until it fails (usually at its first call), then the plain one."""

    compiled: Callable[..., Any]
    plain: Callable[..., Any]
    name: str  # begins the warning that is logged then
    is_compiled: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        if self.is_compiled:
            try:
                return self.compiled(*args, **kwargs)
            except Exception as error:
                if not self.give_up(error):
                    raise
        return self.plain(*args, **kwargs)

    def give_up(self, error: Exception) -> bool:
        """Use the plain function from now on, because of this error; False where that would not help."""
        cause = getattr(error, "inner_exception", error)  # torch wraps what a backend raises
        if not self.is_compiled or is_out_of_memory(cause):
            return False
        self.is_compiled = False
        log.warning("%s could not be compiled, and is computed slower without (%s).", self.name, first_line(cause))
        return True


class CompiledBody(CompiledOrPlain):
    """The model's body (all but the head), compiled for training: one graph for each shape of batch and kind of layer.

    Each layer is compiled by itself, since layers of one kind then share a graph. A body without layers that are known
    as such is compiled whole. A backward pass is compiled when it first runs: whoever runs it must hand its errors to
    `give_up`. `backend` is that of torch.compile; tests count graphs with others.
    """

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
        keep_compiled_code()
        body, layers = body_of(model), layers_of(model)
        # Shapes are constants: micro-batches have one size, or a few after memory ran out. What would leave the graph
        # is an error, so that it can be said.
        compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
        self._layers = [(layer, layer.forward, compiled(layer.forward)) for layer in layers]
        self._factors = query_factors(model) if layers else ()
        super().__init__(self._layerwise if layers else compiled(body), body, "The model")

    def _layerwise(self, *args: Any, **kwargs: Any) -> Any:
        for layer, _, compiled in self._layers:
            layer.forward = compiled
        try:
            with left_to_kernel(self._factors):
                return self.plain(*args, **kwargs)
        finally:
            for layer, plain, _ in self._layers:
                layer.forward = plain

    @staticmethod
    def capacity(num_segments: int) -> int:
        """Room for the segments of a batch: the next multiple of 16, since a graph knows neither 0 nor 1 as sizes."""
        return -(-num_segments // 16) * 16


def training_body(model: PreTrainedModel, choice: str, num_steps: int) -> CompiledBody | None:
    """The model's compiled body, or None where it is not to be compiled.

    Of the choices `never`, `always` and `auto`, the last compiles where it pays: on CUDA, with a compiler, for long
    runs. `num_steps` is that of the whole run, so that a resumed run computes as before. Rows of many lengths would
    need many graphs, and that a graph gives the routers' logits, or holds kernels of states, is not proven.
    """
    how = how_it_runs(model)
    # A sharded model's layers exchange their weights between graphs.
    if choice == "never" or not how.packed or how.boundaries or is_sharded(model) or router_loss_of(model) is not None:
        return None
    if choice == "auto" and (num_steps < MIN_STEPS_TO_COMPILE or not compile_pays(model.device.type)):
        return None
    return CompiledBody(model)
