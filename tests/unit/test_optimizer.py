"""The optimizer's groups and the learning rate's shape."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.optim import AdamW
from transformers import PreTrainedModel

from cartilha.model.configuration import model_config
from cartilha.model.load import load_model
from cartilha.training.optimizer import (
    StateSize,
    allocate_states,
    clip,
    make_optimizer,
    resolve_batch_tokens,
    resolve_lr,
    step_unless,
)
from cartilha.training.rmsprop import RMSProp
from cartilha.training.schedule import SHAPES, Schedule
from cartilha.training.update_rules import OPTIMIZERS


def rates(num_steps: int, warmup: float = 0.1, final: float = 0.1, shape: str = "cosine") -> list[float]:
    schedule = Schedule(num_steps, 2e-3, warmup, final, shape=shape)
    return [schedule.lr(step) for step in range(num_steps)]


def test_the_rate_rises_from_above_zero_to_the_peak_and_falls_to_its_final_share():
    all_rates = rates(100)
    assert all_rates[0] == pytest.approx(2e-3 / 10)
    assert all_rates[9] == max(all_rates) == 2e-3
    assert all_rates[-1] == pytest.approx(2e-4)
    assert all(later > earlier for earlier, later in itertools.pairwise(all_rates[:10]))
    assert all(later < earlier for earlier, later in itertools.pairwise(all_rates[9:]))
    assert all_rates[9 + 45] == pytest.approx((2e-3 + 2e-4) / 2)  # a cosine is half way down in the middle


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("final", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_short_runs_keep_to_the_bounds(num_steps, warmup, final, shape):
    all_rates = rates(num_steps, warmup, final, shape)
    assert 0 < all_rates[0] <= 2e-3 and max(all_rates) == 2e-3
    assert all(0 <= rate <= 2e-3 for rate in all_rates)


def test_without_decay_the_peak_is_kept_and_with_a_final_share_of_zero_the_last_step_has_none():
    assert rates(50, final=1.0)[5:] == [2e-3] * 45
    assert rates(50, final=0.0)[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates(50, final=0.0)[-2] > 0


def test_the_other_shapes_share_the_warm_up_and_end_where_they_should():
    cosine, linear, constant, wsd = (rates(110, warmup=1 / 11, shape=shape) for shape in SHAPES)
    assert cosine[:10] == linear[:10] == constant[:10] == wsd[:10]
    assert linear[9 + 50] == pytest.approx((2e-3 + 2e-4) / 2) and linear[-1] == pytest.approx(2e-4)
    assert constant[9:] == [2e-3] * 101
    assert wsd[9:90] == pytest.approx([2e-3] * 81) and wsd[-1] == pytest.approx(2e-4)
    assert wsd[99] == pytest.approx((2e-3 + 2e-4) / 2)  # half way down in the middle of the last fifth


@pytest.mark.parametrize(
    ("asked", "block_size", "device", "expected"),
    [
        ("auto", 512, "cpu", 1024),
        ("auto", 512, "cuda", 8192),
        ("auto", 3000, "cuda", 6000),  # whole blocks
        ("auto", 4096, "cpu", 4096),  # at least one
        (512, 512, "cpu", 512),
    ],
)
def test_automatic_tokens_per_step_are_whole_blocks_of_what_suits_the_device(asked, block_size, device, expected):
    assert resolve_batch_tokens(asked, block_size, device) == expected


def test_the_automatic_rate_is_3e_4_at_125_million_parameters_and_falls_with_size():
    sizes = [10**5, 10**7, 125_000_000, 10**9, 10**10]
    found = [resolve_lr("auto", size) for size in sizes]
    assert found[2] == pytest.approx(3e-4)
    assert found == sorted(found, reverse=True) and found[0] == 3e-3
    assert found[3] == pytest.approx(3e-4 / 8**0.5)
    assert resolve_lr("auto", 125_000_000, is_fresh=True) == pytest.approx(9e-4)
    assert resolve_lr(0.5, 10**5) == 0.5


def test_the_automatic_rate_falls_with_the_square_root_of_small_steps_and_not_of_large_ones():
    by_step = {tokens: resolve_lr("auto", 125_000_000, tokens) for tokens in (512, 2048, 8192)}
    assert by_step == {512: pytest.approx(1.5e-4), 2048: pytest.approx(3e-4), 8192: pytest.approx(3e-4)}


@pytest.mark.parametrize("fused", [True, False])
def test_rmsprop_is_adamw_without_a_mean_of_the_gradients(fused):
    mine, torchs = with_gradients("random:tiny-opt"), with_gradients("random:tiny-opt")
    groups = [{"params": list(mine.parameters()), "weight_decay": 0.1}]
    optimizer = RMSProp(groups, 1e-2, fused=fused)
    allocate_states(mine, optimizer, "rmsprop")
    expected = AdamW(torchs.parameters(), lr=1e-2, betas=(0.0, 0.95), eps=1e-8, weight_decay=0.1, fused=fused)
    for _ in range(3):
        optimizer.step()
        expected.step()
        for parameter, other in zip(mine.parameters(), torchs.parameters(), strict=True):
            assert torch.equal(parameter, other) and torch.equal(parameter.grad, other.grad)
            assert set(optimizer.state[parameter]) == {"step", "exp_avg_sq"}
            parameter.grad.mul_(0.5)
            other.grad.mul_(0.5)


def test_automatic_steps_have_a_block_for_each_process(monkeypatch):
    monkeypatch.setattr("cartilha.training.optimizer.world", lambda: (0, 4))
    assert resolve_batch_tokens("auto", 512, "cpu") == 2048 and resolve_batch_tokens("auto", 512, "cuda") == 8192


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ref", ["random:tiny", "random:tiny-opt"])
def test_every_parameter_is_in_one_group_and_tied_weights_once(ref, optimizer):
    loaded = load_model(ref, torch.device("cpu"))
    model = loaded.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "not tied: proves nothing"
    made = make_optimizer(model, 1e-3, 0.1, optimizer)
    listed = [parameter for group in made.param_groups for parameter in group["params"]]
    assert len({id(p) for p in listed}) == len(listed)
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()}
    assert sum(p.numel() for p in listed) == loaded.num_parameters


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_decay_and_vectors_do_not(name):
    model = load_model("random:tiny-opt", torch.device("cpu")).model
    optimizer = make_optimizer(model, 0.5, 0.1, name)
    allocate_states(model, optimizer, name)
    assert any(p.dim() == 1 for p in model.parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # with gradients of zero only the decay moves a weight
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if parameter.dim() >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


def with_gradients(ref: str) -> PreTrainedModel:
    model = load_model(ref, torch.device("cpu"), seed=3).model
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest_as_torch_has_them():
    model, peer = with_gradients("random:tiny-opt"), with_gradients("random:tiny-opt")
    optimizer = make_optimizer(model, 1e-2, 0.1, "muon")
    allocate_states(model, optimizer, "muon")
    names = {name for name, _ in peer.named_parameters()}
    hidden = {name for name in names if name.endswith("weight") and ("proj" in name or ".fc" in name)}
    vectors = {name for name in names if peer.get_parameter(name).dim() == 1}
    assert {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"} == names - hidden - vectors

    def parameters(chosen: set[str]) -> list[torch.nn.Parameter]:
        return [parameter for name, parameter in peer.named_parameters() if name in chosen]

    muon = torch.optim.Muon(parameters(hidden), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = {"lr": 1e-2, "betas": (0.9, 0.95), "fused": True}
    tables = torch.optim.AdamW(parameters(names - hidden - vectors), weight_decay=0.1, **rest)
    others = torch.optim.AdamW(parameters(vectors), weight_decay=0.0, **rest)
    for _ in range(2):
        for each in (optimizer, muon, tables, others):
            each.step()
    for name, parameter in peer.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
        kept = optimizer.state[model.get_parameter(name)].keys()
        assert kept == ({"momentum_buffer"} if name in hidden else {"step", "exp_avg", "exp_avg_sq"}), name


def test_adafactors_rate_is_the_size_of_a_step_whatever_the_size_of_the_weights():
    model = with_gradients("random:tiny")
    matrix = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = matrix.detach().clone()
    make_optimizer(model, 1e-3, 0.0, "adafactor").step()
    moved = (matrix.detach() - before).square().mean().sqrt()
    assert before.square().mean().sqrt() < 0.1 and moved == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("ref", ["random:tiny", "random:tiny-opt"])
@pytest.mark.parametrize(("optimizer", "per_parameter"), [("adamw", 8), ("rmsprop", 4), ("muon", 4), ("adafactor", 0)])
def test_planned_states_are_those_that_are_allocated(ref, optimizer, per_parameter):
    model = load_model(ref, torch.device("cpu")).model
    made = make_optimizer(model, 1e-3, 0.1, optimizer)
    allocate_states(model, made, optimizer)
    allocated = [tensor for states in made.state.values() for tensor in states.values() if tensor.dim()]
    size = StateSize.of(model, optimizer)
    assert size == StateSize.planned(model_config(ref), optimizer)
    assert size.optimizer_bytes == sum(tensor.nbytes for tensor in allocated)
    assert size.checkpoint_bytes == size.weight_bytes + size.optimizer_bytes == size.training_bytes - size.weight_bytes
    each = size.optimizer_bytes / size.num_parameters
    assert each == per_parameter if optimizer in ("adamw", "rmsprop") else per_parameter < each < per_parameter + 2


@pytest.mark.parametrize("make", [AdamW, RMSProp])
@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_leaves_weights_moments_and_counts_as_they_were(fused, make):
    torch.manual_seed(0)
    start = torch.randn(5, 3)

    def after(skips: list[bool]) -> tuple[torch.Tensor, ...]:
        weight = start.clone().requires_grad_()
        optimizer = make([{"params": [weight], "weight_decay": 0.1}], lr=0.1, fused=fused)
        for skip in skips:
            weight.grad = torch.full_like(weight, math.nan) if skip else torch.sin(weight.detach())
            step_unless(torch.tensor(skip), optimizer)
        return weight.detach(), *optimizer.state[weight].values()

    skipped, plain = after([True, False, True, True, False, False]), after([False, False, False])
    assert all(torch.equal(left, right) for left, right in zip(skipped, plain, strict=True))
    assert not torch.equal(plain[0], start)


def test_muon_leaves_a_step_out_as_the_host_would_and_steps_to_the_same_bits(monkeypatch):
    def after(skips: list[bool]) -> list[torch.Tensor]:
        model = load_model("random:tiny-opt", torch.device("cpu")).model
        optimizer = make_optimizer(model, 1e-2, 0.1, "muon")
        allocate_states(model, optimizer, "muon")
        generator = torch.Generator().manual_seed(0)
        for skip in skips:
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=None if skip else generator)
                parameter.grad = torch.full_like(parameter, math.nan) if skip else gradient
            step_unless(torch.tensor(skip), optimizer)
        states = [tensor for kept in optimizer.state.values() for tensor in kept.values()]
        return [parameter.detach() for parameter in model.parameters()] + states

    expected = after([False, False])
    monkeypatch.setattr("cartilha.training.muon.WAITS_FOR_NOTHING", ())  # as on CUDA
    found = after([True, False, True, False, True])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
@pytest.mark.parametrize("norm_of_bound", [0.3, 4.0])  # the gradient is shorter than the bound, or longer
def test_clipping_in_the_optimizers_step_is_clipping_before_it(norm_of_bound, name, monkeypatch):
    def after() -> list[torch.Tensor]:
        model = with_gradients("random:tiny-opt")
        parameters = list(model.parameters())
        optimizer = make_optimizer(model, 1e-2, 0.1, name)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        clip(parameters, norm.item() / norm_of_bound, norm, optimizer)
        step_unless(torch.tensor(False), optimizer)
        return [value for p in parameters for value in optimizer.state[p].values()] + parameters

    expected = after()
    monkeypatch.setattr("cartilha.training.optimizer.CLIPS_IN_STEP", ("cpu",))  # as on CUDA
    torch.testing.assert_close(after(), expected, rtol=1e-6, atol=1e-7)


def test_with_a_time_budget_the_rate_follows_the_time_and_decays_to_its_end():
    schedule = Schedule(1000, 2e-3, 0.1, 0.1, time_budget_s=100.0)
    by_steps = Schedule(1000, 2e-3, 0.1, 0.1)
    seconds = [2.0 * step for step in range(50)]  # 50 steps fit into the budget, not 1000
    found = [schedule.lr(step, now, 2.0) for step, now in enumerate(seconds)]
    assert found == [by_steps.lr(round(10 * now) + 19) for now in seconds]
    assert max(found) == pytest.approx(2e-3, rel=0.01) and found[-1] == pytest.approx(2e-4)
    assert schedule.lr(0, 0.0, 10.0) == 2e-3  # a first step as long as the warm-up
    assert schedule.lr(900, 10.0) == by_steps.lr(900, 10.0)  # where the steps are further on, they decide
    assert [schedule.is_over(*at) for at in ((0, 0.0), (999, 99.9), (1000, 0.0), (5, 100.0))] == [
        False,
        False,
        True,
        True,
    ]
    assert not by_steps.is_over(999, 1e9)
