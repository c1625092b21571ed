"""The compiled body: one graph for all batches, the same figures as plain code, and plain code where it fails."""

from __future__ import annotations

import inspect
import logging
import math
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.nn.attention import varlen
from transformers import PreTrainedModel

import small_models
from cartilha.blocks.packing import Batch, PackedStream, stack
from cartilha.blocks.sampler import BlockSampler
from cartilha.errors import UserError
from cartilha.model import attention, forward
from cartilha.model.attention import KERNELS, choose_kernel
from cartilha.model.compiling import CompiledBody, training_body
from cartilha.model.flash_attention_3 import flash_attention_3
from cartilha.model.forward import batch_nll
from cartilha.model.loss import chunk_kernel
from cartilha.model.query_factor import left_to_kernel, query_factors
from cartilha.model.recomputation import checkpoint_layers, layers_of
from cartilha.model.segment_attention import causal_mask
from cartilha.tokens.packed import PackedDocuments
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.schedule import Schedule
from cartilha.training.state import TrainingState
from small_models import NUM_IDS

BLOCK = 24
GLU = {"intermediate_size": 48, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {},
    "llama": GLU,
    "qwen2": {**GLU, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma": {**GLU, "head_dim": 16},
}
KINDS_OF_LAYER = {"qwen2": 2}  # where not all layers are alike: one of two has a window


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of one test serves another."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    return small_models.tiny(name, **{**small_models.SIZES, **ARCHITECTURES[name], **changes})


def packed(lengths: list[int], rows: int = 2) -> Batch:
    generator = np.random.default_rng(len(lengths))
    documents = [generator.integers(4, NUM_IDS, length) for length in lengths]
    stream = PackedStream(PackedDocuments.from_ids(documents, prefix_id=2, end_id=3), BLOCK)
    return stack([stream.block(row) for row in range(rows)])


# As many rows, cut otherwise each time: no two have the same number of segments.
BATCHES = [packed(lengths) for lengths in ([60], [30, 10, 20], [7, 1, 9, 20, 2, 12, 5], [4] * 12)]


def gradients(
    model: PreTrainedModel, batch: Batch, body: CompiledBody | None, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = batch_nll(model, batch, dtype, body)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **found}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, boundaries: torch.Tensor, scale: float | None, window: list[int]
) -> tuple[torch.Tensor, float]:
    """Softmax over what each query may see, shape (heads, tokens, tokens), float32; and the scale."""
    factor = scale or query.shape[2] ** -0.5
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), repeated.float()) * factor
    segment = torch.repeat_interleave(torch.arange(len(boundaries) - 1), boundaries.diff())
    mask = causal_mask(len(query), None if window[0] < 0 else window[0] + 1, query.device)
    return scores.masked_fill(~(mask & (segment[:, None] == segment)), -torch.inf).softmax(-1), factor


@pytest.fixture(scope="module")
def varlen_on_cpu() -> list[int]:
    """Kernels for torch's own operator on the device that has none; gives the numbers of boundaries that it saw."""
    seen: list[int] = []

    @varlen._varlen_attn.register_kernel("cpu")
    def forward_kernel(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window, *defaults):
        assert cu_q.dtype == torch.int32 and int(cu_q[-1]) == len(q) and max_q in (BLOCK, len(q))
        assert window[1] == 0 and is_causal == (window[0] == -1)
        seen.append(len(cu_q))
        weights, _ = attention_weights(q, k, cu_q, scale, window)
        values = v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        output = torch.empty_like(q).copy_(torch.einsum("hqk,khd->qhd", weights, values))
        return output, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward_kernel(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale=None, window=None):
        # Below autograd, so written out: the derivative of softmax(q k') v.
        weights, factor = attention_weights(q, k, cu_q, scale, window)
        repeats, grad = q.shape[1] // k.shape[1], grad.float()
        keys, values = (heads.float().repeat_interleave(repeats, dim=1) for heads in (k, v))
        by_weights = torch.einsum("qhd,khd->hqk", grad, values)
        by_scores = weights * (by_weights - (by_weights * weights).sum(-1, keepdim=True)) * factor
        grad_q = torch.einsum("hqk,khd->qhd", by_scores, keys)
        grad_k = torch.einsum("hqk,qhd->khd", by_scores, q.float())
        grad_v = torch.einsum("hqk,qhd->khd", weights, grad)
        shared = [heads.unflatten(1, (-1, repeats)).sum(2) for heads in (grad_k, grad_v)]
        return tuple(torch.empty_like(x).copy_(y) for x, y in zip((q, k, v), (grad_q, *shared), strict=True))

    return seen


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_graph_serves_all_batches(name):
    model, counter = tiny(name), CompileCounter()
    body = CompiledBody(model, counter)
    for batch in BATCHES:
        assert_same(gradients(model, batch, body), gradients(model, batch, None))
    assert body.is_compiled and counter.frame_count == KINDS_OF_LAYER.get(name, 1)
    assert not counters["graph_break"]


