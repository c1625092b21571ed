"""What the end-to-end tests share: a small corpus, its store, and the command line called in this process."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Left, start

from cartilha.cli import main
from cartilha.config import PrepareConfig
from cartilha.model.forward import batch_nll
from cartilha.pipeline.prepare import prepare

SENTENCE = "a fazenda o café de manhã lia devagar menina água roça e cartilha não sabia ler nem escrever ainda"


def text(number: int) -> str:
    """A line of 5 to 18 words, another one for each number."""
    words = SENTENCE.split()
    chosen = (words[(number * 7 + i * i) % len(words)] for i in range(5 + number % 14))
    return f"Texto {number}: {' '.join(chosen)}."


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def cartilha(capfd: pytest.CaptureFixture[str]) -> Command:
    """Call the command line; arguments may be paths and numbers."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        output = capfd.readouterr()
        # What is no terminal counts as one of 80 columns: every table must fit, with no cell cut.
        tables = [line for line in output.out.splitlines() if line.startswith(("┃", "│"))]
        assert not [line for line in tables if len(line) > 80 or "…" in line], output.out
        return Outcome(code, output.out, output.err)

    return call


@pytest.fixture
def refused(cartilha: Command) -> Callable[..., str]:
    """Call a command that must be refused: exit code 2 and one sentence, apart from the log's lines; returns it."""

    def call(*arguments: object) -> str:
        outcome = cartilha(*arguments)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        sentences = [line for line in outcome.err.splitlines() if line.startswith("cartilha:")]
        assert len(sentences) == 1 and outcome.err.splitlines()[-1] == sentences[0], outcome.err
        # Some end with a command to copy, which a full stop would spoil.
        assert re.search(r"[.?]$|: (cartilha|pip) [^.]*$", sentences[0]), sentences[0]
        return sentences[0].removeprefix("cartilha: ")

    return call


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty short texts, one a line."""
    path = tmp_path_factory.mktemp("corpus") / "textos.txt"
    path.write_text("".join(text(number) + "\n" for number in range(20)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its store for random:tiny; not to be changed by a test."""
    path = tmp_path_factory.mktemp("prepared") / "store"
    prepare(PrepareConfig(input=(str(corpus),), model="random:tiny", output=str(path)))
    return path


@pytest.fixture(scope="module")
def unbroken(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """A run of two epochs that nobody interrupted; not to be changed by a test."""
    path = tmp_path_factory.mktemp("unbroken") / "run"
    start(store, path)
    return Left(path)


@pytest.fixture
def during_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Callable[[], None]]], None]:
    """Do something inside the n-th forward pass from now on (a step has one unless micro-batches are set)."""

    def arrange(actions: dict[int, Callable[[], None]]) -> None:
        count = 0

        def patched(model: Any, batch: Any, dtype: torch.dtype, body: Any) -> torch.Tensor:
            nonlocal count
            count += 1
            if count in actions:
                actions[count]()
            return batch_nll(model, batch, dtype, body)

        monkeypatch.setattr("cartilha.training.loop.batch_nll", patched)

    return arrange
