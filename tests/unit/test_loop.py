"""The training loop: memory that runs out in any pass of a step, perplexity as a loss, blocks prepared ahead."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch

from cartilha.blocks.sampler import BlockSampler
from cartilha.model.forward import batch_nll
from cartilha.model.load import load_model
from cartilha.tokens.packed import PackedDocuments
from cartilha.training import distributed, loop
from cartilha.training.loop import StepSettings, prepared_steps, train_steps
from cartilha.training.schedule import SHAPES, Schedule, check_shape
from cartilha.training.state import StepRecord, TrainingState
from cartilha.training.update_rules import OPTIMIZERS

BLOCK, BLOCKS_PER_STEP, STEPS = 16, 8, 5
CONSTANT = Schedule(STEPS, 1e-3, warmup_fraction=0.0, final_lr_fraction=1.0)


def sampler(num_documents: int = 60) -> BlockSampler:
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 256, length) for length in generator.integers(5, 40, num_documents)]
    documents = PackedDocuments.from_ids(ids, prefix_id=256, end_id=257)
    return BlockSampler(documents, block_size=BLOCK, blocks_per_step=BLOCKS_PER_STEP, seed=0)


def steps(
    *,
    dropout: bool = False,
    micro_batch_size: int = 8,
    scaler: Any = None,
    schedule: Schedule = CONSTANT,
    weights: dict[str, torch.Tensor] | None = None,
    optimizer: str = "adamw",
    **settings: Any,
) -> list[StepRecord]:
    """Five steps of a tiny OPT model (it has dropout to draw); the final weights are put into `weights`."""
    model = load_model("random:tiny-opt", torch.device("cpu")).model
    model.train(dropout)
    state = TrainingState.begin(model, torch.float32, lr=1e-3, weight_decay=0.1, optimizer=optimizer)
    if scaler is not None:
        state = replace(state, scaler=scaler)
    torch.manual_seed(7)
    how = StepSettings(torch.float32, micro_batch_size, **settings)
    records = list(train_steps(state, sampler(), schedule, how))
    if weights is not None:
        weights.update({name: value.detach().clone() for name, value in model.named_parameters()})
    return records


def losses(records: list[StepRecord]) -> list[float]:
    return [float(record.loss) for record in records]


def test_the_rate_of_the_first_step_of_a_time_budget_follows_its_expected_time():
    schedule = Schedule(STEPS, 1e-3, warmup_fraction=0.4, final_lr_fraction=0.1, time_budget_s=1e6)
    assert [steps(schedule=schedule, first_seconds=s)[0].lr for s in (0.0, 4e5)] == [5e-4, 1e-3]


def test_two_threads_train_as_one():
    expected = losses(steps())
    torch.set_num_threads(2)
    try:
        found = losses(steps())
    finally:
        torch.set_num_threads(1)
    assert found == pytest.approx(expected, rel=2e-5)


@pytest.fixture
def failing_passes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let the forward passes with these numbers (from 1) run out of memory; returns the rows of each pass."""

    def arrange(*numbers: int, error: type[BaseException] = torch.OutOfMemoryError) -> list[int]:
        rows: list[int] = []

        def patched(model, batch, dtype, body):
            rows.append(len(batch.input_ids))
            value = batch_nll(model, batch, dtype, body)  # dropout is drawn before memory runs out
            if len(rows) in numbers:
                raise error("DefaultCPUAllocator: can't allocate memory")
            return value

        monkeypatch.setattr(loop, "batch_nll", patched)
        return rows

    return arrange


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_a_step_that_runs_out_of_memory_is_repeated_with_smaller_micro_batches(failing_passes, error):
    expected = losses(steps())
    rows = failing_passes(3, error=error)
    records = steps()
    assert rows == [8, 8, 8, *[4] * 6]
    assert [record.micro_batch_size for record in records] == [8, 8, 4, 4, 4]
    assert losses(records) == pytest.approx(expected, rel=2e-5)


def test_what_the_failed_pass_left_in_the_gradients_is_forgotten(failing_passes):
    expected = losses(steps(micro_batch_size=4))
    rows = failing_passes(4)  # the second half of the second step: its first half is in the gradients already
    records = steps(micro_batch_size=4)
    assert rows == [4, 4, 4, 4, *[2] * 16]
    assert losses(records) == pytest.approx(expected, rel=2e-5)
    # Kept, they would have counted half of the step twice.
    norms = [float(record.grad_norm) for record in records]
    failing_passes()
    assert norms == pytest.approx([float(record.grad_norm) for record in steps(micro_batch_size=4)], rel=1e-4)