def test_the_layers_are_themselves_again_after_a_pass():
    model = tiny("opt")
    body = CompiledBody(model, CompileCounter())
    plain = [layer.forward for layer in layers_of(model)]
    gradients(model, BATCHES[0], body)
    assert [layer.forward for layer in layers_of(model)] == plain


@pytest.mark.parametrize("architecture", ["opt", "qwen2"])
def test_one_graph_serves_all_batches_with_variable_length_attention(architecture, varlen_on_cpu, monkeypatch):
    model, counter = tiny(architecture), CompileCounterWithBackend("aot_eager")
    batches = [*BATCHES, packed([0] * 40)]
    expected = [gradients(model, batch, None, torch.bfloat16) for batch in batches]
    monkeypatch.setattr(forward, "choose_kernel", lambda *hardware: "varlen")
    body = CompiledBody(model, counter)
    varlen_on_cpu.clear()
    for batch, exact in zip(batches, expected, strict=True):
        found = gradients(model, batch, body, torch.bfloat16)
        assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-3)
        for name, gradient in exact.items():
            assert (found[name] - gradient).norm() < 0.1 * gradient.norm() + 1e-3, name
    assert body.is_compiled and counter.frame_count == KINDS_OF_LAYER.get(architecture, 1)
    assert not counters["graph_break"]
    assert varlen_on_cpu == [17] * 2 * len(BATCHES) + [33] * 2  # numbers of boundaries, in both layers


def varlen_attn_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """As torch 2.10 has it: causal or not, and no more."""
    window = (-1, 0) if is_causal else (-1, -1)
    return varlen.varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def varlen_attn_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """As torch 2.11 has it: fewer keys than queries are not mentioned."""
    return varlen.varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


@pytest.mark.parametrize("older", [varlen_attn_2_10, varlen_attn_2_11])
@pytest.mark.parametrize("name", ["opt", "llama", "qwen2"])
def test_variable_length_attention_of_older_versions_of_torch(name, older, varlen_on_cpu, monkeypatch):
    model, batch = tiny(name), BATCHES[2]
    monkeypatch.setattr(forward, "choose_kernel", lambda *hardware: "varlen")
    expected = gradients(model, batch, None, torch.bfloat16)
    monkeypatch.setattr(attention, "varlen_attn", older)
    monkeypatch.setattr(attention, "VARLEN_SETTINGS", frozenset(inspect.signature(older).parameters))
    if name == "qwen2" and older is varlen_attn_2_10:
        with pytest.raises(UserError, match=r"a window of 5 positions needs torch 2\.11 or later on this GPU"):
            gradients(model, batch, None, torch.bfloat16)
        return
    counter = CompileCounterWithBackend("aot_eager")
    body = CompiledBody(model, counter)
    for body_or_none in (None, body):
        found = gradients(model, batch, body_or_none, torch.bfloat16)
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-3)
        for parameter, gradient in expected.items():
            assert (found[parameter] - gradient).norm() < 0.1 * gradient.norm() + 1e-3, parameter
    assert body.is_compiled and counter.frame_count == KINDS_OF_LAYER.get(name, 1)


@pytest.fixture
def flash_attention_3_installed(varlen_on_cpu, monkeypatch) -> Iterator[dict[str, Any]]:
    """Stands for the package and torch's switch; `attend` is what computes then."""
    fa3: dict[str, Any] = {"attend": varlen.varlen_attn, "active": None}

    def activate(name: str) -> None:
        fa3["active"] = name
        monkeypatch.setattr(
            "cartilha.model.flash_attention_3.varlen_attn", lambda *given, **how: fa3["attend"](*given, **how)
        )

    def restore() -> None:
        fa3["active"] = None

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: fa3["active"])
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", restore)
    flash_attention_3.cache_clear()
    yield fa3
    flash_attention_3.cache_clear()


