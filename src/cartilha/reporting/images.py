"""The figures of a report as files for slides: SVG and PNG."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import Markup

from cartilha.errors import install_command
from cartilha.reporting.chart import Figure, run_styles
from cartilha.reporting.figures import run_figures
from cartilha.reporting.pages import PACKAGE, environment, template_file
from cartilha.reporting.results import RecordedRun
from cartilha.reporting.several import overlaid_figures
from cartilha.reporting.wording import Wording
from cartilha.storage import write_atomically

log = logging.getLogger("cartilha")

PNG_SCALE = 3.0  # 1,920 pixels for the widest: a slide's width
HEAD = 54  # height of the title and one row of legend above a drawing


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
        svg = _standalone(figure, len(runs))
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


def _standalone(figure: Figure, num_runs: int) -> str:
    """The drawing as a file of its own, with title, legend, the colours of `num_runs` runs and a white ground."""
    legend: list[tuple[str, str, float, int]] = []
    left, row = 2.0, 0
    for kind, text in figure.legend:
        taken = 28 + 7.2 * len(text) + 20
        if legend and left + taken > figure.size[0] + 20:  # the last entry needs no space behind it
            left, row = 2.0, row + 1
        legend.append((kind, text, left, 38 + 18 * row))
        left += taken
    template = environment().get_template("figure.svg.j2")
    return template.render(
        figure=figure,
        style=Markup(template_file(PACKAGE, "figure.css") + run_styles(num_runs)),
        legend=legend,
        head=HEAD + 18 * row,
        drawing=Markup(figure.drawing.partition(">")[2].removesuffix("</svg>")),
    )
