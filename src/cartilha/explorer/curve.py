"""The running perplexity of a text as an inline SVG, on a logarithmic axis, against the uniform model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from cartilha.explorer.wording import PageWording

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 88, 12, 36, 54
MAX_POINTS = 800


@dataclass(frozen=True)
class Curve:
    """One line of the chart.

    Attributes:
        name: `a`, `b` or `uniform`: its colour and stroke in the style sheet.
        label: What the legend calls it.
        chars: Characters of the text read so far, ascending.
        perplexity: Of that part of the text.
    """

    name: str
    label: str
    chars: np.ndarray
    perplexity: np.ndarray


def running_perplexity_chart(curves: Sequence[Curve], wording: PageWording) -> Markup:
    """The chart with its legend; every curve has at least one point."""
    finite = np.concatenate([curve.perplexity for curve in curves])
    finite = finite[np.isfinite(finite)]
    low, high = _decades(float(finite.min()), float(finite.max()))
    last = max(int(curve.chars[-1]) for curve in curves)

    def at_x(char: float) -> float:
        return round(LEFT + char / max(last, 1) * (WIDTH - LEFT - RIGHT), 1)

    def at_y(value: float) -> float:
        share = (math.log10(min(max(value, 10.0**low), 10.0**high)) - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    title = wording("curve_title")
    parts = [f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for decade in range(low, high + 1):
        y = at_y(10.0**decade)
        label = wording.number(10**decade)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y}" dy=".35em" class="end">{label}</text>')
    for char in _steps(last):
        parts.append(f'<text x="{at_x(char)}" y="{HEIGHT - BOTTOM + 22}" class="mid">{wording.number(char)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="2" y="18">{escape(wording("curve_y"))}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" class="end">{escape(wording("curve_x"))}</text>')
    for curve in curves:
        parts.append(_path(curve, at_x, at_y))
    parts.append("</svg>")
    legend = "".join(f'<span class="{curve.name}">{escape(curve.label)}</span>' for curve in curves)
    # Every text above is escaped.
    caption = f'<figcaption>{escape(title)}</figcaption><div class="legend">{legend}</div>'
    return Markup(f'<figure class="running">{caption}{"".join(parts)}</figure>')


def _path(curve: Curve, at_x: Callable[[float], float], at_y: Callable[[float], float]) -> str:
    chosen = np.unique(np.linspace(0, len(curve.chars) - 1, min(MAX_POINTS, len(curve.chars))).astype(int))
    points = [f"{at_x(float(curve.chars[i]))} {at_y(float(curve.perplexity[i]))}" for i in chosen]
    if len(points) == 1:
        x, y = points[0].split()
        return f'<circle class="{curve.name}" cx="{x}" cy="{y}" r="4"/>'
    return f'<path class="line {curve.name}" d="M{"L".join(points)}"/>'


def _decades(low: float, high: float) -> tuple[int, int]:
    """Powers of ten around the values, at least one apart and at most from 1 to 1,000,000."""
    first = max(0, math.floor(math.log10(max(low, 1.0))))
    last = min(6, math.ceil(math.log10(max(high, 1.0))))
    return first, max(last, first + 1)


def _steps(last: int) -> list[int]:
    """Round numbers from 0 to `last`: steps of 1, 2 or 5 times a power of ten, at most six of them."""
    sizes = (factor * 10**power for power in range(7) for factor in (1, 2, 5))
    step = next((size for size in sizes if last <= 6 * size), max(1, last))
    return list(range(0, last + 1, step))
