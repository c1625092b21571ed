"""Models that are proven when they are loaded, packed or one document a row, against transformers on each alone.

And those that cannot run, refused by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_loss_peer import (
    COMMON,
    GLU,
    LONG_ROPE,
    NUM_IDS,
    assert_same_gradients,
    gradients,
    nll_alone,
    pack,
    segments_of,
    take_the_document_mask_away,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cartilha.blocks.packing import Batch
from cartilha.errors import UserError
from cartilha.model import forward, rows
from cartilha.model.compiling import training_body
from cartilha.model.forward import batch_nll, scored_tokens
from cartilha.model.head import HeadShape, find_head_shape
from cartilha.model.load import prepare_model
from cartilha.model.packed_or_rows import is_known, runs_packed
from cartilha.model.rows import row_groups

LENGTHS = [7, 1, 9, 20, 2, 12, 5]  # in blocks of 24 some are cut, and the last block is padded
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),  # a bias for the distance
    "gpt_bigcode": ("gpt_bigcode", {}),
    "falcon": ("falcon", {}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "stablelm": ("stablelm", GLU),
    "stablelm-longrope": (  # rotates a quarter of each head
        "stablelm",
        {**GLU, "rope_parameters": {**LONG_ROPE, "short_factor": [1.0], "long_factor": [3.0]}},
    ),
    "gpt_neo-local": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 5}),
    "gemma2-soft-capped-attention": (
        "gemma2",
        {**GLU, "head_dim": 16, "attn_logit_softcapping": 1.0, "final_logit_softcapping": None, "sliding_window": 5},
    ),
    # Heads that are more than a matrix.
    "gemma2-soft-capped-head": ("gemma2", {**GLU, "head_dim": 16, "final_logit_softcapping": 3.0}),
    "granite-scaled": (
        "granite",
        {**GLU, "logits_scaling": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.22},
    ),
    "cohere-scaled": ("cohere", {**GLU, "logit_scale": 1.7}),
    "minicpm3-scaled-states": (
        "minicpm3",
        {
            "intermediate_size": 48,
            "num_key_value_heads": 4,
            "dim_model_base": 10,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "phi-biased-head": ("phi", {"intermediate_size": 48}),
    "gptj-biased-head": ("gptj", {"rotary_dim": 8}),
    # What carries a state, and Llama 4, whose layers are found below another name.
    "mamba": ("mamba", {"state_size": 4}),
    "qwen3_next": ("qwen3_next", {**GLU, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
                   "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16}),
    "gemma3_text-windowed": ("gemma3_text", {**GLU, "head_dim": 16, "sliding_window": 5}),
    "gpt_oss-sinks": (
        "gpt_oss",
        {**GLU, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5},
    ),
}  # fmt: skip
IN_ROWS = ("bloom", "falcon", "falcon-alibi", "stablelm", "stablelm-longrope", "gpt_neo-local", "gptj-biased-head",
           "mamba", "qwen3_next")  # fmt: skip
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def made(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    """With weights so far from their initial values that every part of the model matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def loaded(name: str, caplog: pytest.LogCaptureFixture) -> PreTrainedModel:
    model = made(*ARCHITECTURES[name])
    caplog.clear()
    model = prepare_model(model, name, torch.device("cpu")).model
    lines = [record.message for record in caplog.records if record.name == "cartilha"]
    assert runs_packed(model) == (name not in IN_ROWS)
    said = [f"type {model.config.model_type} run with one document per row" in line for line in lines]
    assert said == [True] * (name in IN_ROWS)
    return model


@every_architecture
def test_packed_documents_score_as_each_does_alone(name, caplog, monkeypatch):
    peer, model = made(*ARCHITECTURES[name]), loaded(name, caplog)
    batch = pack(LENGTHS, block_size=24)
    expected = nll_alone(peer, batch)
    assert expected.std() > 0.3, "weights that predict nothing would prove nothing"
    torch.testing.assert_close(scored_tokens(model, batch, torch.float32).nll, expected, rtol=1e-5, atol=2e-5)

    def blocks_as_rows(model: PreTrainedModel, batch: Batch, **asked: bool) -> tuple[torch.Tensor, tuple[()]]:
        return model.base_model(input_ids=torch.from_numpy(batch.input_ids)).last_hidden_state, ()

    monkeypatch.setattr(forward, "states_in_rows", blocks_as_rows)
    if runs_packed(model):
        take_the_document_mask_away(monkeypatch)
    leaking = scored_tokens(model, batch, torch.float32).nll
    assert (leaking - expected).abs().max() > 0.02, "packed, documents must see each other"


