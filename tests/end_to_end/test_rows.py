"""A model whose documents have rows of their own, from the command line: it is said once, trains and is evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    MambaConfig,
    PhiConfig,
)

from cartilha.tokens.tokenizer import load_tokenizer

TINY = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 128}  # fmt: skip
BART = BartConfig(d_model=16, max_position_embeddings=128)
SAID = "run with one document per row"
SHORT_PLAN = ("--memory", "full", "--block_size", 32)  # a step of Mamba is traced position by position


MODELS = {
    "bloom": BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=2),  # it has no length
    "mamba": MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=4),  # it carries a state
    "gemma2": Gemma2Config(num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0, **TINY),  # packed by proof
}


@pytest.fixture(scope="module", params=MODELS)
def unknown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, with the tokenizer of random:tiny."""
    path = tmp_path_factory.mktemp("models") / request.param
    torch.manual_seed(0)
    config = MODELS[request.param]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 256, 257, 258
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    load_tokenizer("random:tiny").save(path)
    return path


def test_it_trains_resumes_and_is_evaluated_and_each_command_says_so_once(cartilha, store, unknown, tmp_path):
    run = tmp_path / "run"
    settings = ["--model", unknown, "--store", store, "--output", run, "--block_size", 64, "--batch_tokens", 256,
                "--lr", 3e-3, "--dtype", "float32", "--max_steps", 12]  # fmt: skip
    outcome = cartilha("train", *settings, "--json")
    assert outcome.code == 0, outcome.err
    in_rows = unknown.name != "gemma2"
    assert outcome.err.count(SAID) == in_rows
    results = json.loads(outcome.out)
    assert len([notice for notice in results["notices"] if SAID in notice]) == in_rows
    first, *_, last = (evaluation["bits_per_byte"] for evaluation in results["evaluations"])
    assert last < first - 0.5
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert plan["memory_bytes"] > 0 and plan["micro_batch_size"] == 4
    outcome = cartilha("evaluate", "--model", run / "model", "--store", store, "--dtype", "float32", "--json")
    assert outcome.code == 0 and outcome.err.count(SAID) == in_rows
    assert json.loads(outcome.out)["models"][0]["bits_per_byte"] == pytest.approx(last, abs=1e-6)


def test_check_agrees_and_plan_plans(cartilha, store, unknown):
    outcome = cartilha("check", "--model", unknown, "--store", store, "--quick", "--block_size", 64, "--json")
    found = {row["name"]: row["outcome"] for row in json.loads(outcome.out)["checks"]}
    # Fresh weights that come from a folder are taken for pretrained ones, which they are not.
    assert [name for name, outcome in found.items() if outcome == "failed"] == ["start"]
    assert {found[name] for name in ("truth", "causality", "resume")} == {"passed"}, found
    outcome = cartilha("plan", "--model", unknown, "--device", "cpu", "t4", *SHORT_PLAN, "--json")
    assert outcome.code == 0, outcome.err
    assert all(row["memory_bytes"] > 0 for row in json.loads(outcome.out)["rows"])


def test_a_plan_refuses_what_training_would_from_the_configuration_alone(refused, tmp_path):
    BART.save_pretrained(tmp_path)
    sentence = refused("plan", "--model", tmp_path, "--device", "t4", "--block_size", 64)
    assert "since they have an encoder besides the decoder" in sentence


def test_inspect_and_plan_say_how_a_model_runs(cartilha, unknown):
    line = "documents packed side by side" if unknown.name == "gemma2" else "one document per row, since "
    outcome = cartilha("inspect", unknown)
    assert outcome.code == 0 and f"Runs: {line}" in outcome.out, outcome.err
    plan = cartilha("plan", "--model", unknown, "--device", "t4", *SHORT_PLAN)
    assert plan.code == 0 and f"Runs: {line}" in plan.out, plan.err


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(num_key_value_heads=1, head_dim=8, pad_token_id=4000,
                     **{**TINY, "vocab_size": 5000, "num_hidden_layers": 4}),
        CohereConfig(pad_token_id=0, **TINY),
        PhiConfig(**TINY),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_plan_is_made_whatever_the_head_and_of_many_layers_and_ids_a_few_are_looked_at(cartilha, tmp_path, config):
    config.save_pretrained(tmp_path)
    outcome = cartilha("plan", "--model", tmp_path, "--device", "t4", "--block_size", 64, "--json")
    assert outcome.code == 0, outcome.err
    assert "is seen when it is loaded" not in outcome.err
