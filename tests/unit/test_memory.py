"""The memory plan: traced from the real code, linear in tokens and layers; more memory never plans a smaller batch."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import astuple, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Mamba2Config,
    MambaConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    RwkvConfig,
)

from cartilha.errors import UserError
from cartilha.model.attention import head_size
from cartilha.model.configuration import model_config
from cartilha.model.load import load_model
from cartilha.model.recomputation import checkpoint_layers
from cartilha.model.rows import ROWS
from cartilha.pipeline import train
from cartilha.runs.step_plan import RunPlan
from cartilha.training import memory as memory_module
from cartilha.training import trace
from cartilha.training.device_facts import KNOWN_DEVICES, flops_per_token, parameter_flops, utilization
from cartilha.training.memory import MemoryModel, best_step, check_states_fit
from cartilha.training.optimizer import StateSize
from cartilha.training.profiles import Profile, fit
from cartilha.training.trace import Computation, StepBytes, traced_step

CPU = KNOWN_DEVICES["cpu"]


def model(ref: str = "random:tiny", **settings) -> MemoryModel:
    overhead_bytes = settings.pop("overhead_bytes", 0)
    return MemoryModel(model_config(ref), how(**settings), overhead_bytes=overhead_bytes)


def how(dtype: torch.dtype = torch.float32, kernel: str = "segments", **settings) -> Computation:
    return Computation(dtype, kernel, settings.pop("on_cpu", kernel == "segments"), **settings)


def planned(found: MemoryModel, free_bytes: float, block_size: int = 64, blocks_per_step: int = 24) -> int:
    device = replace(CPU, memory_bytes=int(free_bytes), max_tokens=4096)
    size, step = best_step(found, device, block_size, blocks_per_step)
    assert step == found.step(size or 1, block_size, accumulates=(size or 1) < blocks_per_step)
    return size


# What is traced


@pytest.mark.parametrize("ref", ["random:tiny", "random:tiny-opt", "random:opt-125m"])
def test_parameters_are_counted_without_making_them(ref):
    expected = sum(p.numel() for p in load_model(ref, torch.device("cpu")).model.parameters())
    assert StateSize.planned(model_config(ref)).num_parameters == expected


@pytest.mark.parametrize("ref", ["random:tiny", "random:tiny-opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_layers_say_what_seven_keep(ref, dtype, checkpointing):
    """The straight line through models of one and two layers, against a trace of all seven."""
    config = model_config(ref)
    config.num_hidden_layers = 7
    line = traced_step(config, 1, 300, how(dtype, checkpointing=checkpointing))
    one, all_at_once = (_traced_whole(config, layers, dtype, checkpointing) for layers in (1, 7))
    for name in ("activations", "body", "end"):
        # In small layers that are cast or computed twice the most is not alive at the same place in one and in seven.
        small = name == "body" and (checkpointing or dtype == torch.bfloat16)
        near = 0.12 if small else 1e-3
        assert getattr(line, name) == pytest.approx(getattr(all_at_once, name), rel=near), name
    assert all_at_once.activations > 1.5 * one.activations, "layers that keep nothing prove nothing"


def _traced_whole(config, num_layers: int, dtype: torch.dtype, checkpointing: bool) -> StepBytes:
    from cartilha.training import trace

    settings = config.to_dict()
    as_json = trace.json.dumps(settings, sort_keys=True, default=str)
    return trace._traced(as_json, num_layers, 1, 300, how(dtype, checkpointing=checkpointing))


@pytest.mark.parametrize("ref", ["random:tiny", "random:tiny-opt"])
@pytest.mark.parametrize("attention_dropout", [None, 0.1])
def test_what_is_traced_is_what_autograd_keeps(ref, attention_dropout, monkeypatch):
    """Against the tensors that a real forward pass saves, counted by torch's own hooks; dropout goes under a mask."""
    import numpy as np

    from cartilha.blocks.packing import Batch
    from cartilha.model.forward import hidden_states

    loaded = load_model(ref, torch.device("cpu"))
    if attention_dropout:
        monkeypatch.setattr("cartilha.model.forward._announce_mask", lambda reason: None)
        loaded.model.config.attention_dropout = attention_dropout
        for layer in loaded.model.modules():
            if hasattr(layer, "attention_dropout") or type(layer).__name__ == "OPTAttention":
                layer.attention_dropout = layer.dropout = attention_dropout
        loaded.model.train()
    ids = np.zeros((1, 256), np.int64)
    batch = Batch(ids, ids, np.arange(256)[None], np.array([256]))
    weights = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = hidden_states(loaded.model, batch, torch.float32)
    facts = CPU.for_model(loaded.model.config, dropout=bool(attention_dropout))
    assert facts.kernel == ("mask" if attention_dropout else "segments")
    computation = facts.computation(checkpointing=False, dropout=bool(attention_dropout))
    traced = traced_step(loaded.model.config, 1, 256, computation)
    assert sum(kept.values()) > 1e5
    del states
    assert traced.activations == pytest.approx(sum(kept.values()), rel=0.06)


