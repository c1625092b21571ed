"""Runs that go on with other things, or in another place: what `--allow_changes` accepts, and what just moved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FLAGS, Left, assert_same_run, start, terminate
from tokenizers import normalizers

from cartilha.config import PrepareConfig
from cartilha.errors import InterruptedRunError, UserError
from cartilha.model.load import load_model
from cartilha.pipeline.prepare import prepare
from cartilha.tokens.tokenizer import byte_tokenizer

SHORT = {"max_steps": 6}
WORDS = "o moleiro subiu ao telhado com uma escada curta e ficou lá em cima até ao fim da tarde"


def write_model(folder: Path, seed: int = 0) -> Path:
    """A model of random:tiny's shape with its tokenizer, in a folder."""
    load_model("random:tiny", torch.device("cpu"), seed=seed).model.save_pretrained(folder)
    byte_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def stopped(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, and `run`, which was stopped after its third step; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_model(folder / "model")
    count = 0

    def third_step(*rest: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            terminate()
        return stack(*rest, **more)

    from cartilha.training.loop import stack

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr("cartilha.training.loop.stack", third_step)
        patch.chdir(folder)
        start(store, folder / "run", model="./model", **SHORT)
    assert len(Left(folder / "run").steps) == 3
    return folder


def another_corpus(folder: Path, corpus: Path) -> dict[str, Any]:
    (folder / "outro.txt").write_text("".join(f"{n} {WORDS[n:]}.\n" for n in range(20)), "utf-8")
    prepare(PrepareConfig(input=(str(folder / "outro.txt"),), model="random:tiny", output=str(folder / "other-store")))
    return {"store": folder / "other-store"}


def another_model(folder: Path, corpus: Path) -> dict[str, Any]:
    write_model(folder / "model", seed=7)
    return {}


def another_tokenizer(folder: Path, corpus: Path) -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.backend.normalizer = normalizers.NFC()
    tokenizer.save(folder / "model")
    prepare(PrepareConfig(input=(str(corpus),), model=str(folder / "model"), output=str(folder / "other-store")))
    return {"store": folder / "other-store"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (another_corpus, "store was "),
        (another_model, "weights was "),
        (another_tokenizer, "tokenizer was "),
        (lambda *_: {"batch_tokens": 64}, "batch_tokens was 128, now 64"),
        (lambda *_: {"lr": 1e-3}, "lr was 0.003, now 0.001"),
        (lambda *_: {"warmup_fraction": 0.5}, "warmup_fraction was "),
        (lambda *_: {"max_steps": 8}, "num_steps was 6, now 8"),
    ],
)
def test_what_changed_is_refused_by_name_and_accepted_on_request(
    stopped: Path,
    store: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, Path], dict[str, Any]],
    named: str,
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "here")
    options = {
        "store": store,
        "model": "./model",
        "resume": "auto",
        "skip_checks": True,
        **SHORT,
        **change(folder, corpus),
    }
    monkeypatch.chdir(folder)
    place = options.pop("store")
    with pytest.raises(UserError, match="cannot go on with other settings") as caught:
        start(place, folder / "run", **options)
    assert named in str(caught.value) and "model was" not in str(caught.value)
    results = start(place, folder / "run", **options, allow_changes=True)
    assert results["status"] == "finished" and results["resumed_from_step"] == [3]
    assert named in " ".join(results["notices"])
    assert [line["step"] for line in Left(folder / "run").steps] == list(range(1, options["max_steps"] + 1))


def test_a_run_that_was_moved_to_a_place_with_an_odd_name_goes_on_there(store, tmp_path, during_step, cartilha):
    start(store, tmp_path / "whole")
    during_step({4: terminate})
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run")
    moved, copied = tmp_path / "Meu computador" / "1ª tentativa (João's)  [x]", tmp_path / "outro café" / "store"
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
    shutil.copytree(store, copied)
    outcome = cartilha("train", *FLAGS, "--store", copied, "--output", moved, "--resume", "auto")
    assert outcome.code == 0, outcome.err
    run = Left(moved)
    assert run.results["resumed_from_step"] == [4] and run.losses == Left(tmp_path / "whole").losses
    report = tmp_path / "relatório final.html"
    assert cartilha("report", moved, "--output", report).code == 0 and report.is_file()
    shutil.copy(tmp_path / "whole" / "samples.jsonl", moved / "samples.jsonl")  # of other prompts
    assert_same_run(run, Left(tmp_path / "whole"))
