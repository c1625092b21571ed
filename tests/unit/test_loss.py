"""The fused head and loss: torch's cross-entropy, chunk by chunk, with never more than a chunk of logits alive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cartilha.blocks.packing import IGNORE_INDEX
from cartilha.machine.devices import compile_pays
from cartilha.model import loss as loss_module
from cartilha.model import products
from cartilha.model.compiling import CompiledOrPlain
from cartilha.model.head import Head, HeadShape
from cartilha.model.loss import (
    chunk_kernel,
    fused_nll_and_gradient,
    linear_cross_entropy,
    nll_and_gradient,
    token_scores,
)

CHUNK, HIDDEN, NUM_IDS = 8, 16, 37
SIZES = [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 3]

sizes = pytest.mark.parametrize("num_tokens", SIZES)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", CHUNK)


def problem(
    num_tokens: int, ignored: float = 0.3, hidden_size: int = HIDDEN
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head and targets of which some are ignored; logits far from uniform."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(NUM_IDS, hidden_size, generator=generator)
    targets = torch.randint(0, NUM_IDS, (num_tokens,), generator=generator)
    targets[torch.rand(num_tokens, generator=generator) < ignored] = IGNORE_INDEX
    return hidden, weight, targets


def with_gradients(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = function(hidden, weight)
    value.backward()
    return value.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(
    ("num_ids", "dtype", "gib", "expected"),
    [
        (50_272, torch.bfloat16, 0, 1024),  # a CPU
        (50_272, torch.float16, 14.75, 2048),  # T4
        (50_272, torch.bfloat16, 22.5, 4096),  # L4
        (50_272, torch.bfloat16, 79.1, 8192),  # H100
        (262_144, torch.float16, 14.75, 1024),
        (262_144, torch.float32, 139.0, 2048),
    ],
)
def test_a_chunk_takes_a_twentieth_of_a_gpu_at_most(num_ids, dtype, gib, expected, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 1024)
    chunk = loss_module.chunk_tokens(num_ids, dtype, int(gib * 2**30))
    assert chunk == expected
    assert chunk == 1024 or 2 * chunk * num_ids * dtype.itemsize <= 0.05 * gib * 2**30


def test_the_size_of_a_chunk_changes_nothing():
    hidden, weight, targets = problem(100)
    found = [
        with_gradients(lambda h, w, n=n: linear_cross_entropy(h, Head(w), targets, torch.float32, n), hidden, weight)
        for n in (None, 3, 64, 4096)
    ]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-5, atol=1e-5)


def torch_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction="sum")


@sizes
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.9])
def test_value_and_gradients_equal_those_of_torch(num_tokens, ignored):
    hidden, weight, targets = problem(num_tokens, ignored)
    expected = with_gradients(lambda h, w: torch_nll(h, w, targets), hidden.double(), weight.double())
    found = with_gradients(lambda h, w: linear_cross_entropy(h, Head(w), targets, torch.float32), hidden, weight)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)
    ignored_rows = targets == IGNORE_INDEX
    assert not found[1][ignored_rows].any()
    assert found[1][~ignored_rows].any(dim=1).all()


def test_gradients_are_right_to_second_order_of_a_step():
    # Finite differences in place of a second implementation: the value and its gradients belong together.
    hidden, weight, targets = problem(3 * CHUNK + 1)
    value, grad_hidden, grad_weight = with_gradients(
        lambda h, w: linear_cross_entropy(h, Head(w), targets, torch.float32), hidden, weight
    )
    step = 1e-2
    generator = torch.Generator().manual_seed(0)
    # Along the gradients, and aside: the slope is large, and the value bends.
    direction = [g / g.norm() + 0.1 * torch.randn(g.shape, generator=generator) for g in (grad_hidden, grad_weight)]
    ends = [
        linear_cross_entropy(hidden + sign * direction[0], Head(weight + sign * direction[1]), targets, torch.float32)
        for sign in (step, -step)
    ]
    slope = (grad_hidden * direction[0]).sum() + (grad_weight * direction[1]).sum()
    assert abs(slope) > 1 and value > 1
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=2e-2, atol=0)


def test_the_gradient_follows_what_is_done_with_the_value():
    hidden, weight, targets = problem(2 * CHUNK + 3)
    plain = with_gradients(lambda h, w: linear_cross_entropy(h, Head(w), targets, torch.float32), hidden, weight)
    # As in training: divided by the targets of the whole step, and the hidden states are not a leaf.
    found = with_gradients(
        lambda h, w: linear_cross_entropy(2 * h, Head(w), targets, torch.float32) / 7, hidden / 2, weight
    )
    torch.testing.assert_close(found[0], plain[0] / 7)
    torch.testing.assert_close(found[1], plain[1] * 2 / 7)
    torch.testing.assert_close(found[2], plain[2] / 7)


def test_gradients_of_several_batches_add_up():
    hidden, weight, targets = problem(5 * CHUNK)
    whole = with_gradients(lambda h, w: linear_cross_entropy(h, Head(w), targets, torch.float32), hidden, weight)
    halves = with_gradients(
        lambda h, w: (
            linear_cross_entropy(h[: CHUNK + 3], Head(w), targets[: CHUNK + 3], torch.float32)
            + linear_cross_entropy(h[CHUNK + 3 :], Head(w), targets[CHUNK + 3 :], torch.float32)
        ),
        hidden,
        weight,
    )
    for ours, theirs in zip(halves, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_inputs_are_left_as_they_are():
    hidden, weight, targets = problem(2 * CHUNK + 3)
    copies = hidden.clone(), weight.clone(), targets.clone()
    with_gradients(lambda h, w: linear_cross_entropy(h, Head(w), targets, torch.float32), hidden, weight)
    token_scores(hidden, Head(weight), targets.clamp(min=0), torch.float32)
    for before, after in zip(copies, (hidden, weight, targets), strict=True):
        assert torch.equal(before, after)


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_scored_is_zero_with_zero_gradients(num_tokens, dtype):
    hidden, weight, targets = problem(num_tokens, ignored=1.1)
    assert (targets == IGNORE_INDEX).all()
    value, *grads = with_gradients(lambda h, w: linear_cross_entropy(h, Head(w), targets, dtype), hidden, weight)
    assert value == 0
    assert all((gradient == 0).all() for gradient in grads)


def test_far_away_logits_overflow_nothing():
    hidden, weight, targets = problem(CHUNK + 1, ignored=0.0)
    value, *grads = with_gradients(
        lambda h, w: linear_cross_entropy(h, Head(w), targets, torch.float32), hidden * 1e4, weight
    )
    expected = torch_nll(hidden.double() * 1e4, weight.double(), targets)
    assert value > 1e4
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=0)
    assert all(gradient.isfinite().all() for gradient in grads)


@sizes
def test_bfloat16_is_close_to_float32(num_tokens):
    hidden, weight, targets = problem(num_tokens, ignored=0.0)
    exact = with_gradients(lambda h, w: linear_cross_entropy(h, Head(w), targets, torch.float32), hidden, weight)
    half = with_gradients(lambda h, w: linear_cross_entropy(h, Head(w), targets, torch.bfloat16), hidden, weight)
    for ours, theirs in zip(half, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert not torch.equal(half[2], exact[2]), "the compute dtype is not used"


def test_a_bfloat16_sum_stays_exact_to_float32():
    # 4,500 nats in bf16 would move in steps of 32: the sum itself must be float32.
    hidden, weight = torch.zeros(40 * CHUNK, HIDDEN), torch.randn(NUM_IDS, HIDDEN)
    targets = torch.zeros(40 * CHUNK, dtype=torch.long)
    value = linear_cross_entropy(hidden, Head(weight), targets, torch.bfloat16)
    assert value.item() == pytest.approx(40 * CHUNK * torch.tensor(NUM_IDS).log().item(), rel=1e-6)
    assert abs(value.bfloat16().float() - value) > 1


@sizes
def test_token_nll_equals_torch(num_tokens):
    hidden, weight, targets = problem(num_tokens, ignored=0.0)
    expected = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
    found = token_scores(hidden, Head(weight), targets, torch.float32).nll
    assert found.shape == (num_tokens,) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    half = token_scores(hidden, Head(weight), targets, torch.bfloat16).nll
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, found, rtol=0.05, atol=0.2)
    summed = linear_cross_entropy(hidden, Head(weight), targets, torch.float32)
    torch.testing.assert_close(found.sum(), summed, rtol=1e-5, atol=1e-5)


def test_token_nll_of_no_tokens_is_empty_and_keeps_no_graph():
    hidden, weight, targets = problem(CHUNK)
    assert token_scores(hidden[:0], Head(weight), targets[:0], torch.float32).nll.shape == (0,)
    assert not token_scores(
        hidden.requires_grad_(), Head(weight), targets.clamp(min=0), torch.float32
    ).nll.requires_grad


class LargestLogits(TorchDispatchMode):
    """Records the largest tensor with a column for each id that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] == NUM_IDS:
                self.num_rows = max(self.num_rows, value.numel() // NUM_IDS)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_more_than_a_chunk_of_logits(dtype):
    # What has NUM_IDS columns is logits, or the transposed head with its `hidden_size` rows: fewer than a chunk here.
    hidden, weight, targets = problem(20 * CHUNK, hidden_size=CHUNK // 2)

    def largest(function: Callable[[], object]) -> int:
        with LargestLogits() as recorded:
            function()
        return recorded.num_rows

    usual = largest(lambda: with_gradients(lambda h, w: torch_nll(h, w, targets), hidden, weight))
    assert usual == len(targets), "the spy sees nothing"
    fused = largest(
        lambda: with_gradients(lambda h, w: linear_cross_entropy(h, Head(w), targets, dtype), hidden, weight)
    )
    assert fused == CHUNK
    scored = largest(lambda: token_scores(hidden, Head(weight), targets.clamp(min=0), dtype).nll)
    assert scored == CHUNK


def test_tokens_are_scored_in_chunks_of_the_device(monkeypatch):
    hidden, weight, targets = problem(20 * CHUNK, ignored=0.0, hidden_size=CHUNK // 2)
    expected = token_scores(hidden, Head(weight), targets, torch.float32).nll
    monkeypatch.setattr(loss_module, "_chunk_on", lambda device, head, dtype: 4 * CHUNK)  # as on a GPU
    with LargestLogits() as recorded:
        found = token_scores(hidden, Head(weight), targets, torch.float32).nll
    assert recorded.num_rows == 4 * CHUNK
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logits_are_kept_for_the_backward_pass(dtype):
    hidden, weight, targets = problem(20 * CHUNK)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        linear_cross_entropy(hidden.requires_grad_(), Head(weight.requires_grad_()), targets, dtype)
    assert kept
    assert all(shape[-1] != NUM_IDS for shape in kept)


# Compilation, which cannot run here: its choices and its fallback


@pytest.mark.parametrize(
    ("device_type", "compiler", "pays"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False), ("cpu", False, False), ("mps", True, False)],
)
def test_the_loss_is_compiled_on_cuda_with_a_compiler_alone(device_type, compiler, pays, caplog, monkeypatch):
    monkeypatch.setattr("cartilha.machine.devices.has_cxx_compiler", lambda: compiler)
    assert compile_pays(device_type) is pays
    assert ("no C++ compiler" in caplog.text) == (device_type == "cuda" and not compiler)


def test_a_compilation_that_fails_is_said_once_and_the_plain_code_goes_on(caplog):
    def broken(logits, index, scored):
        raise RuntimeError("Cannot find a working triton installation.\nand a long trace")

    plain = chunk_kernel("cpu")
    kernel = CompiledOrPlain(broken, plain, "The loss")
    arguments = torch.randn(5, 11), torch.randint(0, 11, (5, 1)), torch.ones(5, 1)
    expected = plain(arguments[0].clone(), *arguments[1:])
    for _ in range(2):
        found = kernel(arguments[0].clone(), *arguments[1:])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert caplog.text.count("The loss could not be compiled") == 1 and "long trace" not in caplog.text


def test_a_lack_of_memory_is_no_failure_to_compile(caplog):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernel = CompiledOrPlain(full, chunk_kernel("cpu"), "The loss")
    with pytest.raises(torch.OutOfMemoryError):
        kernel(torch.randn(2, 3), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    assert kernel.is_compiled and not caplog.text


def test_a_compiled_kernel_is_used_while_it_works():
    calls = []
    plain = chunk_kernel("cpu")
    kernel = CompiledOrPlain(lambda *arguments: calls.append(1) or plain(*arguments), lambda *arguments: 1 / 0, "It")
    kernel(torch.randn(2, 3), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_form_that_is_compiled_computes_the_same(dtype):
    logits = (torch.randn(40, NUM_IDS) * 4).to(dtype)
    index, scored = torch.randint(0, NUM_IDS, (40, 1)), (torch.arange(40) % 3 > 0).float()[:, None]
    found = fused_nll_and_gradient(logits.clone(), index, scored)
    expected = nll_and_gradient(logits.clone(), index, scored)
    assert found[0].dtype == torch.float32 and found[1].dtype == expected[1].dtype == dtype
    assert found[1].float().abs().sum() > 10 and not found[1][::3].any()
    torch.testing.assert_close(found[0], expected[0])
    # Near the target softmax - 1 is rounded once in either form, at another place: an ulp of the compute dtype.
    torch.testing.assert_close(found[1], expected[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_the_form_that_is_compiled_has_one_graph_for_full_and_partial_chunks():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(fused_nll_and_gradient, backend=counter, fullgraph=True)
    for rows in (8, 8, 3, 5, 8):
        compiled(torch.randn(rows, NUM_IDS), torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1))
    assert counter.frame_count == 2  # full chunks, and all others together


def test_products_are_added_in_float32_where_the_hardware_can(monkeypatch):
    assert not products.sums_in_float32("cpu", torch.bfloat16)
    hidden, weight, targets = problem(5 * CHUNK)
    rounded = with_gradients(lambda h, w: linear_cross_entropy(h, Head(w), targets, torch.bfloat16), hidden, weight)[2]
    asked = []

    def added(total, left, right, *, out_dtype, alpha, out):
        asked.append(out_dtype)
        return out.copy_(total + alpha * left.float() @ right.float())

    monkeypatch.setattr(products, "sums_in_float32", lambda *hardware: True)
    monkeypatch.setattr(torch, "addmm", added)
    found = with_gradients(lambda h, w: linear_cross_entropy(h, Head(w), targets, torch.bfloat16), hidden, weight)[2]
    assert asked == [torch.float32] * 5
    torch.testing.assert_close(found, rounded, rtol=0.02, atol=0.02)
    assert not torch.equal(found, rounded)


def test_products_that_are_rounded_are_added_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((23, 5), (5, 7)))
    sizes, add = [], torch.Tensor.add_
    monkeypatch.setattr(products, "PIECE", 4 * 7)
    monkeypatch.setattr(torch.Tensor, "add_", lambda t, *a, **k: (sizes.append(t.numel()), add(t, *a, **k))[1])
    total = torch.ones(23, 7)
    products.add_product(total, left, right, factor=0.5)
    assert sizes == [28] * 5 + [21]
    torch.testing.assert_close(total, 1 + 0.5 * (left @ right).float(), rtol=0, atol=0.02)


@sizes
@pytest.mark.parametrize(
    "shape", [HeadShape(), HeadShape(scale=0.25), HeadShape(cap=3.0), HeadShape(scale=1.5, cap=2.0)], ids=str
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_biased_scaled_and_capped_heads_equal_torch(num_tokens, shape, has_bias):
    hidden, weight, targets = problem(num_tokens)
    bias = torch.linspace(-1, 1, NUM_IDS) if has_bias else None

    def plain(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        logits = shape.scale * (h @ w.T + (0.0 if b is None else b))
        return logits if shape.cap is None else shape.cap * torch.tanh(logits / shape.cap)

    def with_bias(fused: bool) -> list[torch.Tensor | None]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        b = None if bias is None else bias.clone().requires_grad_()
        if fused:
            nll = linear_cross_entropy(h, Head(w, b, shape), targets, torch.float32)
        else:
            nll = F.cross_entropy(plain(h, w, b), targets, ignore_index=IGNORE_INDEX, reduction="sum")
        (nll * 0.5).backward()
        return [nll.detach(), h.grad, w.grad, None if b is None else b.grad]

    for ours, theirs in zip(with_bias(True), with_bias(False), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    kept = targets.clamp(min=0)
    scores = token_scores(hidden, Head(weight, bias, shape), kept, torch.float32).nll
    torch.testing.assert_close(scores, F.cross_entropy(plain(hidden, weight, bias), kept, reduction="none"))