def test_flash_attention_3_is_taken_where_it_is_installed_and_that_is_said_once(
    flash_attention_3_installed, monkeypatch, caplog
):
    caplog.set_level("INFO")
    on_cpu = lambda kind: flash_attention_3("cpu")  # noqa: E731
    monkeypatch.setattr(attention, "flash_attention_3", on_cpu)
    half = torch.bfloat16
    for _ in range(2):
        assert choose_kernel("cuda", (9, 0), half) == "flash attention 3"
    for capability, dtype, other in (((8, 0), half, "varlen"), ((9, 0), torch.float32, "mask")):
        assert choose_kernel("cuda", capability, dtype) == other
    assert caplog.messages == ["Attention is computed by FlashAttention-3, which is installed."]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flash_attention_3.cache_clear()
    assert choose_kernel("cuda", (9, 0), half) == "varlen"


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda q, *rest, **how: 1.1 * varlen.varlen_attn(q, *rest, **how), "it differs from torch's own by 0.21"),
        (lambda q, *rest, **how: math.nan * varlen.varlen_attn(q, *rest, **how), "it differs from torch's own by nan"),
        (lambda *given, **how: exec("raise RuntimeError('no kernel image')"), "no kernel image"),
    ],
)
def test_flash_attention_3_that_is_wrong_or_fails_is_not_used_and_that_is_said(
    flash_attention_3_installed, attend, reason, caplog
):
    flash_attention_3_installed["attend"] = attend
    assert not flash_attention_3("cpu") and flash_attention_3_installed["active"] is None
    assert len(caplog.messages) == 1 and reason in caplog.text


def test_python_values_that_change_would_make_a_graph_each(monkeypatch):
    made = forward._segments
    monkeypatch.setattr(forward, "_segments", lambda model, batch, dtype, body: made(model, batch, dtype))
    model, counter = tiny("opt"), CompileCounter()
    body = CompiledBody(model, counter)
    for batch in BATCHES[:2]:
        batch_nll(model, batch, torch.float32, body)
    assert counter.frame_count > 1, "the tests above could not see what they are there for"


def test_another_shape_is_another_graph_and_no_more():
    model, counter = tiny("opt"), CompileCounter()
    body = CompiledBody(model, counter)
    for rows in (2, 1, 2, 1):
        batch = packed([7, 1, 9, 20, 2, 12, 5], rows)
        assert_same(gradients(model, batch, body), gradients(model, batch, None))
    assert body.is_compiled and counter.frame_count == 2


def test_layers_that_are_computed_twice_are_compiled_too():
    plain, model, counter = tiny("opt"), tiny("opt"), CompileCounterWithBackend("aot_eager")
    checkpoint_layers(model)
    body = CompiledBody(model, counter)
    for batch in BATCHES[:3]:
        assert_same(gradients(model, batch, body), gradients(plain, batch, None))
    assert body.is_compiled and counter.frame_count == 1 and not counters["graph_break"]


@torch._dynamo.config.patch(recompile_limit=1)
def test_too_many_graphs_end_in_plain_code_and_that_is_said(caplog):
    model, counter = tiny("opt"), CompileCounter()
    body = CompiledBody(model, counter)
    for rows in (2, 1):
        batch = packed([7, 1, 9, 20, 2, 12, 5], rows)
        assert_same(gradients(model, batch, body), gradients(model, batch, None))
    assert not body.is_compiled and "The model could not be compiled" in caplog.text


