"""Our packed, fused loss against transformers' own, for every architecture that is called supported.

The peer is the same weights under `eager` attention, one document at a time: no packing, no fused head.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cartilha.blocks.packing import IGNORE_INDEX, Batch, PackedStream, stack
from cartilha.model import forward
from cartilha.model.attention import KERNELS, Kernel, choose_kernel
from cartilha.model.forward import batch_nll, scored_tokens
from cartilha.model.packed_or_rows import KNOWN_TYPES, use_document_attention
from cartilha.tokens.packed import PackedDocuments

NUM_IDS, PREFIX, END = 61, 2, 3
CONTEXT, WINDOW = 64, 5
COMMON = {
    "vocab_size": NUM_IDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 1,
    "bos_token_id": PREFIX,
    "eos_token_id": END,
}
GLU = {"intermediate_size": 48, "num_key_value_heads": 2}
# Of the lengths that the tests pack, some are beyond the original context.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 10,
    "factor": CONTEXT / 10,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [3.0, 6.0, 20.0, 40.0],
}

# Every type, and variants of it that change what attention has to do. A test below holds the list complete.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-350m": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("llama", GLU),
    "llama-tied": ("llama", {**GLU, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "gpt2-scaled-by-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 48}),
    "mistral": ("mistral", {**GLU, "sliding_window": None}),
    "mistral-windowed": ("mistral", {**GLU, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", GLU),
    "qwen2-windowed": (
        "qwen2",
        {**GLU, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**GLU, "head_dim": 16}),
    "qwen3-windowed": (
        "qwen3",
        {**GLU, "head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    ),
    "gemma": ("gemma", {**GLU, "num_key_value_heads": 1, "head_dim": 16}),
    "smollm3": ("smollm3", {**GLU, "no_rope_layers": [1, 0]}),
    "smollm3-windowed": (
        "smollm3",
        {**GLU, "use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layers": [1, 0]},
    ),
    "olmo2": ("olmo2", GLU),
    "phi3": ("phi3", GLU),
    "phi3-longrope": ("phi3", {**GLU, "original_max_position_embeddings": 10, "rope_parameters": LONG_ROPE}),
    "llama-longrope": ("llama", {**GLU, "rope_parameters": LONG_ROPE}),
    "phi3-windowed": ("phi3", {**GLU, "sliding_window": WINDOW}),
}
WINDOWED = [name for name in ARCHITECTURES if name.endswith("-windowed")]

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@functools.cache
def peer_model(name: str) -> PreTrainedModel:
    """transformers' own code, with weights so far from their initial values that every part of it matters."""
    model_type, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def ours(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    use_document_attention(model)
    return model


def pack(lengths: list[int], block_size: int) -> Batch:
    """Documents of random ids (the special ones among them, as nothing but context may hold them apart), packed."""
    generator = np.random.default_rng(len(lengths))
    ids = [generator.integers(0, NUM_IDS, length) for length in lengths]
    stream = PackedStream(PackedDocuments.from_ids(ids, PREFIX, END), block_size)
    return stack([stream.block(i) for i in range(len(stream))])


def segments_of(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of each piece of a document, shape (1, segment length)."""
    bounds = np.cumsum(batch.segment_lengths)[:-1]
    inputs = np.split(batch.input_ids.reshape(-1), bounds)
    targets = np.split(batch.targets.reshape(-1), bounds)
    for piece, goal in zip(inputs, targets, strict=True):
        yield torch.from_numpy(piece)[None], torch.from_numpy(goal)[None]


@torch.no_grad()
def nll_alone(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Nll of each target, each piece of a document in a forward pass of its own."""
    found = []
    for inputs, targets in segments_of(batch):
        log_probs = model(input_ids=inputs, use_cache=False).logits.double().log_softmax(-1)
        scored = targets[0] != IGNORE_INDEX
        found.append(-log_probs[0, scored].gather(1, targets[0, scored][:, None])[:, 0])
    return torch.cat(found).float()


def use_kernel(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setattr(forward, "choose_kernel", lambda *hardware: kernel)


def take_the_document_mask_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_segment_a_row(model: PreTrainedModel, batch: Batch, dtype: torch.dtype, body: Any) -> Kernel:
        num_rows, row_length = batch.input_ids.shape
        return KERNELS["segments"].of((row_length,) * num_rows, row_length, model.device)

    monkeypatch.setattr(forward, "_segments", one_segment_a_row)


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # A key's bias has no gradient but rounding: the softmax does not see it. All others are compared to their own.
        size = torch.maximum(gradient.norm(), 1e-3 * whole)
        assert (found[name] - gradient).norm() <= 1e-5 * size, name


def test_every_supported_type_is_tested():
    assert {model_type for model_type, _ in ARCHITECTURES.values()} == set(KNOWN_TYPES)


@every_architecture
def test_loss_and_gradients_equal_those_of_transformers(name):
    peer = peer_model(name)
    model = ours(peer)
    # Equal lengths, one document a row: the rows are just what transformers takes as inputs and labels.
    batch = pack([14, 14, 14], block_size=16)
    rows = torch.from_numpy(batch.input_ids)
    assert batch.num_targets == rows[:, 1:].numel()
    expected = peer(input_ids=rows, labels=rows, use_cache=False).loss
    loss = batch_nll(model, batch, torch.float32) / batch.num_targets
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(expected.item() - np.log(NUM_IDS)) > 0.1, "weights that predict nothing would prove nothing"
    expected_gradients = gradients(peer, expected)
    dead = [key for key, gradient in expected_gradients.items() if not gradient.any()]
    assert not dead, "weights that are not used would prove nothing"
    assert_same_gradients(gradients(model, loss), expected_gradients)


@every_architecture
def test_packed_documents_score_as_each_does_alone(name, monkeypatch):
    peer = peer_model(name)
    model = ours(peer)
    batch = pack([7, 1, 9, 20, 2, 12, 5], block_size=24)  # blocks cut documents, and the last is padded
    assert len(batch.segment_lengths) > batch.input_ids.shape[0] + 3
    expected = nll_alone(peer, batch)
    torch.testing.assert_close(scored_tokens(model, batch, torch.float32).nll, expected, rtol=1e-5, atol=2e-5)
    take_the_document_mask_away(monkeypatch)
    leaking = scored_tokens(model, batch, torch.float32).nll
    assert (leaking - expected).abs().max() > 0.05, "without the mask, documents must see each other"


@every_architecture
def test_the_mask_kernel_agrees_with_the_segments_kernel(name, monkeypatch):
    model = ours(peer_model(name))
    batch = pack([7, 1, 9, 20, 2, 12, 5], block_size=24)
    assert choose_kernel("cpu", None, torch.float32) == "segments"
    nll, loss = scored_tokens(model, batch, torch.float32).nll, batch_nll(model, batch, torch.float32)
    expected = gradients(model, loss)
    use_kernel(monkeypatch, "mask")
    # Counted, so that the first kernel is not compared with itself.
    masks: list[torch.Tensor] = []
    computed = F.scaled_dot_product_attention

    def counted(*inputs: torch.Tensor, attn_mask: torch.Tensor, **rest: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return computed(*inputs, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    torch.testing.assert_close(scored_tokens(model, batch, torch.float32).nll, nll, rtol=1e-5, atol=2e-5)
    assert len(masks) == model.config.num_hidden_layers
    seen = min(int((mask if mask.dtype == torch.bool else mask == 0).sum(dim=-1).max()) for mask in masks)
    assert seen == (WINDOW if name in WINDOWED else max(batch.segment_lengths))
    assert_same_gradients(gradients(model, batch_nll(model, batch, torch.float32)), expected)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("kernel", ["segments", "mask"])
def test_a_window_smaller_than_the_document_is_honoured(name, kernel, monkeypatch):
    peer = peer_model(name)
    model = ours(peer)
    use_kernel(monkeypatch, kernel)
    batch = pack([30, 1, 9], block_size=44)
    assert max(batch.segment_lengths) > 2 * WINDOW
    found = scored_tokens(model, batch, torch.float32).nll
    torch.testing.assert_close(found, nll_alone(peer, batch), rtol=1e-5, atol=2e-5)
    # The window is there to be honoured: a wider one gives other figures, from the token that it first hides one from.
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = CONTEXT
    model.config.sliding_window = CONTEXT
    wider = scored_tokens(model, batch, torch.float32).nll
    torch.testing.assert_close(wider[:WINDOW], found[:WINDOW], rtol=1e-5, atol=2e-5)
    assert (wider - found)[WINDOW:30].abs().min() > 0 and (wider - found).abs().max() > 0.05


@pytest.mark.parametrize("kernel", ["segments", "mask"])
@pytest.mark.parametrize("name", ["opt", "llama", "gpt_neox", "mistral-windowed"])
def test_bfloat16_is_close_to_float32(name, kernel, monkeypatch):
    model = ours(peer_model(name))
    use_kernel(monkeypatch, kernel)
    batch = pack([7, 1, 9, 20, 2, 12, 5], block_size=24)
    exact = scored_tokens(model, batch, torch.float32).nll
    body = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    computed: list[torch.dtype] = []
    for module in body:
        module.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    half = scored_tokens(model, batch, torch.bfloat16).nll
    assert computed == [torch.bfloat16] * len(body)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().mean() < 0.05


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="variable-length flash attention needs a CUDA device of capability 8.0",
)
@pytest.mark.parametrize("name", ["opt", "llama", "gpt2-scaled-by-layer", "mistral-windowed", "qwen2-windowed"])
def test_the_varlen_kernel_agrees_with_the_mask_kernel(name, monkeypatch):
    model = ours(peer_model(name)).cuda()
    batch = pack([7, 1, 9, 20, 2, 12, 5], block_size=24)
    assert choose_kernel("cuda", (8, 0), torch.bfloat16) == "varlen"
    exact = scored_tokens(model, batch, torch.float32).nll
    varlen = scored_tokens(model, batch, torch.bfloat16).nll
    use_kernel(monkeypatch, "mask")
    masked = scored_tokens(model, batch, torch.bfloat16).nll
    assert (varlen - exact).abs().mean() < 0.05
    assert (varlen - masked).abs().mean() < 0.05


def test_the_kernel_follows_the_hardware():
    assert choose_kernel("cpu", None, torch.bfloat16) == "segments"
    assert choose_kernel("cuda", (8, 0), torch.bfloat16) == "varlen"
    assert choose_kernel("cuda", (9, 0), torch.float16) == "varlen"
    assert choose_kernel("cuda", (9, 0), torch.float32) == "mask"
    assert choose_kernel("cuda", (7, 5), torch.float16) == "mask"
    assert choose_kernel("mps", None, torch.float32) == "mask"
