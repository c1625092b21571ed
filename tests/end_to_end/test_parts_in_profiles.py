"""A model that reads more than text in the other ways to train: lean, by an adapter, shared out over two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from runs import Left, start
from test_kinds import KINDS, others
from transformers import AutoModelForImageTextToText

from cartilha.model.load import load_model
from cartilha.tokens.tokenizer import load_tokenizer

SETTINGS: dict[str, Any] = {"block_size": 32, "batch_tokens": 64, "max_steps": 3, "lr": 3e-3, "seed": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts") / "base"
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(KINDS["parts"], dtype=torch.float32)
    whole.bfloat16().save_pretrained(path)
    load_tokenizer("random:tiny").save(path)
    return path


@pytest.fixture(scope="module")
def plain(base: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Trained in the usual way."""
    path = tmp_path_factory.mktemp("plain") / "run"
    start(store, path, model=str(base), skip_checks=True, **SETTINGS)
    return Left(path)


def assert_whole(base: Path, saved: Path) -> None:
    """The other parts are those of the base to the bit, and transformers reads the whole."""
    assert others(base) == others(saved) != {}
    _, report = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_lean(base, store, tmp_path):
    start(store, tmp_path / "run", model=str(base), skip_checks=True, memory="lean", dtype="bfloat16", **SETTINGS)
    run = Left(tmp_path / "run")
    assert run.losses[-1] < run.losses[0]
    assert_whole(base, run.path / "model")


def test_an_adapter(base, store, tmp_path):
    start(store, tmp_path / "run", model=str(base), skip_checks=True, lora=2, **SETTINGS)
    run = Left(tmp_path / "run")
    before, after = (load_model(str(path), torch.device("cpu")) for path in (base, run.path / "model"))
    assert after.others == before.others is not None
    weights = after.model.state_dict()
    changed = [name for name, weight in before.model.state_dict().items() if not torch.equal(weight, weights[name])]
    assert changed and all("layers" in name for name in changed)


def test_two_processes_that_share_it_out(base, plain, store, tmp_path):
    run = tmp_path / "run"
    values = {"model": base, "store": store, "output": run, "dtype": "float32", "shard": "full", **SETTINGS}
    words = [part for name, value in values.items() for part in (f"--{name}", value)]
    outcome = run_processes(2, tmp_path / "processes", "train", *words, "--skip_english", "--skip_checks")
    assert outcome.codes == [0, 0], outcome.errs
    assert Left(run).losses == pytest.approx(plain.losses, abs=1e-5)
    assert_whole(base, run / "model")
    saved, expected = (load_model(str(path / "model"), torch.device("cpu")).model for path in (run, plain.path))
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], weight, rtol=0, atol=1e-4)
