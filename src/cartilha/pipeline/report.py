"""`report`: the page about one or more runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cartilha.config import ReportConfig
from cartilha.errors import UserError
from cartilha.report.html import render_report
from cartilha.report.results import load_run
from cartilha.report.tables import results_table, to_markdown


@dataclass(frozen=True)
class ReportResult:
    """Where the page is, and its results table as Markdown."""

    report: str
    table: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)


def report(config: ReportConfig) -> ReportResult:
    """Write the page.

    Raises:
        UserError: No run was named, or a directory holds none.
    """
    if not config.runs:
        raise UserError("Name one or more run directories: cartilha report RUN... --output report.html")
    path = render_report(config.runs, config.output, config.language)
    runs = [load_run(run) for run in config.runs]
    return ReportResult(str(path), to_markdown(results_table(runs), "en"))
