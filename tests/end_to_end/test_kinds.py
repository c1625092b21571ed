"""One model of each kind goes all the way: exact resume, report, generation, explorer, a longer vocabulary.

Packed by proof, in rows, with a state, a mixture of experts with a loss of its routers, and one that sees images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Left, assert_same_run, start, terminate
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    Gemma2Config,
    Gemma3Config,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
)

from cartilha.config import ExploreConfig, GenerateConfig, ReportConfig, VocabConfig
from cartilha.errors import InterruptedRunError
from cartilha.model.load import load_model
from cartilha.pipeline.explore import open_explorer
from cartilha.pipeline.generate import generate
from cartilha.pipeline.report import report
from cartilha.pipeline.vocab import vocab
from cartilha.tokens.tokenizer import load_tokenizer

TINY = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "intermediate_size": 16, "max_position_embeddings": 128, "pad_token_id": 258,
        "bos_token_id": 256, "eos_token_id": 257}  # fmt: skip
SEEN = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16}  # fmt: skip
IDS = {name: TINY[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
PROCESSOR = "preprocessor_config.json"
KINDS: dict[str, PretrainedConfig] = {
    "packed": Gemma2Config(final_logit_softcapping=30.0, **TINY),
    "rows": BloomConfig(vocab_size=259, hidden_size=16, n_layer=2, n_head=2, **IDS),
    "state": MambaConfig(vocab_size=259, hidden_size=16, num_hidden_layers=2, state_size=4, **IDS),
    "experts": MixtralConfig(num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1, **TINY),
    "parts": Gemma3Config(text_config={**TINY, "sliding_window": 8}, vision_config=SEEN, mm_tokens_per_image=4,
                          image_token_index=258, boi_token_index=258, eoi_token_index=258),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of that kind, with the tokenizer of random:tiny."""
    path = tmp_path_factory.mktemp("kinds") / kind
    torch.manual_seed(0)
    maker = AutoModelForImageTextToText if kind == "parts" else AutoModelForCausalLM
    maker.from_config(KINDS[kind], dtype=torch.float32).bfloat16().save_pretrained(path)
    load_tokenizer("random:tiny").save(path)
    if kind == "parts":
        (path / PROCESSOR).write_text('{"image_processor_type": "Gemma3ImageProcessor"}', encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(base: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """A run that nobody interrupted."""
    path = tmp_path_factory.mktemp("runs") / "run"
    start(store, path, **settings(base))
    return Left(path)


def settings(base: Path) -> dict[str, Any]:
    return {"model": str(base), "max_steps": 4, "checkpoint_steps": 2, "micro_batch_size": 2, "skip_checks": True}


def others(folder: Path) -> dict[str, bytes]:
    """The bytes of each weight that is not the text's."""
    weights = load_file(folder / "model.safetensors")
    return {
        name: bytes(weight.contiguous().view(-1).view(torch.uint8).numpy())
        for name, weight in weights.items()
        if "language_model" not in name
    }


def test_an_interrupted_run_is_the_unbroken_one_to_the_bit(base, run, store, tmp_path, during_step):
    during_step({6: terminate})  # a step has two forward passes
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run", **settings(base))
    start(store, tmp_path / "run", **settings(base), resume="auto")
    assert Left(tmp_path / "run").results["resumed_from_step"] == [3]
    assert_same_run(Left(tmp_path / "run"), run)
    assert run.losses[-1] < run.losses[0]


def test_its_report_texts_and_figures_are_there(run, tmp_path):
    page = report(ReportConfig(runs=(str(run.path),), output=str(tmp_path / "report.html")))
    assert "perplex" in Path(page.report).read_text(encoding="utf-8")
    (text,) = generate(
        GenerateConfig(model=str(run.path / "model"), prompt=("a roça",), max_new_tokens=4)
    ).continuations
    assert text.text.startswith("a roça") and text.num_new_tokens > 0
    explorer = open_explorer(ExploreConfig(models=(str(run.path / "model"),), device="cpu", dtype="float32"))
    (reading,) = explorer.read("o café da manhã").values()
    assert reading.evaluation.perplexity > 1


def test_a_longer_vocabulary_keeps_what_the_model_knew(kind, base, corpus, tmp_path):
    vocab(VocabConfig(model=str(base), input=(str(corpus),), extend=8, output=str(tmp_path / "longer")))
    old, new = (load_model(str(path), torch.device("cpu")).model for path in (base, tmp_path / "longer"))
    rows = [model.get_input_embeddings().weight for model in (old, new)]
    assert len(rows[1]) >= 267 and torch.equal(rows[1][:259], rows[0])
    if kind == "parts":
        assert others(base) == others(tmp_path / "longer") != {}


def test_what_is_not_text_is_saved_to_the_bit_and_the_card_says_so(kind, base, run):
    if kind != "parts":
        assert "other_parts" not in run.results
        return
    saved = run.path / "model"
    assert others(base) == others(saved) != {}
    assert (saved / PROCESSOR).read_bytes() == (base / PROCESSOR).read_bytes()
    whole, report = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and whole.dtype == torch.float32
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "Only the part for text was trained. The others (`vision_tower`, `multi_modal_projector`; " in card
    assert "Só a parte de texto foi treinada. As outras (`vision_tower`, " in card
    plan = json.loads((run.path / "plan.json").read_text(encoding="utf-8"))
    assert (
        run.results["other_parts"]["bytes"] > 0 and plan["num_parameters"] == run.results["settings"]["num_parameters"]
    )
