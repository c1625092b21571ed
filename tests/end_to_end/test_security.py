"""What comes from others is never run, never trusted in size, and secrets of the environment stay there."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from cartilha.model.load import load_model
from cartilha.pipeline.recipes import read_recipe

SECRET = "hf_ThisIsTheSecretOfTheEnvironment"


def test_no_secret_of_the_environment_reaches_a_file_or_a_line(cartilha, corpus, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "GITHUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    recipe = tmp_path / "pequena.yaml"
    recipe.write_text(
        f"model: random:tiny\nprepare: {{input: [{corpus}]}}\n"
        "train: {block_size: 32, batch_tokens: 128, max_steps: 2, dtype: float32, skip_checks: true}\n"
        "generate: {prompt: [Era uma vez], max_new_tokens: 4}\n",
        encoding="utf-8",
    )
    outcome = cartilha("run", recipe, "--output", tmp_path / "job", "--json")
    assert outcome.code == 0, outcome.err
    failed = cartilha("evaluate", "--model", "no/such-model", "--store", tmp_path / "job" / "store")
    assert failed.code == 2
    files = [path for path in (tmp_path / "job").rglob("*") if path.is_file()]
    assert {"results.json", "config.yaml", "README.md", "report.html", "store.json"} <= {path.name for path in files}
    for text in (outcome.out, outcome.err, failed.out, failed.err):
        assert SECRET not in text
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def model_folder(folder: Path, **config: Any) -> Path:
    from transformers import LlamaConfig

    shape = LlamaConfig(vocab_size=259, hidden_size=64, intermediate_size=176, num_hidden_layers=2)
    folder.mkdir()
    values = {**shape.to_dict(), "architectures": ["LlamaForCausalLM"], **config}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    from cartilha.tokens.tokenizer import byte_tokenizer

    byte_tokenizer().save(folder)
    return folder


def test_a_pickle_in_a_models_weights_is_not_run(refused, corpus, tmp_path):
    mark = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap does nothing: proves nothing"
    mark.unlink()
    folder = model_folder(tmp_path / "model")
    torch.save({"model.norm.weight": Trap(mark)}, folder / "pytorch_model.bin")
    assert str(folder) in refused("evaluate", "--model", folder, "--input", corpus)
    assert not mark.exists()


AUTO_MAP = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


def add_code(folder: Path, mark: Path) -> None:
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")


def test_code_that_comes_with_a_model_is_not_run(refused, corpus, tmp_path):
    mark = tmp_path / "it-ran"
    folder = model_folder(tmp_path / "model", model_type="unheard-of", auto_map=AUTO_MAP)
    add_code(folder, mark)
    for command in (["evaluate", "--model", folder, "--input", corpus], ["plan", "--model", folder]):
        sentence = refused(*command)
        assert "code that comes with it, which is never run" in sentence and "trust_remote_code" not in sentence
    assert not mark.exists()


def test_of_a_model_of_a_known_type_the_code_is_left_alone_and_that_is_said(tmp_path, caplog):
    mark = tmp_path / "it-ran"
    model = load_model("random:tiny", torch.device("cpu")).model
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}), encoding="utf-8")
    add_code(tmp_path, mark)
    with caplog.at_level(logging.WARNING, "cartilha"):
        loaded = load_model(str(tmp_path), torch.device("cpu")).model
    assert type(loaded) is type(model) and not mark.exists()
    assert "comes with code of its own, which is not run: LlamaForCausalLM reads it." in caplog.text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "no aliases"),
        ("[" * 20_000, "nested too deeply"),
        ("model: !!python/object/apply:os.system [id]\n", "not valid YAML (line 1: could not determine"),
        ("model: m\ntrain: [\n", "not valid YAML (line 3: "),
        ("#" * 1_000_001, "larger than 1000 kB"),
    ],
    ids=["aliases", "depth", "objects", "syntax", "size"],
)
def test_a_recipe_is_plain_values(refused, tmp_path, text, part):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text, encoding="utf-8")
    assert part in refused("run", recipe)


def test_built_in_recipes_are_read_as_ever():
    assert read_recipe("demo")["model"]
