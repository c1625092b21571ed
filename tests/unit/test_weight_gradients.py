"""Gradients that products add to those already there: the same as autograd's, and no second tensor for them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from cartilha.blocks.packing import Batch, PackedStream, stack
from cartilha.model import loss as loss_module
from cartilha.model import weight_gradients
from cartilha.model.forward import batch_nll
from cartilha.model.head import Head
from cartilha.model.loss import linear_cross_entropy
from cartilha.model.recomputation import checkpoint_layers
from cartilha.model.segment_attention import Scoring, segment_attention
from cartilha.model.weight_gradients import weight_gradients_in_place
from cartilha.tokens.packed import PackedDocuments
from cartilha.training.optimizer import choose_trained, clear_gradients, make_optimizer
from small_models import ARCHITECTURES, NUM_IDS, tiny

BLOCK = 24


def batches() -> list[Batch]:
    """Two of two rows; the last one ends in padding."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(1, NUM_IDS, length) for length in (11, 5, 30, 9, 20)]  # the padding id is a token, too
    stream = PackedStream(PackedDocuments.from_ids(ids, prefix_id=2, end_id=3), BLOCK)
    return [stack([stream.block(row) for row in rows]) for rows in ((0, 1), (2, 3))]


def accumulated(model: PreTrainedModel, *, in_place: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Gradients of two micro-batches, by name; None where there is none."""
    factor = 0.25
    model.zero_grad(set_to_none=True)
    for batch in batches():
        with weight_gradients_in_place("cpu" if in_place else "cuda", factor):
            nll = batch_nll(model, batch, dtype)
        (nll * factor).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    largest = max(float(gradient.norm()) for gradient in expected.values() if gradient is not None)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:  # a key's bias has nothing but rounding: measured by the largest
            assert (found[name] - gradient).norm() <= tolerance * max(float(gradient.norm()), 1e-3 * largest), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed twice"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_gradients_as_autograd_gives(name, checkpointing, monkeypatch):
    model = tiny(name)
    if checkpointing:
        checkpoint_layers(model)
    expected = accumulated(model, in_place=False)
    products: list[int] = []
    plain = weight_gradients.add_product
    monkeypatch.setattr(weight_gradients, "add_product", lambda *factors: (products.append(1), plain(*factors))[1])
    assert_same(accumulated(model, in_place=True), expected, 1e-5)
    assert len(products) >= 2 * 2 * 4  # micro-batches, layers, products


def computed_in(product_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU whose products are fastest in this dtype."""
    for module in (weight_gradients, loss_module):
        monkeypatch.setattr(module, "cpu_product_dtype", lambda dtype: product_dtype)


@pytest.mark.parametrize("product_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bf16_is_as_near_as_autograd_is(name, product_dtype, monkeypatch):
    computed_in(product_dtype, monkeypatch)
    model = tiny(name)
    exact = accumulated(model, in_place=False)
    assert_same(accumulated(model, in_place=True, dtype=torch.bfloat16), exact, 0.03)


def test_products_in_float32_are_nearer_and_keep_no_more(monkeypatch):
    model, distances, kept = tiny("llama"), {}, {}
    exact = accumulated(model, in_place=False)
    for product_dtype in (torch.bfloat16, torch.float32):
        computed_in(product_dtype, monkeypatch)
        found = accumulated(model, in_place=True, dtype=torch.bfloat16)
        distances[product_dtype] = sum(float((found[name] - exact[name]).norm()) for name in exact)
        sizes: list[int] = []
        note = functools.partial(_note_bytes, sizes)
        with weight_gradients_in_place("cpu", 1.0), torch.autograd.graph.saved_tensors_hooks(note, lambda held: held):
            batch_nll(model, batches()[0], torch.bfloat16).backward()
        kept[product_dtype] = sum(sizes)
    assert distances[torch.float32] < 0.9 * distances[torch.bfloat16]
    assert kept[torch.float32] == kept[torch.bfloat16]


def _note_bytes(sizes: list[int], tensor: torch.Tensor) -> torch.Tensor:
    sizes.append(tensor.nbytes)
    return tensor


def test_products_of_bf16_activations_are_computed_in_what_was_chosen(monkeypatch):
    for product_dtype in (torch.bfloat16, torch.float32):
        computed_in(product_dtype, monkeypatch)
        with _Products() as products:
            accumulated(tiny("opt"), in_place=True, dtype=torch.bfloat16)
        assert products.dtypes == {product_dtype}


class _Products(TorchDispatchMode):
    """Notes what matrix products are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.dtypes.add(args[1].dtype)
        return func(*args, **(kwargs or {}))


def test_what_is_not_trained_gets_no_gradient():
    model = tiny("opt")
    for parameter in model.model.decoder.layers.parameters():
        parameter.requires_grad_(False)
    expected = accumulated(model, in_place=False)
    assert sum(gradient is None for gradient in expected.values()) > 10
    assert_same(accumulated(model, in_place=True), expected, 1e-5)


def test_the_row_of_the_padding_gets_no_gradient_from_the_input():
    ids, weight = torch.tensor([[4, 1, 4, 2]]), torch.randn(6, 3, requires_grad=True)
    with weight_gradients_in_place("cpu", 1.0):
        F.embedding(ids, weight, 1).backward(torch.ones(1, 4, 3))
    assert weight.grad is not None and weight.grad[:, 0].tolist() == [0, 0, 1, 0, 2, 0]


def test_another_factor_than_was_said_is_an_error():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    with weight_gradients_in_place("cpu", 0.5):
        nll = linear_cross_entropy(hidden, Head(weight), torch.arange(5), torch.float32)
    with pytest.raises(AssertionError):
        nll.backward()


def test_no_second_tensor_of_a_weight_is_made():
    """Beside a weight's gradient autograd has the new one, as large, before it is added."""
    sizes: list[int] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x._base is None)
            return result

    def largest(in_place: bool) -> int:
        weight, bias = torch.randn(300, 200, requires_grad=True), torch.randn(300, requires_grad=True)
        weight.grad = torch.zeros_like(weight)
        known = weight.grad
        sizes.clear()
        with weight_gradients_in_place("cpu" if in_place else "cuda", 1.0):
            result = F.linear(torch.randn(2, 4, 200, requires_grad=True), weight, bias)
        with Made():
            result.backward(torch.ones_like(result))
        assert weight.grad is known
        return sizes.count(300 * 200)

    assert largest(in_place=False) > largest(in_place=True)


def test_gradients_stay_where_they_are_and_go_where_nothing_is_trained():
    model = tiny("opt")
    optimizer = make_optimizer(model, 1e-3, 0.0)
    trained = choose_trained(model, optimizer, embeddings_only=False)
    places = [parameter.grad.data_ptr() for parameter in trained if parameter.grad is not None]
    assert len(places) == len(trained)
    trained[0].grad.fill_(1.0)
    clear_gradients(trained)
    assert [parameter.grad.data_ptr() for parameter in trained] == places
    assert not any(parameter.grad.any() for parameter in trained)
    chosen = choose_trained(model, optimizer, embeddings_only=True)
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in chosen}


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_key_value_heads", [4, 2])
@pytest.mark.parametrize("lengths", [(24, 24), (1, 5, 18, 23, 1)])
def test_attention_within_segments_is_that_under_a_mask(lengths, num_key_value_heads, window):
    torch.manual_seed(0)
    query = torch.randn(2, BLOCK, 4, 8).transpose(1, 2).requires_grad_()  # as models hand it over
    key, value = (torch.randn(2, num_key_value_heads, BLOCK, 8, requires_grad=True) for _ in range(2))
    upstream = torch.randn(2, BLOCK, 4, 8)
    found = segment_attention(query, key, value, lengths, Scoring(0.3, window))
    gradients = torch.autograd.grad(found, (query, key, value), upstream)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(2, 1, BLOCK)
    distance = torch.arange(BLOCK)[:, None] - torch.arange(BLOCK)
    mask = (segment == segment.transpose(1, 2)) & (distance >= 0) & (distance < (window or BLOCK))
    repeated = (heads.repeat_interleave(4 // num_key_value_heads, dim=1) for heads in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask[:, None], scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected, (query, key, value), upstream), strict=True):
        torch.testing.assert_close(one, other)


def test_attention_keeps_its_output_once():
    query, key, value = (torch.randn(2, 4, BLOCK, 8, requires_grad=True) for _ in range(3))
    weight, kept = torch.randn(5, 32, requires_grad=True), set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())), tensor)[1],
        lambda tensor: tensor,
    ):
        output = segment_attention(query, key, value, (10, 14, 24), Scoring())
        F.linear(output.reshape(2, BLOCK, 32), weight)
    assert sum(nbytes >= 4 * query.numel() for _, nbytes in kept) == 4  # queries, keys, values, output
