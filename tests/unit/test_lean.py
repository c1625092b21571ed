"""Lean training: stochastic rounding, moments of 8 bits, steps in the backward pass, and memory profiles."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from cartilha.blocks.sampler import BlockSampler
from cartilha.config import TrainConfig
from cartilha.errors import UserError
from cartilha.model.configuration import model_config
from cartilha.model.load import load_model
from cartilha.tokens.packed import PackedDocuments
from cartilha.training import at_once, lean
from cartilha.training.checkpoint import freeze, load_checkpoint, write_checkpoint
from cartilha.training.device_facts import KNOWN_DEVICES
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.memory import SAFETY, SLICE_BYTES, MemoryModel
from cartilha.training.optimizer import StateSize
from cartilha.training.profiles import Profile, fit, fullest_fit, profiles
from cartilha.training.schedule import Schedule
from cartilha.training.state import StepRecord, TrainingState
from cartilha.training.update_rules import CODE_BLOCK, LEAN_OPTIMIZERS, check_lean

CPU = torch.device("cpu")


def sampler() -> BlockSampler:
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 256, length) for length in generator.integers(5, 40, 60)]
    documents = PackedDocuments.from_ids(ids, prefix_id=256, end_id=257)
    return BlockSampler(documents, block_size=16, blocks_per_step=8, seed=0)


TINY_LLAMA = {  # 1.1 B parameters
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def lean_state(optimizer: str = "adamw", ref: str = "random:tiny-opt") -> TrainingState:
    model = load_model(ref, CPU, dtype=torch.bfloat16).model
    return TrainingState.begin(model, torch.bfloat16, lr=1e-3, weight_decay=0.1, optimizer=optimizer)


def train(state: TrainingState, num_steps: int, micro_batch_size: int = 8, **how: float) -> list[StepRecord]:
    schedule = Schedule(num_steps, 1e-3, warmup_fraction=0.0, final_lr_fraction=1.0)
    chosen = StepSettings(torch.bfloat16, micro_batch_size, **how)
    return list(train_steps(state, sampler(), schedule, chosen))


def weights(state: TrainingState) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.model.named_parameters()}


# Rounding


@settings(max_examples=30, deadline=None)
@given(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), st.integers(0, 2**40))
def test_a_number_is_rounded_to_one_of_its_neighbours(value, seed):
    values, out = torch.full((64,), value), torch.empty(64, dtype=torch.bfloat16)
    lean.round_stochastically(values.clone(), out, torch.Generator().manual_seed(seed))
    down = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    up = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert bool(((out.float() == down) | ((out.float() == up) & (down != values))).all())


def test_rounding_keeps_the_mean_that_the_nearest_number_would_lose():
    step = 1.0 + 2.0**-12  # a sixteenth of the distance from 1 to the next bfloat16
    out = torch.empty(2**16, dtype=torch.bfloat16)
    lean.round_stochastically(torch.full((2**16,), step), out, torch.Generator().manual_seed(0))
    assert float(out.double().mean()) == pytest.approx(step, abs=5 * 2**-7 * (1 / 32 * 31 / 32 / 2**16) ** 0.5)
    assert float(torch.tensor(step).bfloat16()) == 1.0


# Moments of 8 bits


@pytest.mark.parametrize(("signed", "digest"), [(True, "e732639a65f497b4"), (False, "305f002cc11278fb")])
def test_the_numbers_of_the_codes_are_torchaos(signed, digest):
    numbers = lean._map(signed, CPU)  # compared with torchao 0.18's create_dynamic_map
    assert hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_that_of_the_nearest_number(signed):
    values = torch.randn(64 * CODE_BLOCK, generator=torch.Generator().manual_seed(1)) * 1e-5
    values = values if signed else values.square()
    codes, scale = torch.empty(len(values), dtype=torch.uint8), torch.empty(64)
    lean._encode(values.clone(), codes, scale, signed)
    nearest = (values.view(64, -1, 1) / scale[:, None, None] - lean._map(signed, CPU)).abs().amin(dim=2)
    error = (lean._decoded(codes, scale, signed) - values).view(64, -1).abs() / scale[:, None]
    assert torch.equal(scale, values.view(64, -1).abs().amax(dim=1))
    assert bool((error <= nearest + 2.0**-11).all())  # the code is looked up by 11 bits of the mantissa


def one_matrix(rows: int, columns: int, make: Callable[..., lean.SteppedInSlices], rule: str) -> tuple:
    model = torch.nn.Linear(columns, rows, bias=False).to(torch.bfloat16)
    optimizer = make([{"params": [model.weight], "weight_decay": 0.1}], 1e-2)
    for key, shape in lean_rule(rule)((rows, columns)).items():
        dtype = torch.uint8 if key.endswith("_codes") else torch.float32
        optimizer.state[model.weight][key] = torch.zeros(shape, dtype=dtype)
    return model.weight, optimizer


def lean_rule(name: str):
    return LEAN_OPTIMIZERS[name].states


@pytest.mark.parametrize(
    ("make", "name", "reference"),
    [
        (lean.AdamW8bit, "adamw", lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.9, 0.95), weight_decay=0.1)),
        (lean.AdamW8bit, "rmsprop", lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.0, 0.95), weight_decay=0.1)),
        (
            lean.AdafactorInSlabs,
            "adafactor",
            lambda p: torch.optim.Adafactor(p, 1e-2, eps=(1e-16, 1.0), weight_decay=0.1),
        ),
    ],
)
def test_lean_steps_are_those_of_the_full_optimizer_but_for_rounding(make, name, reference):
    weight, optimizer = one_matrix(64, 256, make, name)
    exact = torch.nn.Parameter(weight.detach().float())
    full, before = reference([exact]), exact.detach().clone()
    for seed in range(8):
        exact.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
        weight.grad = exact.grad.bfloat16()
        full.step()
        optimizer.step()
    moved = (exact.detach() - before).norm()
    assert float((weight.detach().float() - exact.detach()).norm() / moved) < 0.02


def test_slices_together_are_the_whole(monkeypatch):
    found = []
    for size in (lean.SLICE, 4 * CODE_BLOCK):
        monkeypatch.setattr(lean, "SLICE", size)
        weight, optimizer = one_matrix(64, 256, lean.AdamW8bit, "adamw")
        weight.data.fill_(0.5)
        weight.grad = torch.linspace(-1, 1, 64 * 256).view(64, 256).bfloat16()
        optimizer.step()
        found.append([*optimizer.state[weight].values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# Parameters stepped in the backward pass


@pytest.mark.parametrize("optimizer", LEAN_OPTIMIZERS)
def test_one_micro_batch_or_several_make_the_same_steps(optimizer):
    given_back, kept = lean_state(optimizer), lean_state(optimizer)
    first, second = train(given_back, 3), train(kept, 3, micro_batch_size=2)
    assert all(parameter.grad is None for parameter in given_back.model.parameters())
    assert [float(r.loss) for r in first] == pytest.approx([float(r.loss) for r in second], rel=5e-3)
    assert [float(r.grad_norm) for r in first] == pytest.approx([float(r.grad_norm) for r in second], rel=2e-2)
    start = weights(lean_state(optimizer))
    moved = sum(float((weights(kept)[n].float() - w.float()).square().sum()) for n, w in start.items())
    apart = sum(float((weights(kept)[n].float() - w.float()).square().sum()) for n, w in weights(given_back).items())
    assert apart < 0.1 * moved


def test_gradients_are_clipped_to_the_bound_together():
    state, bound = lean_state(), 0.25
    parameters = list(state.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    total = sum(parameter.numel() for parameter in parameters)
    before = torch.cat([p.grad.flatten().float() for p in parameters]).norm()
    assert float(at_once.clip_each(parameters, bound, total)) == pytest.approx(float(before), rel=1e-3)
    assert float(torch.cat([p.grad.flatten().float() for p in parameters]).norm()) == pytest.approx(bound, rel=1e-2)
    small = [p.grad.clone() for p in parameters]
    at_once.clip_each(parameters, 4 * bound, total)
    assert all(torch.equal(p.grad, before) for p, before in zip(parameters, small, strict=True))


def test_a_parameter_whose_gradient_is_not_finite_stays_as_it_is():
    state = lean_state()
    broken = state.model.get_input_embeddings().weight  # the head, too
    broken.register_hook(lambda gradient: gradient * torch.nan)
    before = weights(state)
    (record,) = train(state, 1)
    after = weights(state)
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert bool(record.skipped)
    assert {name for name, value in state.model.named_parameters() if value is broken} == same


def test_a_run_goes_on_from_a_checkpoint_to_the_bit(tmp_path: Path):
    whole, first, second = lean_state(), lean_state(), lean_state()
    train(whole, 4)
    train(first, 2)
    path = write_checkpoint(tmp_path, freeze(first, {}))
    torch.manual_seed(99)  # the rounding does not depend on torch's own generator
    load_checkpoint(path, second)
    train(second, 4)
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())
    full = TrainingState.begin(load_model("random:tiny-opt", CPU).model, torch.float32, lr=1e-3, weight_decay=0.1)
    with pytest.raises(UserError, match=r"BF16 .* not F32"):
        load_checkpoint(path, full)


def test_memory_that_runs_out_before_a_weight_moved_halves_the_micro_batch(monkeypatch):
    from cartilha.training import loop

    passes, usual = [], loop.batch_nll

    def failing(model, batch, *rest):
        passes.append(len(batch.input_ids))
        if len(passes) == 1:
            raise torch.OutOfMemoryError("can't allocate memory")
        return usual(model, batch, *rest)

    monkeypatch.setattr(loop, "batch_nll", failing)
    (record,) = train(lean_state(), 1)
    assert passes == [8, 4, 4]
    expected = train(lean_state(), 1)[0]
    assert float(record.loss) == pytest.approx(float(expected.loss), rel=5e-3)


def test_memory_that_runs_out_after_a_weight_moved_ends_the_run(monkeypatch):
    state, steps = lean_state(), []

    def failing(self, parameter):
        steps.append(parameter)
        if len(steps) == 3:
            raise torch.OutOfMemoryError("can't allocate memory")

    monkeypatch.setattr(lean.SteppedInSlices, "step_parameter", failing)
    with pytest.raises(torch.OutOfMemoryError):
        train(state, 1)
    assert len(steps) == 3


# Memory


def test_lean_states_take_four_bytes_per_parameter_three_with_rmsprop_and_two_with_adafactor():
    config = AutoConfig.for_model("llama", **TINY_LLAMA)
    for optimizer, most in (("adamw", 4.05), ("rmsprop", 3.05), ("adafactor", 2.05)):
        size = StateSize.planned(config, optimizer, dtype=torch.bfloat16)
        assert size.training_bytes / size.num_parameters < most
    state = lean_state()
    held = [t for p in state.model.parameters() for key, t in state.optimizer.state[p].items() if key != "step"]
    assert StateSize.of(state.model).optimizer_bytes == sum(tensor.nbytes for tensor in held)


def test_gradients_that_are_given_back_are_not_planned():
    config, t4 = AutoConfig.for_model("llama", **TINY_LLAMA), KNOWN_DEVICES["t4"]
    how = t4.computation(checkpointing=True, lean=True)
    size = StateSize.planned(config, "adamw", dtype=torch.bfloat16)
    memory = MemoryModel(config, how, overhead_bytes=0, size=size)
    at_once, accumulating = (memory.step(1, 512, accumulates=several) for several in (False, True))
    assert at_once.gradients == 0
    assert accumulating.gradients == size.weight_bytes == 2 * size.num_parameters
    assert at_once.activations + at_once.logits_chunk > SLICE_BYTES


def test_the_fullest_profile_that_fits_is_chosen():
    facts, config = KNOWN_DEVICES["t4"], model_config("random:tiny")
    all_of_them = profiles(TrainConfig(), recomputes=True)
    assert [profile.name for profile in all_of_them] == ["full", "full, layers twice", "lean", "lean, layers twice"]
    found = [
        fullest_fit(all_of_them[::3], config, replace(facts, memory_bytes=size), "adamw", (64, 1)).profile
        for size in (2**40, 1)
    ]
    assert found == [Profile(lean=False, checkpointing=False), Profile(lean=True, checkpointing=True)]
    muon = TrainConfig(optimizer="muon", gradient_checkpointing=True)
    assert profiles(muon, recomputes=True) == [Profile(lean=False, checkpointing=True)]
    with pytest.raises(UserError, match=r"muon has no form for bfloat16 weights.*adamw, rmsprop, adafactor"):
        check_lean("muon")


def test_a_whole_step_may_fit_where_one_of_its_blocks_does_not():
    """Gradients that are given back need no memory beside the activations of a step of one micro-batch."""
    config, t4 = AutoConfig.for_model("llama", **{**TINY_LLAMA, "vocab_size": 512}), KNOWN_DEVICES["t4"]
    lean_twice = Profile(lean=True, checkpointing=True)
    steps = [fit(lean_twice, config, t4, "adamw", (64, blocks)).step for blocks in (1, 2)]
    between = replace(t4, memory_bytes=round((steps[1].total + 2**20) / SAFETY))
    assert fit(lean_twice, config, between, "adamw", (64, 2)).micro_batch_size == 2
    assert fit(lean_twice, config, replace(t4, memory_bytes=2**30), "adamw", (64, 2)).micro_batch_size == 0
