"""A longer context in the configuration, and weights read tensor by tensor in the type in which they are kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from cartilha.config import EvaluateConfig, TrainConfig
from cartilha.errors import UserError
from cartilha.evaluation.scorer import load_scorer
from cartilha.model.configuration import context_length, model_config
from cartilha.model.load import load_model
from cartilha.model.longer_context import LongerContext
from cartilha.model.shards import read_model, weight_files
from cartilha.pipeline.preflight import preflight

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    load_model("random:tiny", CPU).model.save_pretrained(folder, max_shard_size="100KB")
    GenerationConfig(temperature=0.5, do_sample=True).save_pretrained(folder)
    return folder


# Context


@pytest.mark.parametrize("method", ["yarn", "theta"])
def test_a_longer_context_is_saved_as_transformers_understands_it(method, tmp_path):
    loaded = load_model("random:tiny", CPU, context=LongerContext(4096, method))
    assert loaded.context_length == 4096
    loaded.model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    kind = {"yarn": ("yarn", 10_000.0), "theta": ("default", 10_000.0 * 4 ** (16 / 14))}[method]
    assert (config.rope_parameters["rope_type"], config.rope_parameters["rope_theta"]) == pytest.approx(kind)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, theirs = loaded.model.model.rotary_emb, again.model.rotary_emb
    assert torch.equal(ours.inv_freq, theirs.inv_freq) and ours.attention_scaling == theirs.attention_scaling
    before = load_model("random:tiny", CPU).model.model.rotary_emb.inv_freq
    assert ours.inv_freq[0] == before[0]  # the fastest rotation stays
    assert float(ours.inv_freq[-1]) == pytest.approx(float(before[-1]) / 4, rel=1e-4)  # the slowest takes the factor


@pytest.mark.parametrize(
    ("ref", "length", "reason"),
    [
        ("random:tiny-opt", 4096, "type opt have no rotary positions"),
        ("random:tiny", 1024, "is within the context of random:tiny"),
    ],
)
def test_what_cannot_be_extended_is_refused(ref, length, reason):
    with pytest.raises(UserError, match=reason):
        LongerContext(length).applied(model_config(ref), ref)


def test_other_positions_are_refused_by_their_kind():
    for model_type, reason in (("bloom", "names no longest text"), ("gemma3_text", "of several kinds")):
        with pytest.raises(UserError, match=reason):
            LongerContext(10**6).applied(AutoConfig.for_model(model_type), "M")
    extended = LongerContext(4096).applied(model_config("random:tiny"), "M")
    assert context_length(extended) == 4096
    with pytest.raises(UserError, match="extended already"):
        LongerContext(8192).applied(extended, "M")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"context": 256}, "block_size 512 is beyond --context 256"),
        ({"context": 2048, "lora": 4}, "leave out --context, or --lora"),
        ({"memory": "lean", "lora": 4}, "use --lora_base bfloat16 instead"),
        ({"memory": "lean", "shard": "full"}, "use --memory full, or --shard none"),
        ({"memory": "lean", "dtype": "float32"}, "computes in half precision"),
        ({"memory": "lean", "optimizer": "muon"}, "choose one of adamw, rmsprop, adafactor"),
    ],
)
def test_options_that_contradict_each_other_are_refused_at_once(settings, reason, tmp_path, monkeypatch):
    monkeypatch.setattr("cartilha.pipeline.preflight._check_places", lambda config: None)
    config = TrainConfig(model="random:tiny", store="store", output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=reason):
        preflight(dataclasses.replace(config, **settings))


# Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_read_tensor_by_tensor_are_those_that_transformers_reads(saved, dtype):
    assert len(weight_files(saved)) > 1
    config = AutoConfig.from_pretrained(saved)
    found = read_model(saved, config, dtype)
    assert found is not None
    model, report = found
    expected = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype).state_dict()
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert model.generation_config.temperature == 0.5
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_shard_that_changes_later_changes_no_weight(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = load_model(str(tmp_path), CPU).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for file in weight_files(tmp_path):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_evaluation_keeps_weights_in_the_type_that_is_asked_for():
    config = EvaluateConfig(model=("random:tiny",), load_dtype="bfloat16", dtype="float32")
    scorer = load_scorer("random:tiny", None, config, CPU)
    assert scorer.loaded.model.dtype == torch.bfloat16
    assert scorer.protocol.dtype == "bfloat16"  # float32 arithmetic could not make these weights more exact