@pytest.mark.parametrize("name", ["bloom", "stablelm"])
def test_loss_equals_that_of_transformers_from_labels(name, caplog):
    model = loaded(name, caplog)
    batch = pack([14, 14, 14], block_size=16)  # one document a block: transformers takes these rows as they are
    inputs = torch.from_numpy(batch.input_ids)
    expected = model(input_ids=inputs, labels=inputs, use_cache=False).loss
    loss = batch_nll(model, batch, torch.float32) / batch.num_targets
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@every_architecture
def test_gradients_of_packed_documents_are_those_of_the_documents_alone(name, caplog):
    peer, model = made(*ARCHITECTURES[name]), loaded(name, caplog)
    batch = pack(LENGTHS, block_size=24)
    found = gradients(model, batch_nll(model, batch, torch.float32))
    pieces = [(peer(input_ids=inputs, use_cache=False).logits[0], goal[0]) for inputs, goal in segments_of(batch)]
    losses = [F.cross_entropy(logits, goal, reduction="sum", ignore_index=-100) for logits, goal in pieces]
    assert_same_gradients(found, gradients(peer, torch.stack(losses).sum()))


def test_half_precision_is_near(caplog):
    model = loaded("bloom", caplog)
    batch = pack(LENGTHS, block_size=24)
    exact, half = (scored_tokens(model, batch, dtype).nll for dtype in (torch.float32, torch.bfloat16))
    assert 0 < (half - exact).abs().mean() < 0.05


def test_it_is_not_compiled(caplog):
    assert training_body(loaded("bloom", caplog), "always", 10_000) is None


# The rows themselves


@given(st.lists(st.integers(1, 70), min_size=1, max_size=60))
def test_every_position_is_in_one_row_and_less_than_half_is_filling(lengths):
    groups = list(row_groups(np.array(lengths)))
    assert sorted(place for source, real in groups for place in source[real]) == list(range(sum(lengths)))
    edges = np.cumsum([0, *lengths])
    for source, is_real in groups:
        assert (source < edges[-1]).all() and 2 * is_real.sum() > is_real.size
        for row, real in zip(source, is_real, strict=True):
            first, length = row[0], real.sum()
            assert real[:length].all() and first in edges[:-1]
            assert row[:length].tolist() == list(range(first, first + length)) and first + length in edges
    assert len(groups) <= int(max(lengths)).bit_length()


def test_a_row_of_two_documents_would_be_noticed(caplog, monkeypatch):
    """The planted fault: pieces joined two by two in one row."""
    model = loaded("bloom", caplog)
    batch = pack([5, 6, 7, 8], block_size=33)
    expected = nll_alone(model, batch)
    joined = list(row_groups(batch.segment_lengths.reshape(-1, 2).sum(1)))
    assert joined
    monkeypatch.setattr(rows, "row_groups", lambda lengths, *rest: joined)
    assert (scored_tokens(model, batch, torch.float32).nll - expected).abs().max() > 0.02


# What cannot run so

REFUSED = {
    "xmod": ("xmod", {"intermediate_size": 48, "is_decoder": True}, "a few tokens of text end in an error"),
    "bart": ("bart", {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 32}, "have an encoder"),
    "gemma3": (
        "gemma3",
        {
            "text_config": {**COMMON, **GLU, "head_dim": 16},
            "vision_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                              "num_attention_heads": 1, "image_size": 16, "patch_size": 8},
        },
        "read more than text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_by_name_with_the_reason(name):
    model_type, settings, reason = REFUSED[name]
    common = {"vocab_size": NUM_IDS} if "text_config" in settings else {}
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**common, **settings}))
        if common
        else made(model_type, settings)
    )
    with pytest.raises(UserError, match=rf"type {model_type} are not supported, since .*{reason}.*\.$"):
        prepare_model(model, name, torch.device("cpu"))


def test_a_model_that_sees_what_comes_is_refused():
    """An encoder under a causal head: BERT without `is_decoder`, its head's bias taken away."""
    model = made("bert", {"intermediate_size": 48})
    head = torch.nn.Linear(32, NUM_IDS, bias=False)
    model.set_output_embeddings(head)
    model.cls.predictions.transform = torch.nn.Identity()
    with pytest.raises(UserError, match="a position sees what comes after it"):
        prepare_model(model, "bert", torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + 1,
        lambda logits: logits.roll(1, -1),
        lambda logits: logits * 0,
        lambda logits: logits / 0,
        torch.nn.functional.softplus,
    ],
)
def test_logits_that_no_scale_or_cap_explains_are_refused(change):
    model = made("stablelm", GLU)
    model.register_forward_hook(lambda module, arguments, output: setattr(output, "logits", change(output.logits)))
    with pytest.raises(UserError, match="change the logits after the head by more than a scale or a soft cap"):
        prepare_model(model, "stablelm", torch.device("cpu"))


@pytest.mark.parametrize(
    "shape",
    [HeadShape(1 / 9, 1 / 7, 30.0), HeadShape(scale=0.0625), HeadShape(12.0, 1.0, 15.0), HeadShape(1.0, 0.3, 50.0)],
    ids=str,
)
def test_the_shape_of_a_head_is_found_to_the_bit(shape):
    model = made("stablelm", GLU)
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, arguments: (arguments[0] * shape.input_scale,))
    model.register_forward_hook(lambda module, _, output: setattr(output, "logits", shape.finish(output.logits)))
    assert find_head_shape(model) == shape


def test_the_types_tested_here_are_not_among_the_known():
    types = {model_type for model_type, _ in ARCHITECTURES.values()} | {entry[0] for entry in REFUSED.values()}
    for model_type in types:
        assert not is_known(AutoConfig.for_model(model_type))
