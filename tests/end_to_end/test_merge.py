"""`merge`: an adapter into its base, and instruct minus base added to a trained model, weight by weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import start
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cartilha.config import MergeConfig
from cartilha.model import arithmetic
from cartilha.model.load import load_model
from cartilha.pipeline.merge import base_of, merge
from cartilha.tokens.tokenizer import load_tokenizer


def written(folder: Path, seed: int) -> Path:
    """A model of its own, in a directory."""
    load_model("random:tiny", torch.device("cpu"), seed=seed).model.save_pretrained(folder)
    load_tokenizer("random:tiny").save(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("base") / "base", 0)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = written(tmp_path_factory.mktemp("instruct") / "instruct", 1)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    start(store, path, model=str(base), max_steps=1)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_what_instruction_tuning_added_is_added(trained, base, instruct, cartilha, monkeypatch):
    monkeypatch.setattr(arithmetic, "SHARD_BYTES", 50_000)
    outcome = cartilha("merge", trained, "--add", instruct, "--dtype", "float32")
    assert outcome.code == 0 and "before" in outcome.out
    output = trained / "instruct"
    found, (one, two, three) = weights(output), (weights(trained / "model"), weights(base), weights(instruct))
    assert len(list(output.glob("model-*.safetensors"))) > 2 and found.keys() == one.keys()
    for name, value in found.items():
        assert torch.equal(value, one[name] + (three[name] - two[name])), name
    plain = AutoModelForCausalLM.from_pretrained(output)
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ messages }}"
    record = json.loads((output / "merge.json").read_text())
    assert record["base"] == str(base) and record["instruct"] == str(instruct)
    (last,) = json.loads((trained / "results.json").read_text())["evaluations"][-1:]
    assert record["before"]["bits_per_byte"] == pytest.approx(last["bits_per_byte"], abs=1e-6)
    assert record["after"]["bits_per_byte"] != record["before"]["bits_per_byte"] and record["after"]["text"]
    assert "arXiv:2410.10739" in (output / "README.md").read_text()


def test_rows_of_new_tokens_are_kept(trained, base, instruct, tmp_path):
    """Rows that the base's tokenizer does not know: new ones, and spare ones that new tokens have taken."""
    folders = {"trained": trained / "model", "base": base, "instruct": instruct}
    files = {name: arithmetic.WeightFiles(name, folder) for name, folder in folders.items()}
    longer = weights(trained / "model")
    name = next(name for name in longer if "embed" in name)
    longer[name] = torch.cat([longer[name], torch.ones(5, 64)])
    (tmp_path / "longer").mkdir()
    save_file(longer, tmp_path / "longer" / "model.safetensors")
    files["trained"] = arithmetic.WeightFiles("trained", tmp_path / "longer")
    arithmetic.check_alike(*files.values())
    compute = arithmetic.added(*files.values(), num_rows=259, num_ids=257)
    summed = {key: compute(key) for key in longer}
    assert torch.equal(summed[name][257:], longer[name][257:])
    change = files["instruct"].tensor(name) - files["base"].tensor(name)
    assert torch.equal(summed[name][:257], (longer[name][:259] + change)[:257])


def test_an_adapter_is_merged_into_its_base(base, instruct, store, tmp_path, cartilha, refused):
    pytest.importorskip("peft", reason="needs peft (extra adapters)")
    run = tmp_path / "run"
    start(store, run, model=str(base), max_steps=2, lora=4)
    assert cartilha("merge", run).code == 0
    merged, loaded = AutoModelForCausalLM.from_pretrained(run / "merged"), load_model(str(run), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), loaded.model.parameters(), strict=True))
    assert "is there already" in refused("merge", run)
    result = merge(MergeConfig(run=str(run), add=str(instruct), dtype="float32", save_dtype="bfloat16"))
    assert result.base == str(base) and weights(run / "instruct")["model.norm.weight"].dtype == torch.bfloat16


def test_what_cannot_be_merged_is_said_in_a_sentence(trained, base, instruct, store, tmp_path, refused):
    out = ("--output", tmp_path / "out")
    assert "no adapter, so there is nothing to merge" in refused("merge", trained, *out)
    assert "is a store, and no model" in refused("merge", store, *out)
    assert "does not record what it was trained from" in refused("merge", base, "--add", instruct, *out)
    assert "takes a whole model with files" in refused("merge", trained, "--add", "random:tiny", *out)
    opt = tmp_path / "opt"
    load_model("random:tiny-opt", torch.device("cpu")).model.save_pretrained(opt)
    load_tokenizer("random:tiny").save(opt)
    assert "has no weight" in refused("merge", trained, "--add", opt, *out)
    other = tmp_path / "other"
    written(other, 2)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<outro>"
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another tokenizer than" in refused("merge", trained, "--add", other, *out)
    shapes = load_file(instruct / "model.safetensors")
    (tmp_path / "narrow").mkdir()
    for file in instruct.iterdir():
        (tmp_path / "narrow" / file.name).write_bytes(file.read_bytes())
    save_file({k: v[:, :32].contiguous() if v.dim() == 2 else v for k, v in shapes.items()},
              tmp_path / "narrow" / "model.safetensors")  # fmt: skip
    assert "cannot be added; name models of one family" in refused("merge", trained, "--add", tmp_path / "narrow", *out)
    assert not (tmp_path / "out").exists()


def test_the_base_is_that_of_the_first_run_and_of_the_old_vocabulary(tmp_path):
    for name, model in (("one", "org/base"), ("two", str(tmp_path / "one" / "model"))):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
        (tmp_path / name / "results.json").write_text(json.dumps({"settings": {"model": model, "model_commit": None}}))
    assert base_of(tmp_path / "two") == "org/base"
    (tmp_path / "one" / "model" / "extension.json").write_text('{"model": "org/older"}')
    assert base_of(tmp_path / "two") == "org/older"
