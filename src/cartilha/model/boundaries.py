"""Models with a state that run packed, where fast kernels are told where each document begins.

transformers takes such kernels from causal-conv1d, mamba-ssm and flash-linear-attention, which need a GPU, and passes
boundaries on to them. A proof at load decides: documents beside others must give the states and gradients that each
gives alone in plain torch, in evaluation and in training, for which some kernels differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cartilha.machine.devices import to_device
from cartilha.model.head import body_of

# Types that tests/peer/test_every_type.py compares with transformers beside stand-ins of these kernels. Others are not
# tried, also where a proof would hold: Qwen 4's layers may select keys beyond any proof's tokens.
TOLD_TYPES = (
    "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "lfm2", "lfm2_moe", "mamba2",
    "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "zamba2",
)  # fmt: skip

CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seqlens")  # as layers of one or another type look for them

# Kernels go in chunks of 64 to 256 tokens: these documents end before, at and after multiples of them, begin in one
# and end in a third, and one has a single token.
PROOF_LENGTHS = (45, 17, 1, 130, 60, 2, 300, 19)
SAME = 1e-4  # of the spread, beside three times the kernels' own rounding
LEAK = 1e-2  # of the spread: other neighbours may move a document by so much, since kernels add up several documents

_HUB_KERNELS = "transformers.integrations.hub_kernels"


@contextmanager
def plain_torch(model: PreTrainedModel) -> Iterator[None]:
    """A context without fast kernels, which refuse CPUs, tensors without contents and, some of them, float32."""
    sources = [sys.modules[name] for name in {type(module).__module__ for module in model.modules()}]
    replaced = [
        (source, name, function)
        for source in sources
        for name, function in vars(source).items()
        if getattr(function, "__globals__", {}).get("__name__") == _HUB_KERNELS and hasattr(function, "__wrapped__")
    ]
    for source, name, function in replaced:
        setattr(source, name, function.__wrapped__)
    try:
        yield
    finally:
        for source, name, function in replaced:
            setattr(source, name, function)


def told(lengths: np.ndarray, name: str, device: torch.device) -> dict[str, Tensor]:
    """Arguments that tell kernels of documents of these lengths, side by side in one row.

    Each token's document, shape (1, num_tokens), and the cumulative lengths from 0, shape (num_documents + 1,).
    """
    cumulative = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    documents = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]
    return {"seq_idx": to_device(documents, device), name: to_device(cumulative, device)}


class NotPacked(Exception):
    """Why a model cannot run packed; the reason completes "since ..."."""


@dataclass(frozen=True)
class _Found:
    """States, and the gradient of a weighted sum of them by the embeddings; both (1, num_tokens, hidden_size)."""

    states: Tensor
    gradient: Tensor


def compare(model: PreTrainedModel, ids: Tensor, own: Callable[[], None], ours: Callable[[], dict[str, Any]]) -> None:
    """Raise `NotPacked` where documents of `PROOF_LENGTHS` beside each other give other states or gradients than alone.

    `own` and `ours` switch the model's attention; the latter gives the arguments for all documents in one row.
    """
    arguments = ours()
    odd = torch.arange(len(PROOF_LENGTHS)).repeat_interleave(torch.tensor(PROOF_LENGTHS)) % 2 == 1
    odd = odd.to(ids.device)[None, :, None]
    found = []
    # Whether a document sees another is looked at first, so that the proof ends early if kernels ignore boundaries.
    for training in (False, True):
        _set_training(model, training)
        beside = _run(model, ids, 1.0, **arguments)
        found.append((beside, torch.ones_like(odd)))
        for kept in (odd, ~odd):
            mixed = _run(model, torch.where(kept[..., 0], ids, ids.flip(1)), kept.float(), **arguments)
            _require((mixed.states - beside.states) * kept, LEAK * float(beside.states.std()))
            _require(mixed.gradient * ~kept, LEAK * _largest(beside.gradient))
            found.append((mixed, kept))
    own()
    model.eval()
    pieces = ids.split(PROOF_LENGTHS, dim=1)
    with plain_torch(model):
        exact = _joined([_run(model, piece, 1.0, exact=True) for piece in pieces])
    alone = _joined([_run(model, piece, 1.0) for piece in pieces])
    of_states = 3 * _largest(alone.states - exact.states) + SAME * float(exact.states.std())
    of_gradients = 3 * _largest(alone.gradient - exact.gradient) + SAME * _largest(exact.gradient)
    for one, kept in found:
        _require((one.states - exact.states) * kept, of_states)
        _require((one.gradient - exact.gradient) * kept, of_gradients)


def _run(
    model: PreTrainedModel, ids: Tensor, weight: Tensor | float, *, exact: bool = False, **arguments: Any
) -> _Found:
    """What these tokens give; on a GPU in training's arithmetic unless `exact`: some kernels are for half precision."""
    kind = model.device.type
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" and not exact):
        arguments = arguments or {"attention_mask": torch.ones_like(ids), "use_cache": False}
        states = body_of(model)(inputs_embeds=embedded, **arguments).last_hidden_state.float()
        signs = (ids[..., None] * 31 + torch.arange(states.shape[2], device=ids.device) * 17) % 7 - 3.0
        (gradient,) = torch.autograd.grad((states * signs * weight).sum(), embedded)
    return _Found(states.detach(), gradient)


def _joined(found: list[_Found]) -> _Found:
    return _Found(torch.cat([one.states for one in found], 1), torch.cat([one.gradient for one in found], 1))


def _largest(difference: Tensor) -> float:
    """The root mean square of the token that differs most."""
    return float(difference.float().square().mean(dim=-1).sqrt().max())


def _require(difference: Tensor, bound: float) -> None:
    if not _largest(difference) <= bound:  # also where it is no number
        raise NotPacked("documents side by side would see each other")


def _set_training(model: PreTrainedModel, training: bool) -> None:
    """Training's kernels, without dropout, which would hide a difference."""
    for module in model.modules():
        module.training = training and not isinstance(module, torch.nn.Dropout)
