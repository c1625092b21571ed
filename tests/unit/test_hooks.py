"""What listens to the training loop: metrics.jsonl across resumes, the epoch's loss, and requests to stop."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from cartilha.training.metrics_file import MetricsFile
from cartilha.training.state import Progress, StepRecord
from cartilha.training.stopping import StopRequest, listening_for_stop
from cartilha.training.watch import LossWatch


def record(step: int, loss: float = 2.0, num_targets: int = 10, skipped: bool = False) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=1,
        ends_epoch=False,
        num_targets=num_targets,
        tokens=10 * step,
        loss=torch.tensor(loss),
        lr=1e-3,
        grad_norm=torch.tensor(0.5),
        skipped=torch.tensor(skipped),
        seconds=0.5,
        total_seconds=0.5 * step,
        memory_bytes=1000,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


def test_a_step_is_a_line_written_when_the_next_one_comes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, LossWatch(Progress()))
    metrics.step(record(1))
    assert steps(path) == []
    metrics.step(record(2))
    assert steps(path) == [1]
    metrics.close()
    assert steps(path) == [1, 2]
    assert lines(path)[0] == {
        "step": 1,
        "epoch": 1,
        "tokens": 10,
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 20.0,
        "memory_bytes": 1000,
        "micro_batch_size": 1,
        "seconds": 0.5,
    }


def test_an_evaluation_comes_after_the_step_that_it_followed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, LossWatch(Progress()))
    metrics.evaluation(0, 0, {"perplexity": 9.0})
    metrics.step(record(1))
    metrics.evaluation(1, 1, {"perplexity": 8.0})
    assert [("evaluation" in line, line["step"]) for line in lines(path)] == [(True, 0), (False, 1), (True, 1)]
    metrics.close()


def test_a_resumed_run_continues_without_gap_or_repeat_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, LossWatch(Progress()))
    metrics.evaluation(0, 0, {"perplexity": 9.0})
    for step in range(1, 8):
        metrics.step(record(step))
    metrics.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "epo')  # killed while it wrote
    resumed = MetricsFile(path, 5, LossWatch(Progress()))
    assert steps(path) == [0, 1, 2, 3, 4, 5]
    for step in range(6, 10):
        resumed.step(record(step))
    resumed.close()
    assert steps(path) == list(range(10))
    assert "evaluation" in lines(path)[0]


def test_steps_that_the_file_has_lost_are_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, LossWatch(Progress()))
    for step in (1, 2, 3, 6, 7):
        metrics.step(record(step))
    metrics.evaluation(5, 1, {"perplexity": 9.0})
    metrics.close()
    with caplog.at_level(logging.WARNING, "cartilha"):
        MetricsFile(path, 3, LossWatch(Progress())).close()
        assert not caplog.messages
        path.write_text(json.dumps({"step": 2}) + "\n" + "[" * 100_000 + "\n", encoding="utf-8")
        MetricsFile(path, 3, LossWatch(Progress())).close()
    assert len(caplog.messages) == 1 and "has lost 2 of the 3 steps" in caplog.messages[0]


def test_a_checkpoints_steps_are_on_the_disk_before_it_is(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, LossWatch(Progress()))
    metrics.step(record(1))
    durable: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: durable.extend(steps(path)))
    metrics.sync()
    metrics.close()
    assert durable == [1]


def test_a_run_that_begins_anew_drops_the_lines_of_the_one_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0, LossWatch(Progress()))
    first.step(record(1))
    first.close()
    assert steps(path) == [1]
    MetricsFile(path, 0, LossWatch(Progress())).close()
    assert steps(path) == []


def test_lines_with_unusual_line_separators_survive_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, LossWatch(Progress()))
    metrics.evaluation(0, 0, {"documents_lost": ["a\u2028b", "c\x85d"]})
    metrics.step(record(1))
    metrics.close()
    MetricsFile(path, 1, LossWatch(Progress())).close()
    assert steps(path) == [0, 1]
    assert lines(path)[0]["evaluation"]["documents_lost"] == ["a\u2028b", "c\x85d"]


def test_a_loss_that_is_no_number_is_written_as_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, LossWatch(Progress()))
    metrics.step(record(1, loss=math.nan))
    metrics.close()
    assert lines(path)[0]["loss"] is None


def test_the_epochs_loss_weighs_each_step_by_its_targets():
    progress = Progress()
    LossWatch(progress).judge(record(1, loss=1.0, num_targets=30))
    LossWatch(progress).judge(record(2, loss=5.0, num_targets=10))
    mean, seconds = progress.end_epoch()
    assert mean == 2.0  # not 3.0, the mean of the steps' means
    assert seconds == 1.0
    assert (progress.epoch_nll, progress.epoch_tokens, progress.epoch_seconds) == (0.0, 0, 0.0)


def test_the_epochs_sums_go_on_after_a_resume(tmp_path):
    def sums(before: Progress, steps: range) -> Progress:
        progress = Progress(**asdict(before))
        metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, LossWatch(progress))
        for step in steps:
            metrics.step(record(step, loss=1 / step, num_targets=step))
        metrics.sync()  # as before a checkpoint
        metrics.close()
        return progress

    whole = sums(Progress(), range(1, 7))
    halves = sums(sums(Progress(), range(1, 4)), range(4, 7))
    assert halves == whole and halves.epoch_tokens == 21
    assert halves.end_epoch() == whole.end_epoch()


def test_a_loss_that_is_no_number_is_left_out_of_the_mean():
    progress = Progress()
    for step, loss in enumerate((1.0, math.nan, 3.0), 1):
        LossWatch(progress).judge(record(step, loss=loss, skipped=math.isnan(loss)))
    assert progress.end_epoch() == (2.0, 1.5)
    LossWatch(progress).judge(record(1, loss=math.inf, skipped=True))
    assert math.isnan(progress.end_epoch()[0])


def test_a_request_to_stop_is_noted_and_the_old_handlers_come_back(capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with listening_for_stop() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "checkpoint" in capsys.readouterr().err


def test_a_second_ctrl_c_stops_at_once():
    stop = StopRequest()
    stop._take(signal.SIGINT, None)
    assert stop.requested
    stop._take(signal.SIGTERM, None)  # a scheduler that repeats itself is patient
    with pytest.raises(KeyboardInterrupt):
        stop._take(signal.SIGINT, None)


def test_outside_the_main_thread_nothing_is_caught_and_nothing_fails():
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def listen() -> None:
        with listening_for_stop() as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.requested])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before, False]
