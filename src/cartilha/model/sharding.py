"""Models whose weights are shared out over the processes: each layer is gathered when it is computed (FSDP2).

Weights, gradients and the optimizer's states then take a share of the memory in each process (arXiv:2304.11277). What
lies outside the layers (embeddings, head, last norm) is gathered for a whole pass, since the fused loss reads the
head's weight and not its output. Every process must run the same number of passes, or the others wait for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from transformers import AutoModelForCausalLM, PreTrainedModel

from cartilha.machine.devices import half_dtype
from cartilha.machine.processes import is_main_process, join_processes, world
from cartilha.model.adapters import adapter_of, add_adapter, trained_parameters
from cartilha.model.recomputation import layers_of

P = ParamSpec("P")
T = TypeVar("T")


def shard_model(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Share out a model's weights, in place, over all processes, and move this process's part to `device`.

    Layers are gathered in the compute dtype and their gradients are summed (not averaged) in float32. The weights that
    the optimizer changes stay float32.
    """
    join_processes(device)
    mesh = init_device_mesh(device.type, (world()[1],))
    # The residual stream stays float32, as it is without sharding: inputs of layers are not cast.
    half = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False)
    layers: list[Any] = list(layers_of(model))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=half)
    whole: Any = fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
    for module in (*layers, whole):
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    whole.compute = lambda function, *args, **kwargs: function(*args, **kwargs)
    register_fsdp_forward_method(whole, "compute")
    whole.gathered_dtype = dtype


@contextmanager
def in_dtype_of_layers(model: PreTrainedModel) -> Iterator[None]:
    """A context in which a model computes whose layers are gathered, or frozen below an adapter, in half precision."""
    dtype: Any = getattr(model, "gathered_dtype", torch.float32)
    adapter = adapter_of(model)
    if dtype == torch.float32 and adapter is not None and adapter.in_half:
        dtype = half_dtype(model.device)
    with nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype):
        yield


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard_model` has shared out this model's weights."""
    return isinstance(model, FSDPModule)


def gathering(function: Callable[P, T]) -> Callable[P, T]:
    """A function whose first argument is a model; while it runs, a sharded model's embeddings and head are whole."""

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> T:
        model: Any = args[0]
        if not is_sharded(model):
            return function(*args, **kwargs)
        result: T = model.compute(function, *args, **kwargs)
        if not torch.is_grad_enabled():
            model.reshard()  # without a backward pass, which does it
        return result

    return computed


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out over the processes, each of which must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model with all weights of a sharded one in `dtype`, in the host's memory; one that is not sharded is as it is.

    Every process must ask for it. The main one gets the weights, one after another; others get a model without any. Of
    a model with an adapter, the weights below it stay where they are: the adapter alone is to be saved.
    """
    if not is_sharded(model):
        return model
    adapter = adapter_of(model)
    found: dict[int, Tensor] = {}  # tied weights once
    state: dict[str, Tensor] = {}
    for name, tensor in (model.state_dict(keep_vars=True) if adapter is None else trained_parameters(model)).items():
        if id(tensor) not in found:
            complete = whole(tensor.detach())
            kept = complete.to("cpu", dtype if complete.is_floating_point() else None)
            found[id(tensor)] = kept if is_main_process() else kept.new_empty(0)
        state[name] = found[id(tensor)]
    with torch.device("meta"):
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
        if adapter is not None:
            add_adapter(plain, adapter)
    if is_main_process():
        plain.load_state_dict(state, assign=True, strict=adapter is None)
        plain.tie_weights()
        plain.generation_config = model.generation_config
    return plain


def zeros_beside(parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A state of an optimizer for a parameter, shared out over the processes like that, if its rows are."""
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    placements = [Shard(0) if shape[0] == parameter.shape[0] else Replicate()]
    return zeros(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)
