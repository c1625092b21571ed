"""A model whose attention is not known, from the command line: it is said once, trains, resumes, and is evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BartConfig,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PretrainedConfig,
)

from cartilha.tokens.tokenizer import load_tokenizer

TINY = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 128}  # fmt: skip
SAID = "The attention of models of the type bloom is not known here"


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Bloom of two layers, with the tokenizer of random:tiny."""
    path = tmp_path_factory.mktemp("models") / "bloom"
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=257,
                         pad_token_id=258, seq_length=128)  # fmt: skip
    BloomForCausalLM(config).save_pretrained(path)
    load_tokenizer("random:tiny").save(path)
    return path


def test_it_trains_resumes_and_is_evaluated_and_each_command_says_so_once(cartilha, store, bloom, tmp_path):
    run = tmp_path / "run"
    settings = ["--model", bloom, "--store", store, "--output", run, "--block_size", 64, "--batch_tokens", 256,
                "--lr", 3e-3, "--dtype", "float32", "--max_steps", 12]  # fmt: skip
    outcome = cartilha("train", *settings, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count(SAID) == 1
    results = json.loads(outcome.out)
    assert [notice for notice in results["notices"] if SAID in notice]
    first, *_, last = (evaluation["bits_per_byte"] for evaluation in results["evaluations"])
    assert last < first - 0.5
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert plan["memory_bytes"] > 0 and plan["micro_batch_size"] == 4
    outcome = cartilha("evaluate", "--model", run / "model", "--store", store, "--dtype", "float32", "--json")
    assert outcome.code == 0 and outcome.err.count(SAID) == 1
    assert json.loads(outcome.out)["models"][0]["bits_per_byte"] == pytest.approx(last, abs=1e-6)


def test_check_agrees_and_plan_plans(cartilha, store, bloom):
    outcome = cartilha("check", "--model", bloom, "--store", store, "--quick", "--block_size", 64, "--json")
    found = {row["name"]: row["outcome"] for row in json.loads(outcome.out)["checks"]}
    # Fresh weights that come from a folder are taken for pretrained ones, which they are not.
    assert [name for name, outcome in found.items() if outcome == "failed"] == ["start"]
    assert {found[name] for name in ("truth", "causality", "resume")} == {"passed"}, found
    outcome = cartilha("plan", "--model", bloom, "--device", "cpu", "t4", "--block_size", 128, "--json")
    assert outcome.code == 0, outcome.err
    assert all(row["memory_bytes"] > 0 for row in json.loads(outcome.out)["rows"])


def test_a_model_that_cannot_run_so_is_refused(refused, store, tmp_path):
    """Gemma 2 caps its logits after the head: the loss would be another."""
    model = tmp_path / "gemma2"
    config = Gemma2Config(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=8, intermediate_size=16,
                          max_position_embeddings=128)  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(model)
    load_tokenizer("random:tiny").save(model)
    for command in (["train", "--output", tmp_path / "run", "--block_size", 32, "--batch_tokens", 64], ["evaluate"],
                    ["check"]):  # fmt: skip
        sentence = refused(*command, "--model", model, "--store", store)
        assert "type gemma2 are not supported, since they change the logits after the head" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Gemma2Config(num_key_value_heads=1, head_dim=8, **TINY), "since they change the logits after the head"),
        (CohereConfig(pad_token_id=0, **TINY), "since they change the logits after the head"),
        (BartConfig(d_model=16, max_position_embeddings=128), "since they have an encoder besides the decoder"),
        (PhiConfig(**TINY), "has a head that is not a plain matrix"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_a_plan_refuses_what_training_would_from_the_configuration_alone(refused, tmp_path, config, sentence):
    config.save_pretrained(tmp_path)
    assert sentence in refused("plan", "--model", tmp_path, "--device", "t4", "--block_size", 64)


def test_a_plan_is_made_where_the_settings_say_that_logits_stay_as_they_are(cartilha, tmp_path):
    """The type alone does not tell; and of many layers and ids a few are looked at."""
    Gemma2Config(num_key_value_heads=1, head_dim=8, final_logit_softcapping=None, pad_token_id=4000,
                 **{**TINY, "vocab_size": 5000, "num_hidden_layers": 4}).save_pretrained(tmp_path)  # fmt: skip
    outcome = cartilha("plan", "--model", tmp_path, "--device", "t4", "--block_size", 64, "--json")
    assert outcome.code == 0, outcome.err
    assert "is seen when it is loaded" not in outcome.err
