"""The view of a training run: what it shows, and that no text can disturb the terminal."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cartilha.runs import live
from cartilha.runs.files import RunWriter
from cartilha.runs.live import TrainingStatus, training_view
from cartilha.training.schedule import Schedule
from cartilha.training.state import StepRecord
from cartilha.units import show_duration


def step(number: int, loss: float = 4.0, **changes: Any) -> StepRecord:
    values = {
        "step": number,
        "epoch": 1,
        "ends_epoch": False,
        "num_targets": 1000,
        "tokens": 1000 * number,
        "loss": torch.tensor(loss),
        "lr": 1e-3,
        "grad_norm": torch.tensor(1.0),
        "skipped": torch.tensor(False),
        "seconds": 2.0,
        "total_seconds": 2.0 * number,
        "memory_bytes": 3_210_000_000,
        "micro_batch_size": 1,
    }
    return StepRecord(**{**values, **changes})


def record_at(path: Path, sample: str) -> RunWriter:
    line = {"step": 0, "prompt": "Era", "text": sample, "mode": "greedy"}
    (path / "samples.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    return RunWriter(path, {"evaluations": [{"step": 0, "perplexity": 66.5}]})


def drawn(status: TrainingStatus, width: int = 100) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
    console.print(status)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_panel_has_every_figure_and_the_last_text(tmp_path):
    status = TrainingStatus("Training x", Schedule(100, 1e-3, 0.0, 0.1))
    status.read(record_at(tmp_path, "Era uma vez [bold]não"))
    status.update(step(1))
    status.update(step(2))
    assert status.figures() == {
        "epoch": "1",
        "loss": "4.000 nats/token",
        "perplexity": "54.60",
        "validation": "perplexity 66.50",
        "speed": "500 tokens/s",
        "memory": "3.21 GB",
        "time left": "3 min 16 s",
    }
    text = drawn(status)
    for part in (*status.figures().values(), "step 2 of 100", "Era uma vez [bold]não"):
        assert part in text
    assert all(part in drawn(status, 44) for part in status.figures().values())  # narrow: more lines, nothing cut


def test_no_text_of_a_model_reaches_the_terminal_as_a_command(tmp_path):
    status = TrainingStatus("Training x", Schedule(100, 1e-3, 0.0, 0.1))
    status.read(record_at(tmp_path, "a\x1b]0;title\x07b\x1b[2Jc\n\rd\u202ee" + "f" * 999))
    assert status.sample.startswith("a ]0;title b [2Jc  d e") and status.sample.endswith("…")
    for command in ("\x1b]0;", "\x1b[2J", "\x07", "\u202e"):
        assert command not in drawn(status)


def test_the_loss_is_read_a_step_late_and_time_left_follows_the_budget():
    status = TrainingStatus("x", Schedule(1000, 1e-3, 0.0, 0.1, time_budget_s=100.0))
    status.update(step(1, loss=2.0))
    assert status.loss is None and status.seconds_left == 98.0
    status.update(step(2, loss=float("nan")))
    status.update(step(3, loss=9.0))
    assert status.loss == 2.0  # a loss that is no number is not shown
    assert TrainingStatus("x", Schedule(10, 1e-3, 0.0, 0.1)).line() == "Step 0 of 10: epoch 1"


def test_the_first_step_which_may_compile_is_no_part_of_the_speed():
    status = TrainingStatus("x", Schedule(12, 1e-3, 0.0, 0.1))
    status.update(step(1, seconds=40.0))
    assert status.seconds_left == 440.0
    for number in (2, 3):
        status.update(step(number, seconds=2.0))
    assert status.tokens_per_second == 500 and status.seconds_left == 18.0


def test_without_a_terminal_there_are_plain_lines(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(live, "PLAIN_INTERVAL_S", 0.0)
    logger = logging.getLogger("cartilha")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    record = record_at(tmp_path, "Era")
    with training_view(record, Schedule(3, 1e-3, 0.0, 0.1), "x") as show:
        show(step(1, ends_epoch=True))
        record.values["evaluations"].append({"step": 1, "perplexity": 50.0})
        show(step(2))
    lines = [entry.getMessage() for entry in caplog.records]
    assert "validation perplexity 66.50" in lines[0] and "validation perplexity 50.00" in lines[-1]
    assert "loss 4.000 nats/token, perplexity 54.60" in lines[-1] and "memory 3.21 GB, time left 2 s" in lines[-1]


def test_nobody_listening_is_shown_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(live, "PLAIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(logging.getLogger("cartilha"), "handlers", [])
    with training_view(RunWriter(tmp_path, {}), Schedule(3, 1e-3, 0.0, 0.1), "x") as show:
        show(step(1))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (61, "1 min 01 s"), (7384, "2 h 03 min")])
def test_times(seconds, text):
    assert show_duration(seconds) == text