def test_the_repeated_step_draws_the_same_dropout(failing_passes):
    failing_passes(3)
    interrupted = steps(dropout=True, micro_batch_size=2)
    failing_passes()
    # A step repeated from its own random state is the step of a run that had the small micro-batches from there on.
    again = steps(dropout=True, micro_batch_size=1)
    assert float(interrupted[0].loss) == pytest.approx(float(again[0].loss), rel=1e-5)
    other = losses(steps(dropout=True, micro_batch_size=2))
    assert abs(other[0] - float(again[0].loss)) > 1e-4, "the dropout does not depend on anything"


def test_the_repeated_step_draws_the_same_numbers_of_every_stream(monkeypatch):
    drawn: list[tuple[float, float, float]] = []

    def patched(model, batch, dtype, body):
        drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))
        if len(drawn) == 2:
            raise torch.OutOfMemoryError
        return batch_nll(model, batch, dtype, body)

    monkeypatch.setattr(loop, "batch_nll", patched)
    steps()
    assert drawn[1] == drawn[2] and len(set(drawn)) == len(drawn) - 1


def test_odd_sizes_are_halved_down_to_one_block_and_no_further(failing_passes):
    rows = failing_passes(*range(1, 20))
    with pytest.raises(torch.OutOfMemoryError):
        steps(micro_batch_size=5)
    assert rows == [5, 3, 2, 1]


def test_a_micro_batch_larger_than_the_step_is_halved_from_what_the_step_holds(failing_passes):
    rows = failing_passes(1)
    steps(micro_batch_size=64)
    assert rows[:3] == [8, 4, 4]


def test_any_other_error_is_not_taken_for_a_lack_of_memory(failing_passes, monkeypatch):
    def broken(model, batch, dtype, body):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop, "batch_nll", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        steps()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_made_beforehand_are_those_that_the_optimizer_makes(monkeypatch, optimizer):
    with_states: dict[str, torch.Tensor] = {}
    without: dict[str, torch.Tensor] = {}
    steps(weights=with_states, optimizer=optimizer)
    monkeypatch.setattr("cartilha.training.state.allocate_states", lambda *_: None)
    steps(weights=without, optimizer=optimizer)
    assert all(torch.equal(with_states[name], without[name]) for name in without)


def test_a_shape_of_the_learning_rate_from_outside_is_one_function(monkeypatch):
    monkeypatch.setitem(SHAPES, "halved", lambda done, final: 1.0 if done < 0.5 else 0.5)
    check_shape("halved")
    records = steps(schedule=replace(CONSTANT, shape="halved"))
    assert [record.lr for record in records] == [1e-3, 1e-3, 5e-4, 5e-4, 5e-4]
    constant = losses(steps())
    assert losses(records)[:3] == constant[:3] and losses(records)[3:] != constant[3:]


# The loss


def test_perplexity_as_the_loss_has_the_gradient_of_the_nll_times_the_perplexity():
    plain, experiment = steps(max_grad_norm=1e9), steps(max_grad_norm=1e9, loss="perplexity")
    assert float(plain[0].loss) == float(experiment[0].loss)  # what is recorded stays the mean nll
    perplexity = np.exp(float(plain[0].loss))
    assert perplexity > 10
    assert float(experiment[0].grad_norm) == pytest.approx(perplexity * float(plain[0].grad_norm), rel=1e-5)


def test_perplexity_as_the_loss_is_that_of_the_whole_step_however_it_is_cut():
    whole = steps(loss="perplexity", max_grad_norm=1e9)
    parts = steps(loss="perplexity", max_grad_norm=1e9, micro_batch_size=3)
    assert losses(whole) == pytest.approx(losses(parts), rel=2e-5)
    assert [float(r.grad_norm) for r in whole] == pytest.approx([float(r.grad_norm) for r in parts], rel=1e-4)


def test_clipping_takes_the_factor_away_again():
    # Both gradients are longer than the bound, so that clipping leaves the same direction and length.
    plain, experiment = steps(max_grad_norm=1e-2), steps(max_grad_norm=1e-2, loss="perplexity")
    assert losses(plain) == pytest.approx(losses(experiment), rel=1e-5)


