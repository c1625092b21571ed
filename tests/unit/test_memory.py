"""The planned micro-batch: never below one block, never beyond the step, more memory never a smaller one."""

from __future__ import annotations

import itertools

import pytest
import torch

from cartilha.model.load import load_model
from cartilha.training.memory import (
    MAX_MICRO_TOKENS_CPU,
    activation_bytes_per_token,
    fixed_bytes,
    plan_micro_batch,
)

MEMORIES = [0, *(2**power for power in range(10, 40))]


@pytest.fixture(scope="module")
def loaded():
    return load_model("random:tiny", torch.device("cpu"))


@pytest.fixture
def plan(loaded):
    def planned(block_size: int = 64, blocks_per_step: int = 24, dtype=torch.float32, free_bytes: int = 2**40) -> int:
        return plan_micro_batch(
            loaded.model,
            num_parameters=loaded.num_parameters,
            block_size=block_size,
            blocks_per_step=blocks_per_step,
            dtype=dtype,
            free_bytes=free_bytes,
        )

    return planned


@pytest.mark.parametrize("blocks_per_step", [1, 2, 12, 13, 22, 64])
def test_more_memory_never_plans_a_smaller_micro_batch(plan, blocks_per_step):
    sizes = [plan(blocks_per_step=blocks_per_step, free_bytes=free) for free in MEMORIES]
    assert sizes[0] == 1 and sizes[-1] == min(blocks_per_step, MAX_MICRO_TOKENS_CPU // 64)
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(sizes))


def test_there_are_sizes_between_one_block_and_the_whole_step(plan, loaded):
    fixed = fixed_bytes(loaded.model, loaded.num_parameters, torch.float32)
    block = activation_bytes_per_token(loaded.model, torch.float32) * 64
    assert {plan(free_bytes=int((fixed + n * block) / 0.8) + block // 2) for n in range(1, 30)} > {1, 2, 3, 4, 6, 8, 12}


def test_longer_blocks_never_plan_more_of_them(plan):
    for free in MEMORIES:
        sizes = [plan(block_size=size, free_bytes=free) for size in (2, 16, 64, 512, 1024, 8192)]
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1


def test_a_divisor_of_the_step_is_preferred_where_one_is_near(plan, loaded):
    fixed = fixed_bytes(loaded.model, loaded.num_parameters, torch.float32)
    block = activation_bytes_per_token(loaded.model, torch.float32) * 64
    room_for_five = int((fixed + 5.5 * block) / 0.8)
    assert plan(blocks_per_step=24, free_bytes=room_for_five) == 4
    assert plan(blocks_per_step=23, free_bytes=room_for_five) == 5  # a prime: no divisor but 1 and itself


def test_a_bigger_model_and_float32_are_planned_with_more_bytes(loaded):
    opt = load_model("random:tiny-opt", torch.device("cpu"))
    assert opt.num_parameters > loaded.num_parameters
    for dtype in (torch.float32, torch.bfloat16):
        assert activation_bytes_per_token(opt.model, dtype) > activation_bytes_per_token(loaded.model, dtype) > 0
    assert activation_bytes_per_token(opt.model, torch.float32) > activation_bytes_per_token(opt.model, torch.bfloat16)
