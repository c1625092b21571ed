"""`run` and `demo`: the whole job, from text to report, as a recipe says."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cartilha.config import RunConfig
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.prepare import PrepareResult, prepare
from cartilha.pipeline.train import TrainResult, train
from cartilha.reporting.html import render_report
from cartilha.reporting.results import load_run
from cartilha.reporting.tables import results_table, to_markdown
from cartilha.runs.files import read_samples

log = logging.getLogger("cartilha")


@dataclass(frozen=True)
class RunResult:
    """What a whole job left behind.

    Attributes:
        prepared: The store.
        trained: The run, with the evaluations before and after.
        report: The page.
        table: The results table as Markdown.
        samples: The texts generated before and after, as samples.jsonl has them.
    """

    prepared: PrepareResult
    trained: TrainResult
    report: str
    table: str
    samples: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "prepared": self.prepared.to_dict(),
            "trained": self.trained.to_dict(),
            "report": self.report,
            "table": self.table,
            "samples": list(self.samples),
        }


def run(config: RunConfig) -> RunResult:
    """Prepare, train (with validation and texts before and after) and report. What is done already is not done again.

    Raises:
        UserError: As each stage does.
    """
    preflight(config)
    output = Path(config.output)
    prepared = prepare(replace(config.prepare, model=config.model, output=str(output / "store")))
    run_path = output / "run"
    # A job is a script that one runs again after a lost session: it always goes on where it can.
    training = replace(config.train, model=config.model, store=prepared.store, output=str(run_path), resume="auto")
    try:
        trained = train(training, prompts=replace(config.generate, model=config.model))
    except BaseException:
        if (run_path / "results.json").is_file():  # a failed or interrupted run is reported too
            with suppress(OSError):  # where the disk is full, that is what the user must read
                _report(run_path, output)
        raise
    report = _report(run_path, output)
    table = to_markdown(results_table([load_run(run_path)]), "en")
    return RunResult(prepared, trained, str(report), table, tuple(read_samples(run_path)))


def _report(run_path: Path, output: Path) -> Path:
    report = render_report([run_path], output / "report.html")
    log.info("The report is %s.", report)
    return report
