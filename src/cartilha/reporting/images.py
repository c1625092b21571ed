"""The figures of a report as files for slides: SVG and PNG."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from cartilha.errors import install_command, log
from cartilha.reporting.figures import run_figures
from cartilha.reporting.results import RecordedRun
from cartilha.reporting.several import overlaid_figures
from cartilha.reporting.wording import Wording
from cartilha.storage import write_atomically

PNG_SCALE = 3.0  # 1,920 pixels for the widest: a slide's width


def write_figures(runs: Sequence[RecordedRun], directory: Path, say: Wording) -> list[Path]:
    """Write the figures of all runs and of each as SVG and, if vl-convert-python is there, PNG; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    to_png = _png_converter()
    figures = {figure.name: figure for figure in overlaid_figures(runs, say)}
    for number, run in enumerate(runs, 1):
        name = re.sub(r"[^\w.-]+", "_", run.name).strip("._") or "run"
        prefix = f"{number}-{name}" if len(runs) > 1 else name
        figures |= {f"{prefix}-{figure.name}": figure for figure in run_figures(run, say)}
    written = []
    for name, figure in figures.items():
        svg = figure.standalone(len(runs))
        written.append(directory / f"{name}.svg")
        write_atomically(written[-1], svg)
        if to_png is not None:
            written.append(directory / f"{name}.png")
            write_atomically(written[-1], to_png(svg))
    return written


def _png_converter() -> Callable[[str], bytes] | None:
    try:
        import vl_convert
    except ImportError:
        needed = "Figures are written as SVG alone: PNG needs vl-convert-python; install it with: %s"
        log.warning(needed, install_command("report"))
        return None
    return lambda svg: bytes(vl_convert.svg_to_png(svg, scale=PNG_SCALE))
