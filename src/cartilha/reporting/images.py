"""The figures of a report as files for slides: SVG as the page has them, and PNG."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import escape

from cartilha.errors import install_command
from cartilha.reporting.figures import Figure, run_figures
from cartilha.reporting.results import RunRecord
from cartilha.reporting.wording import Wording
from cartilha.storage import write_atomically

log = logging.getLogger("cartilha")

PNG_SCALE = 3.0  # 1,920 pixels for the widest: a slide's width
HEAD = 54  # height of title and legend above a drawing
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


def write_figures(runs: Sequence[RunRecord], directory: Path, say: Wording) -> list[Path]:
    """Write each figure of each run as SVG and, where vl-convert-python is installed, as PNG.

    Args:
        runs: In the order of the report.
        directory: Where to; made if it is not there. Files of the same names are replaced.
        say: Language of titles and axes.

    Returns:
        The files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    to_png = _png_converter()
    written = []
    for number, run in enumerate(runs, 1):
        name = re.sub(r"[^\w.-]+", "_", run.name).strip("._") or "run"
        prefix = f"{number}-{name}" if len(runs) > 1 else name
        for figure in run_figures(run, say):
            svg = standalone(figure)
            written.append(directory / f"{prefix}-{figure.name}.svg")
            write_atomically(written[-1], svg)
            if to_png is not None:
                written.append(directory / f"{prefix}-{figure.name}.png")
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


def standalone(figure: Figure) -> str:
    """The drawing as a file of its own: with title, legend, colours and a white ground."""
    found = re.match(r'<svg [^>]*viewBox="0 0 (\d+) (\d+)"[^>]*>', figure.drawing)
    assert found is not None, "line_chart writes the size"
    width, height = int(found[1]), int(found[2])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + HEAD}" '
        f'viewBox="0 0 {width} {height + HEAD}">',
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="2" y="20" class="title">{escape(figure.title)}</text>',
    ]
    left = 2.0
    for kind, text in figure.legend:
        parts.append(
            f'<path class="curve {kind}" d="M{left} 38h22"/><text x="{left + 28}" y="42">{escape(text)}</text>'
        )
        left += 28 + 7.2 * len(text) + 20
    drawing = figure.drawing[found.end() :].removesuffix("</svg>")
    return "".join([*parts, f'<g transform="translate(0 {HEAD})">', str(drawing), "</g></svg>"])
