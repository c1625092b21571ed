"""Trackers mirror metrics.jsonl, and never cost the run anything."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cartilha.errors import UserError
from cartilha.training import trackers
from cartilha.training.metrics_file import MetricsFile
from cartilha.training.state import Progress
from cartilha.training.trackers import TrackedRun, check_tracker, figures_of, open_tracker
from cartilha.training.watch import LossWatch

EVALUATION = {
    "loss": 3.5,
    "perplexity": 33.1,
    "bits_per_byte": 1.9,
    "bits_per_char": None,
    "word_perplexity": math.inf,
    "domains": {"conto": {"bits_per_byte": 1.8}, "carta": {"bits_per_byte": None}},
}


class Recorder:
    """A plug-in that keeps what it is given."""

    made: ClassVar[list[Recorder]] = []

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.figures, self.texts, self.closed = run, [], [], 0
        Recorder.made.append(self)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.figures.append((step, dict(figures)))

    def text(self, step: int, name: str, text: str) -> None:
        self.texts.append((step, name, text))

    def close(self) -> None:
        self.closed += 1


class Failing(Recorder):
    """One whose server is gone after the first figures."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        super().log(step, figures)
        if len(self.figures) > 1:
            raise ConnectionError("no server")


def cannot_start(run: TrackedRun) -> Recorder:
    raise PermissionError("no key")


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"recorder": "Recorder", "failing": "Failing", "cannot": "cannot_start"}
    found = [EntryPoint(name, f"{__name__}:{made}", trackers.ENTRY_POINTS) for name, made in points.items()]
    monkeypatch.setattr(trackers, "entry_points", lambda group: found if group == trackers.ENTRY_POINTS else [])


def run_at(path: Path, resumed_step: int = 0) -> TrackedRun:
    return TrackedRun(path, resumed_step, {"model": "random:tiny", "lr": 3e-4, "time_budget_s": None})


def test_figures_are_named_and_numbers_that_are_none_are_left_out():
    line = {"step": 3, "epoch": 1, "loss": math.nan, "lr": 0.1, "spike": True, "seconds": 4.0}
    assert figures_of(line) == {"train/epoch": 1.0, "train/lr": 0.1}
    assert figures_of({"step": 3, "evaluation": EVALUATION}) == {
        "validation/loss": 3.5,
        "validation/perplexity": 33.1,
        "validation/bits_per_byte": 1.9,
        "validation/bits_per_byte/conto": 1.8,
    }


def test_a_plug_in_is_given_what_the_metrics_file_is(plug_ins, tmp_path):
    check_tracker("recorder")
    tracker = open_tracker("recorder", run_at(tmp_path, 2))
    recorder = Recorder.made[-1]
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, LossWatch(Progress()), tracker)
    metrics.evaluation(2, 1, EVALUATION)
    metrics.texts(2, [("Era ", "Era uma vez")])
    metrics.close()
    assert recorder.run.resumed_step == 2
    assert recorder.figures == [(2, figures_of(json.loads((tmp_path / "metrics.jsonl").read_text())))]
    assert recorder.texts == [(2, "samples/1 Era", "Era uma vez")] and recorder.closed == 1


def test_a_tracker_that_fails_is_left_out_with_one_line_and_the_file_goes_on(plug_ins, tmp_path, caplog):
    tracker = open_tracker("failing", run_at(tmp_path))
    failing = Recorder.made[-1]
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, LossWatch(Progress()), tracker)
    with caplog.at_level(logging.WARNING, logger="cartilha"):
        for step in (1, 2, 3):
            metrics.evaluation(step, 1, EVALUATION)
        metrics.texts(3, [("a", "b")])
        metrics.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "The tracker failing failed (ConnectionError: no server)" in line
    assert [step for step, _ in failing.figures] == [1, 2] and not failing.texts and not failing.closed
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_what_is_not_there_or_cannot_start_is_said_before_training(plug_ins, tmp_path, monkeypatch):
    assert open_tracker("none", run_at(tmp_path)) is None
    check_tracker("none")
    known = "none, tensorboard, trackio, wandb, mlflow, recorder"
    with pytest.raises(UserError, match=f"no tracker 'neptune'; choose from {known}"):
        check_tracker("neptune")
    with pytest.raises(UserError, match=r"could not be started \(PermissionError: no key\)"):
        open_tracker("cannot", run_at(tmp_path))
    for name, extra in (("trackio", "trackers"), ("wandb", "wandb"), ("mlflow", "mlflow")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"pip install .*\[{extra}\]"):
            open_tracker(name, run_at(tmp_path))


