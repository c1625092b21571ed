"""Models with a state are packed beside kernels that keep documents apart, and run in rows beside any others.

Kernels need a GPU: stand-ins in plain torch take their places, where transformers itself would call them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import state_kernels
import torch
from tiny_types import tiny_model
from transformers import PreTrainedModel

from cartilha.model.load import look_at, prepare_model
from cartilha.model.packed_or_rows import prove, runs_packed
from cartilha.training.trace import Computation, traced_step

CPU = torch.device("cpu")
BOUNDARIES = ("seq_idx", "cu_seqlens")
Kernel = Callable[..., Any]


@functools.cache
def model_of(model_type: str) -> PreTrainedModel:
    return tiny_model(model_type)


def leaking(kernel: Kernel) -> Kernel:
    """One that is told where documents begin, and does not care."""

    @functools.wraps(kernel)
    def run(*tensors: Any, **settings: Any) -> Any:
        return kernel(*tensors, **{name: value for name, value in settings.items() if name not in BOUNDARIES})

    return run


def leaking_backwards(kernel: Kernel) -> Kernel:
    """One that keeps documents apart, and gives gradients from one to another."""

    @functools.wraps(kernel)
    def run(*tensors: Any, **settings: Any) -> torch.Tensor:
        mixed = leaking(kernel)(*tensors, **settings)
        return kernel(*tensors, **settings).detach() + mixed - mixed.detach()

    return run


def forgetful(kernel: Kernel) -> Kernel:
    """One that begins anew with each of its chunks, too."""

    @functools.wraps(kernel)
    def run(*tensors: Any, seq_idx: torch.Tensor | None = None, **settings: Any) -> Any:
        if seq_idx is not None:
            seq_idx = (2 * seq_idx + torch.arange(seq_idx.shape[1]) // 64).int()
        return kernel(*tensors, seq_idx=seq_idx, **settings)

    return run


def of_a_gpu(kernel: Kernel) -> Kernel:
    """One that refuses tensors of a CPU, as the real ones do."""

    @functools.wraps(kernel)
    def run(*tensors: Any, **settings: Any) -> Any:
        raise RuntimeError("Expected x.is_cuda() to be true, but got false.")

    return run


def changing(faults: dict[str, Callable[[Kernel], Kernel]]) -> Callable[[str, Kernel], Kernel]:
    return lambda name, kernel: faults.get(name, lambda same: same)(kernel)


@pytest.mark.parametrize(
    ("model_type", "kernel", "fault"),
    [
        ("lfm2", "causal_conv1d_fn", leaking),
        ("lfm2", "causal_conv1d_fn", leaking_backwards),
        ("lfm2", "causal_conv1d_fn", forgetful),
        ("qwen3_next", "torch_chunk_gated_delta_rule", leaking),
        ("mamba2", "mamba2_split_conv1d_scan_combined", leaking),  # which training alone calls
    ],
)
def test_a_kernel_that_does_not_keep_them_apart_is_found_out(model_type, kernel, fault, monkeypatch):
    model = copy.deepcopy(model_of(model_type))
    own = model.config._attn_implementation
    state_kernels.install(monkeypatch, model, changing({kernel: fault}))
    found = prove(model, "cu_seq_lens_q")
    assert not found.packed and found.reason == "documents side by side would see each other"
    assert not model.training and model.config._attn_implementation == own


def test_what_looks_at_a_model_on_a_cpu_needs_no_kernel(monkeypatch):
    model = copy.deepcopy(model_of("lfm2"))
    state_kernels.install(monkeypatch, model, lambda name, kernel: of_a_gpu(kernel))
    assert "one document per row" in look_at(model.config, "my-model").line
    assert traced_step(model.config, 1, 16, Computation(torch.float32, "rows", on_cpu=True)).activations > 0
    assert not runs_packed(prepare_model(model, "my-model", CPU).model)


def test_without_these_packages_it_is_said_once_that_documents_have_rows_of_their_own(caplog):
    prepare_model(copy.deepcopy(model_of("lfm2")), "my-model", CPU)
    assert len([line for line in caplog.messages if "one document per row" in line]) == 1
