"""Tiny training runs for the end-to-end tests: how they are started, what they leave, and when two are the same."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from cartilha.config import GenerateConfig, TrainConfig
from cartilha.pipeline.train import train

SETTINGS = {"model": "random:tiny", "block_size": 32, "batch_tokens": 128, "epochs": 2, "lr": 3e-3, "dtype": "float32"}
FLAGS = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)] + ["--skip_english"]
PROMPTS = GenerateConfig(prompt=("Era uma vez ", "a\u2028b"), max_new_tokens=8)
TIMES = {"seconds", "tokens_per_second", "tokens_per_second_after_first_step", "memory_bytes"}
TIMES |= {"utilization", "energy"}


def start(store: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Train; the contents of results.json."""
    config = TrainConfig(**{**SETTINGS, "skip_english": True, "store": str(store), "output": str(output), **changes})
    return train(config, prompts=PROMPTS).results


@dataclass(frozen=True)
class Left:
    """What a run left on the disk."""

    path: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.path / "results.json").read_text(encoding="utf-8"))

    def lines(self, name: str) -> list[dict[str, Any]]:
        text = (self.path / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines("metrics.jsonl") if "evaluation" not in line]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.steps]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model" / "model.safetensors")


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_same_run(run: Left, other: Left) -> None:
    """The same metrics, figures, texts and weights, to the bit."""
    assert without_times(run.lines("metrics.jsonl")) == without_times(other.lines("metrics.jsonl"))
    assert run.lines("samples.jsonl") == other.lines("samples.jsonl")
    assert pq.read_table(run.path / "surprisal.parquet").equals(pq.read_table(other.path / "surprisal.parquet"))
    for name in ("status", "epochs", "evaluations", "comparison", "tokens"):
        assert without_times(run.results[name]) == without_times(other.results[name]), name
    weights, expected = run.weights, other.weights
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def num_lines(path: Path) -> int:
    return (path / "metrics.jsonl").read_bytes().count(b"\n")
