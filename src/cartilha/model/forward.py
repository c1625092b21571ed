"""One forward pass over packed documents: the body in the compute dtype, the head fused with the loss."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cartilha.blocks.packing import IGNORE_INDEX, Batch
from cartilha.errors import log
from cartilha.machine.devices import to_device
from cartilha.model import boundaries
from cartilha.model.attention import FALLBACK, KERNELS, Kernel, choose_kernel
from cartilha.model.compiling import CompiledBody
from cartilha.model.head import body_of, head_inputs, head_of
from cartilha.model.loss import NLL_ONLY, TokenScores, Wanted, linear_cross_entropy, token_scores
from cartilha.model.packed_or_rows import how_it_runs, runs_packed
from cartilha.model.router import router_loss_of
from cartilha.model.rows import states_in_rows
from cartilha.model.sharding import gathering

_MASK_NOTICE = "Attention is computed under a mask, which is slower than the usual kernel: %s."
_announce_mask = functools.cache(functools.partial(log.warning, _MASK_NOTICE))  # once per process


def _segments(model: PreTrainedModel, batch: Batch, dtype: torch.dtype, body: CompiledBody | None = None) -> Kernel:
    device = model.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    kernel = KERNELS[choose_kernel(device.type, capability, dtype)]
    if reason := kernel.hindrance(model.config, how_it_runs(model).needs, training=model.training):
        _announce_mask(reason)
        kernel = KERNELS[FALLBACK]
    lengths, capacity = batch.segment_lengths.tolist(), 0
    if body is not None and body.is_compiled:
        capacity = body.capacity(len(lengths))
        kernel = kernel if kernel.one_graph else KERNELS[FALLBACK]
    row_length = batch.input_ids.size if how_it_runs(model).boundaries else batch.input_ids.shape[1]
    return kernel.of(lengths, row_length, device, capacity)


def _packed_arguments(
    model: PreTrainedModel, batch: Batch, dtype: torch.dtype, body: CompiledBody | None
) -> dict[str, Any]:
    """What a model's body is given; all in one row where kernels are told where documents begin."""
    arrays = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    arguments = {"use_cache": False, "segments": _segments(model, batch, dtype, body)}
    if name := how_it_runs(model).boundaries:
        arrays = {key: array.reshape(1, -1) for key, array in arrays.items()}
        arguments |= boundaries.told(batch.segment_lengths, name, model.device)
    return arguments | {key: to_device(array, model.device) for key, array in arrays.items()}


def hidden_states(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """The last hidden states as the head reads them (`head_inputs`), shape (num_rows, row_length, hidden_size).

    The weights are float32; the body runs in `dtype` under autocast.
    """
    return _states_and_routers(model, batch, dtype, None)[0]


def _states_and_routers(
    model: PreTrainedModel, batch: Batch, dtype: torch.dtype, body: CompiledBody | None, *, with_routers: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Hidden states, and the logits of each layer's router, (num_rows * row_length, num_experts), if asked for."""
    device = model.device
    router_logits: tuple[Tensor, ...] = ()
    with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
        if not runs_packed(model):
            states, router_logits = states_in_rows(model, batch, with_routers=with_routers)
        else:
            output = (body or body_of(model))(
                **_packed_arguments(model, batch, dtype, body),
                **({"output_router_logits": True} if with_routers else {}),
            )
            states = output.last_hidden_state.view(*batch.input_ids.shape, -1)
            if with_routers:
                router_logits = tuple(logits.flatten(0, -2) for logits in output.router_logits)
        return head_inputs(model, states), router_logits


@gathering
def batch_nll(model: PreTrainedModel, batch: Batch, dtype: torch.dtype, body: CompiledBody | None = None) -> Tensor:
    """Summed nll of a batch's targets, differentiable: scalar float32, in nats; see `hidden_states`.

    Its gradient is also that of the routers' loss, where the model asks for one, times the number of targets.
    """
    nll, of_routers = batch_losses(model, batch, dtype, body)
    return nll if of_routers is None else nll + (of_routers - of_routers.detach())


def batch_losses(
    model: PreTrainedModel, batch: Batch, dtype: torch.dtype, body: CompiledBody | None = None
) -> tuple[Tensor, Tensor | None]:
    """Summed nll of a batch's targets, and the routers' loss on its documents times the number of targets, if any."""
    loss = router_loss_of(model)
    states, router_logits = _states_and_routers(model, batch, dtype, body, with_routers=loss is not None)
    targets = to_device(batch.targets, states.device)
    nll = linear_cross_entropy(states.flatten(0, 1), head_of(model), targets.flatten(), dtype)
    if loss is None:
        return nll, None
    kept = to_device(np.flatnonzero(_in_documents(batch)), states.device)
    return nll, batch.num_targets * loss(tuple(logits[kept] for logits in router_logits))


def _in_documents(batch: Batch) -> np.ndarray:
    """Which positions lie in a segment that has targets, and so not in padding; shape (num_rows * row_length,)."""
    starts = np.cumsum(batch.segment_lengths) - batch.segment_lengths
    num_targets = np.add.reduceat(batch.targets.reshape(-1) != IGNORE_INDEX, starts)
    return np.repeat(num_targets > 0, batch.segment_lengths)


@torch.no_grad()
@gathering
def token_logits(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Float32 logits at every position, shape (num_rows, row_length, num_ids), without gradients.

    The body runs in `dtype`, the head in float32.
    """
    return head_of(model).logits(hidden_states(model, batch, dtype), torch.float32)


@torch.no_grad()
@gathering
def scored_tokens(model: PreTrainedModel, batch: Batch, dtype: torch.dtype, wanted: Wanted = NLL_ONLY) -> TokenScores:
    """Scores of each scored target in row-major order (`batch.num_targets` of them), without gradients."""
    states = hidden_states(model, batch, dtype).flatten(0, 1)
    targets = torch.from_numpy(batch.targets.reshape(-1))
    positions = (targets >= 0).nonzero()[:, 0].to(states.device)
    chosen = targets.to(states.device)[positions]
    return token_scores(states[positions], head_of(model), chosen, dtype, wanted)