def test_tracing_leaves_configuration_generator_and_other_models_alone():
    config = model_config("random:tiny-opt")
    before, state = copy.deepcopy(config.to_dict()), torch.get_rng_state()
    traced_step(config, 1, 77, how())
    StateSize.planned(config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_lists_with_an_entry_a_layer_are_cut_with_the_layers():
    config = AutoConfig.for_model(
        "qwen2", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1,
    )  # fmt: skip
    assert len(config.layer_types) == 5
    assert traced_step(config, 1, 64, how()).body > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_is_planned_with_all_experts_and_timed_by_those_that_compute_a_token(dtype):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
             "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
    config = AutoConfig.for_model("mixtral", num_hidden_layers=3, num_local_experts=8, **sizes)
    size = StateSize.planned(config)
    whole = AutoModelForCausalLM.from_config(config)
    assert size.num_parameters == sum(parameter.numel() for parameter in whole.parameters())
    experts = 3 * 3 * 32 * 48  # of one expert in each of three layers
    assert size.num_active_parameters == size.num_parameters - 6 * experts  # two of eight
    dense = AutoConfig.for_model("llama", num_hidden_layers=3, **sizes)
    assert traced_step(config, 1, 64, how(dtype)).activations > traced_step(dense, 1, 64, how(dtype)).activations


def test_activations_checkpointed_and_in_half_precision_are_fewer():
    config = model_config("random:opt-125m")
    whole = traced_step(config, 1, 4096, how(kernel="varlen"))
    half = traced_step(config, 1, 4096, how(torch.bfloat16, "varlen"))
    twice = traced_step(config, 1, 4096, how(torch.bfloat16, "varlen", checkpointing=True))
    assert twice.activations < 0.3 * half.activations < 0.3 * whole.activations


# What follows from it


def test_a_step_has_all_its_parts():
    found = model("random:tiny-opt", overhead_bytes=1000)
    step = found.step(4, 64, accumulates=True)
    states = found.size.weight_bytes
    assert (step.weights, step.gradients, step.optimizer_states) == (states, states, 2 * states)
    assert step.activations > 0 and step.logits_chunk >= 256 * 259 * 4
    parts = (step.weights, step.gradients, step.optimizer_states, step.activations, step.logits_chunk)
    assert step.total == sum(parts) + step.overhead and 1000 < step.overhead < 1000 + sum(parts)


@pytest.mark.parametrize("kernel", ["segments", "varlen", "mask"])
def test_more_blocks_and_longer_ones_take_more(kernel):
    found = model(kernel=kernel)
    for accumulates in (True, False):
        for sizes in ([found.step(n, 64, accumulates=accumulates) for n in (1, 2, 15, 16, 17, 40, 64)],
                      [found.step(2, size, accumulates=accumulates) for size in (16, 64, 256, 512, 1024)]):  # fmt: skip
            totals = [step.total for step in sizes]
            assert totals == sorted(totals) and totals[0] < totals[-1]


def test_the_line_through_two_traces_meets_a_third():
    found = model("random:tiny-opt")
    line = found.step(64, 64, accumulates=True)
    traced = traced_step(model_config("random:tiny-opt"), 1, 4096, how())
    assert line.activations == pytest.approx(traced.activations, rel=1e-3)
    assert line.activations + line.logits_chunk == pytest.approx(max(traced.body, traced.end), rel=0.02)


def test_the_mask_of_long_blocks_is_counted():
    with_mask, without = model(kernel="mask", dtype=torch.float16), model(kernel="varlen", dtype=torch.float16)
    difference = with_mask.step(2, 1024, accumulates=True).total - without.step(2, 1024, accumulates=True).total
    # Once as booleans, and once as what is added to the scores of all layers.
    assert difference == pytest.approx(1.05 * 2 * 1024**2 * (1 + 2), rel=0.15)


def test_a_cpu_under_a_mask_is_planned_as_a_cpu():
    """Its gradients stay from step to step, and glibc's heap is no CUDA allocator."""
    under_mask, card = model(kernel="mask", on_cpu=True), model(kernel="mask")
    states = card.size.weight_bytes
    assert under_mask.step(16, 64, accumulates=False).gradients == states
    assert card.step(16, 64, accumulates=False).gradients < states


def test_a_cpu_that_gives_freed_memory_back_wastes_as_little_as_a_card():
    config = model_config("random:smollm2-135m")
    full, lean = (StateSize.planned(config, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert lean.saves_memory and replace(full, num_frozen=1).saves_memory and not full.saves_memory
    half, computed = how(torch.bfloat16, weights=torch.bfloat16), how(torch.bfloat16)
    saving = ((half, lean), (half, replace(full, num_frozen=1)), (replace(computed, checkpointing=True), full))
    for manner, size, at_least, at_most in (*((*one, 0.0, 0.05) for one in saving), (computed, full, 0.06, 1.0)):
        step = MemoryModel(config, manner, overhead_bytes=0, size=size).step(1, 128, accumulates=True)
        wasted = step.overhead / (step.gradients + step.activations + step.logits_chunk)
        assert at_least <= wasted <= at_most + 1e-6


@pytest.mark.parametrize(
    ("lean", "twice", "room", "sizes"),
    [
        *((False, False, 1.0, []), (True, False, 1.4, [2**16]), (True, True, 1.4, [2**16])),
        *((False, True, 1.4, [2**20]), (True, True, 1.6, []), (False, True, 1.6, [])),
    ],
)
def test_a_profile_that_saves_memory_gives_freed_memory_back_where_there_is_little(
    lean, twice, room, sizes, monkeypatch
):
    calls: list[int] = []
    monkeypatch.setattr(train, "give_back_freed_memory", calls.append)
    config = model_config("random:smollm2-135m")
    size = StateSize.planned(config, dtype=torch.bfloat16 if lean else torch.float32)
    memory = MemoryModel(config, how(torch.bfloat16), overhead_bytes=0, size=size).step(1, 128, accumulates=True)
    facts = replace(KNOWN_DEVICES["t4"], memory_bytes=int(room * memory.total))
    run = SimpleNamespace(
        plan=RunPlan(facts, size, 128, 1, 1, memory),
        config=SimpleNamespace(gradient_checkpointing=twice),
        loaded=SimpleNamespace(model=torch.nn.Linear(1, 1)),
    )
    run.loaded.model.device = torch.device("cpu")
    train._spare_memory(run)
    assert calls == sizes


# The micro-batch


@pytest.fixture
def few_traces(monkeypatch):
    """For what looks at the search alone: a smaller chunk begins the straight line at two blocks."""
    monkeypatch.setattr(memory_module, "CHUNK_TOKENS", 128)
    monkeypatch.setattr(memory_module, "chunk_tokens", lambda num_ids, dtype, gpu_bytes: 128)


def test_a_gpus_plan_counts_the_chunk_of_logits_that_it_computes():
    small, large = (model(gpu_bytes=size * 2**30).step(4, 512, accumulates=True) for size in (0, 80))
    # From 1,024 to 2,048 tokens of logits in float32, with their gradient, at the peak of a step.
    ids = int(model_config("random:tiny").vocab_size)
    assert large.total - small.total >= 1024 * ids * 4
    sizes = [model(gpu_bytes=80 * 2**30).step(size, 512, accumulates=True).total for size in (2, 8, 16, 20, 32)]
    assert sizes == sorted(sizes)
    whole = traced_step(model_config("random:tiny"), 1, 8 * 512, how(chunk=8 * 512))  # between two traces
    line = model(gpu_bytes=80 * 2**30)._traced(8, 512, gives_back=False)
    assert [line.body, line.end] == pytest.approx([whole.body, whole.end], rel=0.02)


@pytest.mark.parametrize("blocks_per_step", [1, 2, 12, 13, 22, 64])
def test_more_memory_never_plans_a_smaller_micro_batch(blocks_per_step, few_traces):
    found = model()
    sizes = [planned(found, 2**power, blocks_per_step=blocks_per_step) for power in range(10, 40)]
    assert sizes[0] == 0 and sizes[-1] == blocks_per_step
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(sizes))


def test_what_is_planned_fits_and_the_next_size_does_not(few_traces):
    found = model()
    for size in (1, 3, 7, 11):
        free = found.step(size, 64, accumulates=True).total / memory_module.SAFETY
        assert planned(found, free + 2, blocks_per_step=23) == size
        assert planned(found, free - 1000, blocks_per_step=23) < size


def test_a_divisor_of_the_step_is_preferred_where_one_is_near(few_traces):
    found = model()
    room_for_five = found.step(5, 64, accumulates=True).total / memory_module.SAFETY + 1000
    assert planned(found, room_for_five, blocks_per_step=24) == 4
    assert planned(found, room_for_five, blocks_per_step=23) == 5  # a prime: no divisor but 1 and itself


def test_beyond_a_number_of_tokens_larger_micro_batches_bring_nothing():
    assert planned(model(), 2**40, block_size=512, blocks_per_step=64) == 8


def with_adamw(num_parameters: int) -> StateSize:
    return StateSize(num_parameters, "adamw", 8 * num_parameters)


def test_a_model_that_goes_token_by_token_is_traced_in_short_rows_with_the_same_bytes(monkeypatch):
    sizes = {"hidden_size": 16, "vocab_size": 259, "num_hidden_layers": 2}
    config = MambaConfig(state_size=4, **sizes)
    key = json.dumps(copy.deepcopy(config).to_dict(), sort_keys=True, default=str)
    how = Computation(torch.float32, ROWS, on_cpu=False)
    monkeypatch.setattr(trace, "PROBED_ROWS", (8, 16))
    assert trace._goes_token_by_token(key)
    found, expected = (find(key, 1, *shape, how) for find, shape in (
        (trace._from_short_rows, (96, 32)), (trace._of_layers, (3, 32))
    ))  # fmt: skip
    assert astuple(found)[:2] == pytest.approx(astuple(expected)[:2], rel=0.01)
    # Two layers of it have as many entries as a pair of limits, and RWKV's weights cannot be begun with one layer.
    assert traced_step(Mamba2Config(num_heads=8, head_dim=4, n_groups=2, state_size=4, **sizes), 1, 8, how).body > 0
    assert traced_step(RwkvConfig(context_length=64, **sizes), 1, 8, how).body > 0


def test_a_model_that_looks_at_its_fresh_weights_has_a_size():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert (
        trace.model_without_contents(ModernBertDecoderConfig(vocab_size=259, pad_token_id=0, **sizes)).num_parameters()
        > 259 * 16
    )


def test_a_model_whose_states_cannot_fit_is_refused_with_the_arithmetic():
    with pytest.raises(UserError) as caught:
        check_states_fit(with_adamw(7_000_000_000), 16 * 2**30, "hub/gross", "t4")
    sentence = str(caught.value)
    for part in ("hub/gross", "t4", "7.0 B parameters", "16 bytes", "104.3 GiB", "16.0 GiB", "859.0 M parameters"):
        assert part in sentence
    check_states_fit(with_adamw(1_000_000_000), 16 * 2**30, "hub/klein", "t4")


def test_the_exercises_rows_fit():
    """Sequence length and batch that ran out of memory there: 512 x 4 on a T4, 1024 x 16 on an A100 of 40 GB."""
    config = model_config("random:opt-125m")
    for name, block_size, size in (("t4", 256, 4), ("t4", 512, 4), ("a100-40gb", 512, 8), ("a100-40gb", 1024, 16)):
        facts = KNOWN_DEVICES[name]
        found = MemoryModel(config, facts.computation(checkpointing=False), overhead_bytes=facts.overhead_bytes)
        assert found.step(size, block_size, accumulates=True).total < 0.9 * facts.memory_bytes
    # And what the issue of memory was: all of these in the 15 GiB of a T4, with AdamW's states.
    t4 = KNOWN_DEVICES["t4"]
    found = MemoryModel(config, t4.computation(checkpointing=False), overhead_bytes=t4.overhead_bytes)
    for block_size, size in ((512, 8), (1024, 16), (2048, 8)):
        assert found.step(size, block_size, accumulates=True).total < memory_module.SAFETY * t4.memory_bytes


# Operations


def test_operations_a_token_are_six_a_parameter_and_attentions():
    config = model_config("random:opt-125m")
    assert flops_per_token(config, 0, 512) == 12 * 12 * 768 * 512
    assert flops_per_token(config, 125_239_296, 512) == 6 * 125_239_296 + 12 * 12 * 768 * 512
    assert flops_per_token(model_config("random:smollm2-135m"), 0, 1024) == 12 * 30 * 576 * 1024


def test_the_share_of_the_peak_is_that_of_the_data_sheet_where_it_is_known():
    h100 = KNOWN_DEVICES["h100"]
    measured = replace(h100, peak_flops=800e12, sheet_flops=989e12)
    # 484,000 tokens per second of OPT-125M in blocks of 1,024, counted by hand.
    flops = flops_per_token(model_config("random:opt-125m"), 125_239_296, 1024)
    of_parameters = parameter_flops(125_239_296)
    used = utilization(measured, 484_000, flops, of_parameters)
    assert used == utilization(h100, 484_000, flops, of_parameters) | {"peak": "data sheet"}
    assert used["mfu_without_attention"] == pytest.approx(484_000 * 6 * 125_239_296 / 989e12)  # 0.368
    assert used["mfu"] == pytest.approx(0.423, abs=0.001)
    lora = parameter_flops(num_parameters=1000, num_frozen=900)
    assert lora == 4 * 900 + 6 * 100


# Gradient checkpointing


@pytest.mark.parametrize("ref", ["random:tiny", "random:tiny-opt"])
def test_layers_computed_twice_give_the_same_gradients_and_are_computed_twice(ref):
    import numpy as np

    from cartilha.blocks.packing import Batch
    from cartilha.model.forward import batch_nll

    ids = np.random.default_rng(0).integers(0, 256, (2, 32))
    batch = Batch(ids, ids, np.tile(np.arange(32), (2, 1)), np.array([20, 12, 32]))
    gradients, passes = [], []
    for checkpointing in (False, True):
        found = load_model(ref, torch.device("cpu")).model
        if checkpointing:
            checkpoint_layers(found)
        layer = next(m for name, m in found.named_modules() if name.endswith("layers.0"))
        count = [0]
        next(layer.children()).register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        batch_nll(found, batch, torch.float32).backward()
        gradients.append([p.grad for p in found.parameters()])
        passes.append(count[0])
    assert passes == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_model_without_marked_layers_cannot_be_checkpointed():
    found = AutoModelForCausalLM.from_config(model_config("random:tiny"))
    found.model.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match="type llama cannot be trained with --gradient_checkpointing"):
        checkpoint_layers(found)


def test_a_model_whose_heads_differ_from_layer_to_layer_has_the_largest():
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    config = AutoConfig.for_model("gemma4_text", hidden_size=256, **layers)
    sizes = [layer.head_dim for layer in config.per_layer_config]
    assert len(set(sizes)) == 2 and head_size(config) == max(sizes)
    assert flops_per_token(config, 0, 100) == 12 * 2 * config.num_attention_heads * max(sizes) * 100


def test_a_model_whose_step_cannot_be_traced_is_named(monkeypatch):
    monkeypatch.setattr(memory_module, "traced_step", lambda *arguments: 1 / 0)
    config = OPTConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16)
    with pytest.raises(UserError, match=r"opt \(division by zero\); try --micro_batch_size 1"):
        fit(Profile(lean=False, checkpointing=False), config, KNOWN_DEVICES["t4"], "adamw", (64, 1))
