"""The proof that a model runs packed finds the faults that it is there for, also those beyond its few tokens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from cartilha.errors import UserError
from cartilha.model import packed_or_rows
from cartilha.model.attention import KERNELS, document_attention
from cartilha.model.load import look_at, prepare_model
from cartilha.model.packed_or_rows import how_it_runs, prove, transformers_attention

TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 2048,
        "pad_token_id": 0}  # fmt: skip
FAR = 1000  # a window beyond the proof's tokens
GEMMA = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": FAR}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 16}  # fmt: skip


def made(model_type: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, **settings})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def told(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A Gemma 3 whose layers tell the attention function something else."""
    model = made("gemma3_text", **GEMMA)
    monkeypatch.setattr(
        packed_or_rows._Record, "attend", functools.partialmethod(_attend, packed_or_rows._Record.attend, change)
    )
    return model


def _attend(self, real, change, module, *tensors, **layer):
    return real(self, module, *tensors, **{**layer, **change})


def test_a_window_beyond_the_proofs_tokens_that_reaches_the_kernel():
    assert prove(made("gemma3_text", **GEMMA)).packed


@pytest.mark.parametrize("window", [None, FAR - 1, FAR + 1])
def test_a_window_beyond_the_proofs_tokens_that_does_not_reach_the_kernel(window, monkeypatch):
    model = made("gemma3_text", **GEMMA)
    assert isinstance(model.model.layers[0].self_attn, Gemma3Attention)
    model.model.layers[0].self_attn.sliding_window = window
    found = prove(model)
    assert not found.packed and f"a window of {FAR} tokens would reach the kernel as {window}" in str(found.reason)


def test_layers_of_transformers_itself_that_keep_their_window():
    """Qwen 2 with experts, in transformers 5.23: its mask has the window, and its layers do not pass it on."""
    settings = {**EXPERTS, "use_sliding_window": True, "sliding_window": FAR, "max_window_layers": 1}
    model = prepare_model(made("qwen2_moe", **settings), "my-qwen", torch.device("cpu")).model
    assert not how_it_runs(model).packed
    assert prove(made("qwen2_moe", **EXPERTS)).packed, "without a window"


@pytest.mark.parametrize("change", [{"position_bias": torch.ones(1)}, {"is_causal": False}], ids=["bias", "future"])
def test_what_the_kernel_cannot_do(change, monkeypatch):
    found = prove(told(change, monkeypatch))
    assert not found.packed and "their layers ask for more than a window" in str(found.reason)


def test_a_type_that_the_tests_do_not_prove_is_not_tried():
    """DeepSeek 4 puts 128 tokens together and lets later ones see them: a proof of 64 tokens cannot tell."""
    settings = {**EXPERTS, "n_routed_experts": 2, "o_lora_rank": 8, "o_groups": 2, "q_lora_rank": 8, "head_dim": 16,
                "index_n_heads": 2, "index_head_dim": 8, "qk_rope_head_dim": 8}  # fmt: skip
    model = made("deepseek_v4", **settings)
    assert prove(model).packed
    assert not how_it_runs(prepare_model(model, "my-deepseek", torch.device("cpu")).model).packed


def test_documents_that_see_each_other(monkeypatch):
    model = made("gemma3_text", **GEMMA)
    monkeypatch.setattr(
        KERNELS["mask"], "of", classmethod(lambda cls, lengths, length, device, capacity=0: cls.traced(1, length))
    )
    found = prove(model)
    assert not found.packed and "would see each other" in str(found.reason)


def test_a_proof_leaves_the_model_as_it_was():
    model = made("gemma3_text", **GEMMA).train()
    state, own = torch.random.get_rng_state(), model.config._attn_implementation
    assert prove(model).packed
    assert model.training and model.config._attn_implementation == own
    assert torch.equal(torch.random.get_rng_state(), state)


def test_generation_uses_the_attention_that_transformers_chose():
    model = prepare_model(made("gemma3_text", **GEMMA), "my-gemma", torch.device("cpu")).model
    with transformers_attention(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "cartilha_documents"


@pytest.mark.parametrize(
    ("model_type", "settings", "line"),
    [
        ("llama", {}, "documents packed side by side; a plain head; --gradient_checkpointing is possible"),
        ("gemma2", {}, "documents packed side by side; a soft cap on the scores; a head with a soft cap of 30"),
        ("phi", {}, "documents packed side by side; a head with a bias"),
        ("mamba", {"state_size": 4}, "one document per row, since they carry a state from token to token; a plain"),
    ],
)
def test_a_configuration_says_how_its_models_run(model_type, settings, line):
    config = AutoConfig.for_model(model_type, **{**TINY, **settings})
    assert look_at(config, "my-model").line.startswith(line)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("xlnet", {"n_layer": 1, "d_model": 32, "n_head": 4, "d_inner": 48}, "a position sees what comes after it"),
        ("reformer", {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "hidden_size": 64}, "draws random numbers"),
    ],
)
def test_models_that_give_no_figure_are_refused_with_the_reason(model_type, settings, reason):
    config = AutoConfig.for_model(model_type, vocab_size=61, **settings)
    with pytest.raises(UserError, match=reason):
        prepare_model(AutoModelForCausalLM.from_config(config).eval(), "my-model", torch.device("cpu"))


@pytest.mark.parametrize("kernel", ["segments", "mask"])
@pytest.mark.parametrize("widths", [(8, 8), (12, 8), (8, 12)], ids=str)
def test_values_may_have_another_size_than_keys(kernel, widths):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, n, generator=generator) for n in (widths[0], *widths))
    segments = KERNELS[kernel].of((4, 5), 9, torch.device("cpu"))
    found, _ = document_attention(torch.nn.Identity(), query, key, value, None, segments=segments)
    alone = [
        torch.nn.functional.scaled_dot_product_attention(*(t[:, :, piece] for t in (query, key, value)), is_causal=True)
        for piece in (slice(4), slice(4, 9))
    ]
    torch.testing.assert_close(found, torch.cat(alone, dim=2).transpose(1, 2))
