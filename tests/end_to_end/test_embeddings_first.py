"""A first phase that trains the token embeddings alone: nothing else moves in it, everything moves after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cartilha.config import TrainConfig
from cartilha.model.load import load_model
from cartilha.pipeline.train import train
from cartilha.tokens.tokenizer import byte_tokenizer

EMBEDDINGS = {"model.embed_tokens.weight"}  # random:tiny's head is tied to it


def config(store: Path, output: Path, **options: object) -> TrainConfig:
    given = {
        "max_steps": 4,
        "checkpoint_steps": 2,
        "lr": 1e-3,
        "embeddings_lr": 5e-3,
        "keep_optimizer": True,
        **options,
    }
    return TrainConfig(
        model="random:tiny", store=str(store), output=str(output), block_size=64, batch_tokens=128, **given
    )


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phases") / "run"
    train(config(store, path, embeddings_first="50%"))
    return path


def test_only_the_embeddings_move_in_the_first_phase_and_all_in_the_second(run: Path):
    model = load_model("random:tiny", torch.device("cpu"), tokenizer=byte_tokenizer()).model
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert set(start) > EMBEDDINGS
    middle, end = (load_file(run / f"checkpoints/step-0000000{step}/model.safetensors") for step in (2, 4))
    assert changed(start, middle) == EMBEDDINGS
    assert changed(middle, end) == set(start)


def test_each_phase_has_its_own_rate(run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([5e-3, 5e-4, 1e-3, 1e-4])
    settings = json.loads((run / "results.json").read_text())["settings"]
    assert settings["embeddings_first"] == 0.5 and settings["embeddings_lr"] == 5e-3


def test_a_run_that_is_resumed_between_the_phases_ends_with_the_same_weights(run: Path, store: Path, tmp_path: Path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step-00000004")
    results = json.loads((again / "results.json").read_text())
    (again / "results.json").write_text(json.dumps({**results, "status": "interrupted"}))
    train(config(store, again, embeddings_first="50%", resume="auto"))
    assert json.loads((again / "results.json").read_text())["resumed_from_step"] == [2]
    first, second = (load_file(path / "model/model.safetensors") for path in (run, again))
    assert not changed(first, second)


def test_a_run_without_the_phase_moves_everything_from_its_first_step(store: Path, tmp_path: Path):
    train(config(store, tmp_path / "run", max_steps=1))
    model = load_model("random:tiny", torch.device("cpu"), tokenizer=byte_tokenizer()).model
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert changed(start, load_file(tmp_path / "run/checkpoints/step-00000001/model.safetensors")) == set(start)


@pytest.mark.parametrize("share", ["5 percent", "105%", "-1%", "nan"])
def test_what_is_no_share_is_refused(refused, store: Path, tmp_path: Path, share: str):
    arguments = ["train", "--model", "random:tiny", "--store", store, "--output", tmp_path / "run"]
    assert "embeddings_first is a share such as 5%" in refused(*arguments, f"--embeddings_first={share}")
