"""`run` and `demo`: the whole job, from text to report, as a recipe says."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cartilha.config import ReportConfig, RunConfig
from cartilha.errors import log
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.prepare import PrepareResult, prepare
from cartilha.pipeline.report import ReportResult, report
from cartilha.pipeline.train import TrainResult, train
from cartilha.runs.files import read_samples


@dataclass(frozen=True)
class RunResult:
    """What a whole job made: `report` is the page's path, `table` Markdown, `samples` the rows of samples.jsonl."""

    prepared: PrepareResult
    trained: TrainResult
    report: str
    table: str
    samples: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        return {**vars(self), "prepared": self.prepared.to_dict(), "trained": self.trained.to_dict()}

    def _repr_html_(self) -> str:
        """Notebooks show the training's result and curves."""
        return self.trained._repr_html_()


def run(config: RunConfig) -> RunResult:
    """Prepare, train (with validation and texts before and after) and report; a finished stage is not repeated."""
    preflight(config)
    output = Path(config.output)
    prepared = prepare(replace(config.prepare, model=config.model, output=str(output / "store")))
    run_path = output / "run"
    # A job is often run again after a lost session, so it always resumes if it can.
    training = replace(config.train, model=config.model, store=prepared.store, output=str(run_path), resume="auto")
    try:
        trained = train(training, prompts=replace(config.generate, model=config.model))
    except BaseException:
        if (run_path / "results.json").is_file():  # a failed or interrupted run is reported too
            with suppress(OSError):  # if the disk is full, the user must read the first error, not this one
                _report(run_path, output)
        raise
    page = _report(run_path, output)
    return RunResult(prepared, trained, page.report, page.table, tuple(read_samples(run_path)))


def _report(run_path: Path, output: Path) -> ReportResult:
    page = report(ReportConfig(runs=(str(run_path),), output=str(output / "report.html")))
    log.info("The report is %s.", page.report)
    return page
