"""The figures of a report as files for slides: SVG as the page has them, and PNG."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import escape

from cartilha.errors import install_command
from cartilha.reporting.chart import Figure, run_styles
from cartilha.reporting.figures import run_figures
from cartilha.reporting.results import RecordedRun
from cartilha.reporting.several import overlaid_figures
from cartilha.reporting.wording import Wording
from cartilha.storage import write_atomically

log = logging.getLogger("cartilha")

PNG_SCALE = 3.0  # 1,920 pixels for the widest: a slide's width
HEAD = 54  # height of the title and one row of legend above a drawing
# Concrete colours (those of the light page): programs that show slides know no variables and no nesting.
STYLE = """
text { font-family: 'DejaVu Sans', Arial, sans-serif; font-size: 12.5px; fill: #5c6168; }
.title { font-size: 16px; font-weight: bold; fill: #1d1f21; }
.end { text-anchor: end; } .mid { text-anchor: middle; } .other { display: none; }
.grid { stroke: #dcdcd4; stroke-width: 1; } .axis, .tick { stroke: #5c6168; stroke-width: 1; }
.curve { fill: none; stroke-linejoin: round; stroke-linecap: round; }
path.train { stroke: #0062a3; stroke-width: 2; } path.raw { stroke: #9cc4de; stroke-width: 1; }
path.validation { stroke: #b84a00; stroke-width: 1.5; stroke-dasharray: 5 4; }
path.before { stroke: #5c6168; stroke-width: 1.5; }
path.plan { stroke: #5c6168; stroke-width: 1.5; stroke-dasharray: 7 4; }
circle.train, circle.raw { fill: #0062a3; } circle.validation { fill: #b84a00; stroke: #ffffff; stroke-width: 1.5; }
circle.before { fill: #ffffff; stroke: #5c6168; stroke-width: 2; }
"""


def write_figures(runs: Sequence[RecordedRun], directory: Path, say: Wording) -> list[Path]:
    """Write the figures of all runs and of each as SVG and, where vl-convert-python is installed, as PNG.

    Args:
        runs: In the order of the report.
        directory: Where to; made if it is not there. Files of the same names are replaced.
        say: Language of titles and axes.

    Returns:
        The files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    to_png = _png_converter()
    figures = {figure.name: figure for figure in overlaid_figures(runs, say)}
    for number, run in enumerate(runs, 1):
        name = re.sub(r"[^\w.-]+", "_", run.name).strip("._") or "run"
        prefix = f"{number}-{name}" if len(runs) > 1 else name
        figures |= {f"{prefix}-{figure.name}": figure for figure in run_figures(run, say)}
    written = []
    for name, figure in figures.items():
        svg = standalone(figure, len(runs))
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
        log.warning(
            "Figures are written as SVG alone: PNG needs vl-convert-python; install it with: %s",
            install_command("report"),
        )
        return None
    return lambda svg: bytes(vl_convert.svg_to_png(svg, scale=PNG_SCALE))


def standalone(figure: Figure, num_runs: int = 1) -> str:
    """The drawing as a file of its own: with title, legend, colours (of so many runs) and a white ground."""
    width, height = figure.size
    legend: list[str] = []
    left, row = 2.0, 0
    for kind, text in figure.legend:
        taken = 28 + 7.2 * len(text) + 20
        if legend and left + taken > width + 20:  # without the distance to the next
            left, row = 2.0, row + 1
        at, high = f"M{left} {38 + 18 * row}h22", 42 + 18 * row
        legend.append(f'<path class="curve {kind}" d="{at}"/><text x="{left + 28}" y="{high}">{escape(text)}</text>')
        left += taken
    head = HEAD + 18 * row
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + head}" '
        f'viewBox="0 0 {width} {height + head}">',
        f'<style>{STYLE}{run_styles(num_runs)}</style><rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="2" y="20" class="title">{escape(figure.title)}</text>',
        *legend,
    ]
    drawing = figure.drawing.partition(">")[2].removesuffix("</svg>")
    return "".join([*parts, f'<g transform="translate(0 {head})">', drawing, "</g></svg>"])
