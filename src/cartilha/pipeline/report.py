"""`report`: the page about one or more runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cartilha.config import ReportConfig
from cartilha.errors import UserError
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.result import Result
from cartilha.reporting.html import render_report
from cartilha.reporting.images import write_figures
from cartilha.reporting.notebook import page_html
from cartilha.reporting.several import load_runs
from cartilha.reporting.tables import results_table, to_markdown
from cartilha.reporting.wording import Wording, choose_language
from cartilha.runs.files import run_directory


@dataclass(frozen=True)
class ReportResult(Result):
    """Path of the page, its results table as Markdown, and the files of its figures if they were asked for."""

    report: str
    table: str
    figures: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """Notebooks show the whole page."""
        return page_html(self.report)


def report(config: ReportConfig) -> ReportResult:
    """Write the page; a UserError says that no run was named, or that a directory holds none."""
    if not config.runs:
        raise UserError("Name one or more run directories: cartilha report RUN... --output report.html")
    preflight(config)
    directories = [run_directory(run) for run in config.runs]
    path = render_report(directories, config.output, config.language)
    runs = load_runs(directories)
    wording = Wording(choose_language(config.language))
    figures = write_figures(runs, Path(config.figures), wording) if config.figures else []
    return ReportResult(str(path), to_markdown(results_table(runs), "en"), tuple(map(str, figures)))