@pytest.mark.parametrize("what", ["body", "loss"])
def test_compiled_code_is_kept_in_the_users_cache(what, monkeypatch, tmp_path):
    monkeypatch.setenv("CARTILHA_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if what == "body":
        CompiledBody(tiny("opt"), "eager")
    else:
        monkeypatch.setattr("cartilha.model.loss.compile_pays", lambda device_type: True)
        chunk_kernel.__wrapped__("cuda")
    assert cache_dir() == str(tmp_path / "inductor")  # where torch looks for it in every process


@pytest.mark.skipif(not shutil.which("g++"), reason="the compiler of CPU code is missing")
def test_the_next_process_finds_the_compiled_code(monkeypatch, tmp_path):
    monkeypatch.setenv("CARTILHA_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    model, batch = tiny("opt"), packed([7, 1, 9, 20, 2, 12, 5], 2)
    results, found = [], []
    for _ in range(2):
        results.append(gradients(model, batch, CompiledBody(model)))
        found.append(dict(counters["inductor"]))
        torch._dynamo.reset()  # forgets what this process has compiled, as the next one knows nothing of it
        PyCodeCache.cache_clear()
        counters.clear()
    of_cache = [{name: count for name, count in each.items() if name.startswith("fxgraph_cache")} for each in found]
    assert of_cache == [{"fxgraph_cache_miss": 2}, {"fxgraph_cache_hit": 2}]  # forward and backward of one layer
    assert any((tmp_path / "inductor").rglob("*.so"))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_applies_the_factor_of_the_queries_in_compiled_layers_with_the_same_bits(dtype, monkeypatch):
    model = tiny("opt", num_attention_heads=2)  # heads of 16: a factor of 1/4
    factors, compute = [], KERNELS["mask"].attend

    def attend(self: Any, query: torch.Tensor, *given: Any) -> torch.Tensor:
        factors.append(given[2].scaling)
        return compute(self, query, *given)

    monkeypatch.setattr(forward, "choose_kernel", lambda *hardware: "mask")
    body = CompiledBody(model, "eager")
    plain, compiled = (gradients(model, BATCHES[2], each, dtype) for each in (None, body))
    assert body.is_compiled and all(torch.equal(compiled[name], plain[name]) for name in plain)
    assert [module.scaling for module in model.modules() if hasattr(module, "scaling")] == [0.25, 0.25]
    found = query_factors(model)
    monkeypatch.setattr(KERNELS["mask"], "attend", attend)
    with left_to_kernel(found):
        batch_nll(model, BATCHES[2], dtype)
    batch_nll(model, BATCHES[2], dtype)
    assert factors == [0.25, 0.25, 1.0, 1.0]


def test_a_factor_is_left_to_the_kernel_only_where_that_is_exact_and_proven(monkeypatch):
    assert [factor for _, factor in query_factors(tiny("llama", num_attention_heads=2))] == [0.25, 0.25]
    assert not query_factors(tiny("opt"))  # 8 ** -0.5 is rounded
    assert not query_factors(tiny("opt", num_attention_heads=2).train())
    model = tiny("opt", num_attention_heads=2)
    model.model.decoder.layers[0].fc1.scaling = 0.5  # by chance it has the name, and a use of its own
    hook = lambda layer, given, output: output * layer.scaling  # noqa: E731
    model.model.decoder.layers[0].fc1.register_forward_hook(hook)
    assert not query_factors(model)


def train(model: PreTrainedModel, body: CompiledBody | None, micro_batch_size: int = 2) -> list[float]:
    generator = np.random.default_rng(0)
    ids = [generator.integers(4, NUM_IDS, length) for length in [7, 1, 9, 20, 2, 12, 5, 30, 11, 3] * 3]
    documents = PackedDocuments.from_ids(ids, prefix_id=2, end_id=3)
    sampler = BlockSampler(documents, block_size=BLOCK, blocks_per_step=5, seed=0)
    state = TrainingState.begin(model, torch.float32, lr=1e-2, weight_decay=0.1)
    settings = StepSettings(torch.float32, micro_batch_size, body=body)
    records = train_steps(state, sampler, Schedule(5, 1e-2, 0.1, 0.1), settings)
    return [float(record.loss) for record in records]


def test_training_compiles_the_usual_micro_batch_alone():
    counter = CompileCounter()
    model = tiny("opt")
    found = train(model, CompiledBody(model, counter))
    assert found == pytest.approx(train(tiny("opt"), None), rel=1e-5)
    assert counter.frame_count == 1  # 5 blocks are 2 + 2 + 1: the last one is computed plainly


def backward_fails(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    raise RuntimeError("PTXAS failed\nand a long trace")


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_body_that_cannot_be_compiled_is_computed_plainly(when, caplog):
    backend = backward_fails if when == "forward" else aot_autograd(fw_compiler=as_it_is, bw_compiler=backward_fails)
    model = tiny("opt")
    body = CompiledBody(model, backend)
    with caplog.at_level(logging.WARNING, "cartilha"):
        found = train(model, body)
    assert found == pytest.approx(train(tiny("opt"), None), rel=1e-5)
    assert not body.is_compiled
    assert caplog.text.count("The model could not be compiled") == 1
    assert "PTXAS failed" in caplog.text and "long trace" not in caplog.text


def as_it_is(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    from functorch.compile import make_boxed_func

    return make_boxed_func(graph.forward)


def test_memory_that_runs_out_halves_the_micro_batch_of_a_compiled_body(monkeypatch):
    counter = CompileCounter()
    model = tiny("opt")
    body = CompiledBody(model, counter)
    rows: list[int] = []

    def patched(model: Any, batch: Batch, dtype: torch.dtype, body: CompiledBody | None) -> torch.Tensor:
        rows.append(len(batch.input_ids))
        loss = batch_nll(model, batch, dtype, body)
        if len(rows) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr("cartilha.training.loop.batch_nll", patched)
    found = train(model, body)
    assert rows[:3] == [2, 2, 1] and set(rows[2:]) == {1}
    assert body.is_compiled and counter.frame_count == 2
    monkeypatch.undo()
    assert found == pytest.approx(train(tiny("opt"), None), rel=1e-5)


@pytest.mark.parametrize(
    ("device", "choice", "num_steps", "compiler", "compiled"),
    [
        ("cuda", "auto", 30, True, True),
        ("cuda", "auto", 29, True, False),
        ("cuda", "auto", 100, False, False),
        ("cuda", "never", 100, True, False),
        ("cpu", "auto", 100, True, False),
        ("cpu", "always", 1, True, True),
    ],
)
def test_the_body_is_compiled_where_it_pays(device, choice, num_steps, compiler, compiled, monkeypatch):
    monkeypatch.setattr("cartilha.machine.devices.has_cxx_compiler", lambda: compiler)
    monkeypatch.setattr(PreTrainedModel, "device", torch.device(device))
    assert (training_body(tiny("opt"), choice, num_steps) is not None) is compiled


def test_what_flash_attention_cannot_compute_goes_under_a_mask_and_that_is_said_once(monkeypatch, caplog):
    forward._announce_mask.cache_clear()
    monkeypatch.setattr(forward, "choose_kernel", lambda *hardware: "varlen")
    chosen: list[str] = []
    under_mask = KERNELS["mask"].of
    for kernel in ("mask", "varlen"):
        note = lambda *settings, name=kernel: (chosen.append(name), under_mask(*settings[:3]))[1]  # noqa: E731
        monkeypatch.setattr(KERNELS[kernel], "of", note)
    model = tiny("opt")
    for training, rate, hidden_size in ((False, 0.1, 32), (True, 0.0, 32), (True, 0.1, 32), (False, 0.0, 36)):
        model.train(training)
        model.config.attention_dropout = rate
        monkeypatch.setattr(model.config, "hidden_size", hidden_size)  # nine numbers a head are none of eight's
        forward.hidden_states(model, BATCHES[0], torch.float32)
        forward.hidden_states(model, BATCHES[0], torch.float32)
    assert chosen[::2] == chosen[1::2] == ["varlen", "varlen", "mask", "mask"]
    assert [message.split(": ")[1] for message in caplog.messages] == [
        "it knows no dropout of attention weights, which this model is trained with.",
        "flash attention takes heads of 8, 16, ... 256 numbers, and this model's have 9.",
    ]


def test_without_its_own_kernels_a_cpu_computes_the_same_under_a_mask_and_says_so(monkeypatch, caplog):
    forward._announce_mask.cache_clear()
    model = tiny("opt")
    expected = forward.hidden_states(model, BATCHES[0], torch.float32)
    monkeypatch.setattr("cartilha.model.attention.HAS_KERNELS", False)
    torch.testing.assert_close(forward.hidden_states(model, BATCHES[0], torch.float32), expected)
    assert len(caplog.messages) == 1 and "this version of torch does not have it" in caplog.messages[0]