def test_a_tracker_that_is_not_installed_is_refused_before_a_run_has_a_directory(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name, extra in (("tensorboard", "trackers"), ("wandb", "wandb")):
        with pytest.raises(UserError, match=rf"The tracker {name} needs the extra `{extra}`"):
            check_tracker(name)


def test_tensorboard_has_the_figures_and_a_resume_purges_what_it_repeats(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard (extra trackers)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, losses in ((0, {1: 5.0, 2: 4.0, 3: 9.0}), (2, {3: 3.0})):
        tracker = open_tracker("tensorboard", run_at(tmp_path, resumed))
        assert tracker is not None
        for step, loss in losses.items():
            tracker.log(step, {"train/loss": loss})
        tracker.text(3, "samples/1 Era", "Era uma vez")
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert "samples/1 Era/text_summary" in events.Tags()["tensors"]


def test_trackio_has_the_figures_and_leaves_standard_output_alone(tmp_path, monkeypatch, capfd):
    trackio: Any = pytest.importorskip("trackio", reason="needs trackio (extra trackers)")
    for module in ("trackio.utils", "trackio.sqlite_storage", "trackio.media.utils"):
        __import__(module)
        if hasattr(sys.modules[module], "TRACKIO_DIR"):
            monkeypatch.setattr(sys.modules[module], "TRACKIO_DIR", tmp_path / "trackio")
    assert trackio
    run = tmp_path / "projeto" / "run"
    run.mkdir(parents=True)
    tracker = open_tracker("trackio", run_at(run))
    assert tracker is not None
    for step in (1, 2):
        tracker.log(step, {"train/loss": 5.0 - step})
    tracker.text(2, "samples/1 Era", "Era uma vez")
    tracker.close()
    assert capfd.readouterr().out == ""
    (file,) = (tmp_path / "trackio").glob("projeto*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    found = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    assert [(name, step, m["train/loss"]) for name, step, m in found if "train/loss" in m] == [
        ("run", 1, 4.0),
        ("run", 2, 3.0),
    ]


def tracked(name: str, path: Path, figures: tuple[str, ...] = ("train/loss",)) -> None:
    """A run that logs two steps, and its resume, which repeats the second."""
    for resumed, losses in ((0, {1: 5.0, 2: 4.0}), (1, {2: 4.0, 3: 3.0})):
        tracker = open_tracker(name, run_at(path, resumed))
        assert tracker is not None
        for step, loss in losses.items():
            tracker.log(step, dict.fromkeys(figures, loss))
        tracker.text(3, "samples/1 Era", "Era <uma> vez")
        tracker.close()


def test_wandb_has_the_figures_offline_and_leaves_standard_output_alone(tmp_path, monkeypatch, capfd):
    wandb: Any = pytest.importorskip("wandb", reason="needs wandb (extra wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    tracked("wandb", tmp_path)
    wandb.teardown()  # its service writes the end of a run's file after the run
    assert capfd.readouterr().out == ""
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.stem for file in files}) == 1  # both are one run, for `wandb sync`
    assert all(b"loss" in file.read_bytes() for file in files)  # names and values are packed
    assert len(list((tmp_path / "wandb").rglob("1 Era*.html"))) == 2


def test_mlflow_has_the_figures_and_a_resume_is_the_same_run(tmp_path, monkeypatch, capfd):
    pytest.importorskip("mlflow", reason="needs mlflow (extra mlflow)")
    from mlflow import MlflowClient

    run = tmp_path / "projeto" / "run"
    run.mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracked("mlflow", run, ("train/loss", "train/loss/conto"))
    assert capfd.readouterr().out == ""
    client = MlflowClient()
    experiment = client.get_experiment_by_name("projeto")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["model"] == "random:tiny"
    for name in ("train/loss", "train/loss.conto"):
        history = client.get_metric_history(found.info.run_id, name)
        assert {(point.step, point.value) for point in history} == {(1, 5.0), (2, 4.0), (3, 3.0)}
    assert [item.path for item in client.list_artifacts(found.info.run_id, "samples/1 Era")]
