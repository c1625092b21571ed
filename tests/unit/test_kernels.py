"""An attention kernel from outside: one class and one registration, and forward pass, plan and trace use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cartilha.blocks.packing import Batch
from cartilha.model.attention import KERNELS, Kernel, choose_kernel, register
from cartilha.model.configuration import model_config
from cartilha.model.forward import batch_nll, hidden_states
from cartilha.model.load import LoadedModel, load_model
from cartilha.model.segment_attention import Scoring
from cartilha.runs.step_plan import this_machine
from cartilha.training.trace import Computation, traced_step

LENGTHS = (3, 5, 1, 7)  # two rows of eight


@dataclass(frozen=True)
class ByDefinition(Kernel):
    """softmax(q k' / sqrt(d)) v for each segment, in plain torch."""

    name = "by definition"
    one_graph = False

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths, row_length, device, capacity=0):
        return cls(row_length, tuple(lengths))

    @classmethod
    def is_for(cls, device_type, capability, dtype):
        return device_type == "cpu"

    def attend(self, query, key, value, scoring):
        repeats = query.shape[1] // key.shape[1]
        query, key, value = (heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value))
        key, value = (heads.repeat_interleave(repeats, dim=1) for heads in (key, value))
        found = []
        for q, k, v in zip(*(heads.split(self.lengths) for heads in (query, key, value)), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q, k) * scoring.scaling
            hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
            found.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        return torch.cat(found)


@pytest.fixture
def registered() -> Iterator[type[Kernel]]:
    yield register(ByDefinition)
    del KERNELS[ByDefinition.name]


@pytest.fixture
def loaded() -> LoadedModel:
    return load_model("random:tiny", torch.device("cpu"))


@pytest.fixture
def batch() -> Batch:
    ids = np.arange(16).reshape(2, 8)
    return Batch(ids, ids, np.concatenate([np.arange(n) for n in LENGTHS]).reshape(2, 8), np.array(LENGTHS))


def step(loaded: LoadedModel, batch: Batch) -> list[torch.Tensor]:
    loaded.model.zero_grad()
    batch_nll(loaded.model, batch, torch.float32).backward()
    return [hidden_states(loaded.model, batch, torch.float32).detach(), *(p.grad for p in loaded.model.parameters())]


def test_a_forward_pass_goes_through_it(loaded, batch, request, monkeypatch):
    expected = step(loaded, batch)
    kernel = request.getfixturevalue("registered")
    assert choose_kernel("cpu", None, torch.float32) == kernel.name
    for found, exact in zip(step(loaded, batch), expected, strict=True):
        torch.testing.assert_close(found, exact)
    monkeypatch.setattr(kernel, "attend", lambda self, query, *rest: torch.zeros_like(query))
    assert not torch.allclose(step(loaded, batch)[0], expected[0], atol=1e-3)


def test_what_it_cannot_compute_goes_under_the_mask(loaded, batch, registered, monkeypatch, caplog):
    monkeypatch.setattr(registered, "obstacle", classmethod(lambda cls, config, training: "it is Sunday"))
    monkeypatch.setattr(registered, "attend", None)
    hidden_states(loaded.model, batch, torch.float32)
    assert "it is Sunday" in caplog.text


def test_the_plan_names_and_traces_it(registered):
    assert this_machine(torch.device("cpu"), torch.float32).kernel == registered.name
    how = Computation(torch.float32, registered.name, on_cpu=True)
    own = traced_step(model_config("random:tiny"), 1, 64, how).activations
    usual = traced_step(model_config("random:tiny"), 1, 64, Computation(torch.float32, "segments", True)).activations
    assert own > usual > 0  # it keeps its weights for the backward pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_mask_that_is_added_gives_the_bits_of_one_that_chooses(dtype, dropout, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, 2, 8, 16, generator=generator) for _ in range(3)]
    attention, masks, found = F.scaled_dot_product_attention, [], []

    def noted(*inputs, attn_mask, **settings):
        masks.append(attn_mask)
        return attention(*inputs, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        kernel = KERNELS["mask"].of(LENGTHS, 8, torch.device("cpu"))
        for compute in (
            lambda *given: kernel.attend(*given, Scoring(dropout=dropout)),
            lambda *given: attention(*given, attn_mask=kernel.mask, dropout_p=dropout).transpose(1, 2),
        ):
            torch.manual_seed(1)
            given = [tensor.clone().requires_grad_() for tensor in heads]
            output = compute(*given)
            output.float().square().sum().backward()
            found.append([output, *(tensor.grad for tensor in given)])
    assert masks[0].dtype == dtype  # no layer makes it anew
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