def test_small_gradients_of_several_processes_are_summed_in_one_exchange(monkeypatch):
    exchanged = []

    class Work:
        def wait(self) -> None: ...

    def double(tensor: torch.Tensor, async_op: bool) -> Work:  # as if the other process had the same
        exchanged.append(tensor.numel())
        tensor.mul_(2)
        return Work()

    monkeypatch.setattr(distributed, "world", lambda: (0, 2))
    monkeypatch.setattr(distributed, "join_processes", lambda device: None)
    monkeypatch.setattr(distributed.dist, "all_reduce", double)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 20_000, 5, 7, 30_000)]
    for number, parameter in enumerate(parameters[:-1]):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    loss = torch.tensor(0.5)
    distributed.sum_over_ranks(parameters, loss)
    assert exchanged == [1 + 3 + 5 + 7, 20_000, 30_000] and loss == 1.0
    assert [float(parameter.grad.unique()) for parameter in parameters] == [2.0, 4.0, 6.0, 8.0, 0.0]


# Half precision with a scaler, as on a T4


class Scaler(torch.amp.GradScaler):
    """A scaler that can be used without fp16: it multiplies, divides, and skips steps that are not finite."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("cpu", enabled=True, **settings)


def test_the_scale_reaches_neither_norm_nor_weights():
    plain: dict[str, torch.Tensor] = {}
    scaled: dict[str, torch.Tensor] = {}
    expected = steps(weights=plain)
    found = steps(weights=scaled, scaler=Scaler(init_scale=2.0**10), micro_batch_size=2)
    assert losses(found) == pytest.approx(losses(expected), rel=2e-5)
    assert [float(r.grad_norm) for r in found] == pytest.approx([float(r.grad_norm) for r in expected], rel=1e-4)
    for name in plain:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-4, atol=1e-4)


def test_a_scale_that_overflows_skips_the_step_and_backs_off():
    scaler = Scaler(init_scale=2.0**127, backoff_factor=2.0**-100)
    weights: dict[str, torch.Tensor] = {}
    records = steps(scaler=scaler, weights=weights)
    assert not np.isfinite(float(records[0].grad_norm)) and np.isfinite(float(records[1].grad_norm))
    assert scaler.get_scale() == 2.0**27
    assert all(value.isfinite().all() for value in weights.values())
    # The first step moved nothing: the second began from the same weights, on other blocks.
    assert losses(records)[2:] != losses(steps())[2:]


def test_memory_that_runs_out_under_the_scaler(failing_passes):
    expected = losses(steps(scaler=Scaler(init_scale=2.0**10)))
    rows = failing_passes(2)
    assert losses(steps(scaler=Scaler(init_scale=2.0**10))) == pytest.approx(expected, rel=2e-5)
    assert 4 in rows


# Blocks prepared ahead


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 11])
def test_the_ranks_shares_are_the_steps_blocks_in_order(num_ranks):
    found = sampler()
    for step in range(2 * found.steps_per_epoch):
        whole = found.blocks(step)
        shares = [found.blocks(step, rank, num_ranks) for rank in range(num_ranks)]
        joined = [block for share in shares for block in share]
        assert len(joined) == len(whole)
        assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(joined, whole, strict=True))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_targets_are_counted_without_making_the_blocks():
    found = sampler()
    for step in range(2 * found.steps_per_epoch):
        made = sum(int((block.targets >= 0).sum()) for block in found.blocks(step))
        assert found.num_targets(step) == made > 0


@pytest.mark.parametrize("first", [0, 30, 5])
def test_the_steps_are_prepared_as_the_sampler_has_them_from_any_step_on(first):
    expected = sampler()
    with closing(prepared_steps(sampler(), first)) as prepared:
        for step, taken in zip(range(first, first + 3), prepared, strict=False):
            assert taken.num_targets == expected.num_targets(step)
            for ours, theirs in zip(taken.blocks, expected.blocks(step), strict=True):
                assert np.array_equal(ours.input_ids, theirs.input_ids)


def test_the_next_step_is_prepared_while_this_one_runs():
    found = sampler()
    asked: Queue[int] = Queue()
    blocks = found.blocks
    found.blocks = lambda step, *share: asked.put(step) or blocks(step, *share)
    with closing(prepared_steps(found, 0)) as prepared:
        next(prepared)
        assert [asked.get(timeout=60) for _ in range(2)] == [0, 1]
        next(prepared)
        assert asked.get(timeout=60) == 2 and asked.empty()


def test_a_fault_in_preparing_reaches_the_step_that_needs_it():
    found = sampler()
    found.num_targets = lambda step: 1 / 0 if step == 1 else 5
    with closing(prepared_steps(found, 0)) as prepared:
        assert next(prepared).num_targets == 5
        with pytest.raises(ZeroDivisionError):
            next(prepared)


def test_the_clock_runs_forward():
    records = steps()
    totals = [record.total_seconds for record in records]
    assert all(b > a for a, b in itertools.pairwise([0.0, *totals]))
    assert totals[-1] == pytest.approx(sum(record.seconds for record in records))
