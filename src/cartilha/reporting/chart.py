"""Line charts as inline SVG, without a script; the page's style sheet has the colours, for the dark mode too."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from cartilha.reporting.pages import PACKAGE, environment, template_file

Floats = npt.NDArray[np.float64]
# Colours that tell runs apart, on the light page and on the dark one.
RUN_COLOURS = ("#2f7fc1", "#c8690f", "#2e9462", "#9a6bc9", "#d2505a", "#1f93a3", "#8c8417", "#7d8288")
MAX_POINTS = 600  # about one per pixel; the page's size then does not grow with the run's length
HEAD = 54  # height of the title and one row of legend above a drawing in a file of its own


@dataclass(frozen=True)
class Series:
    """One curve of a chart.

    The style sheet gives its class (`train`, `validation`, a `run_class`) colour and stroke. With `tips`, one text per
    point, the points are drawn and carry these as tooltips.
    """

    css_class: str
    xs: Sequence[float] | Floats
    ys: Sequence[float] | Floats
    tips: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """An axis; `other` is a second label and writing of the same ticks, which the page shows instead on request."""

    label: str
    tick: Callable[[float, int], str]  # writes a value with so many decimals
    from_zero: bool = False
    whole: bool = False
    other: tuple[str, Callable[[float], str]] | None = None
    names: Sequence[tuple[float, str]] = ()  # ticks at these places only, each with its text

    def ticks(self, values: Floats) -> list[tuple[float, str]]:
        """Places and texts of the ticks that cover these values."""
        if self.names:
            return list(self.names)
        places, decimals = ticks(0.0 if self.from_zero else float(values.min()), float(values.max()), whole=self.whole)
        return [(place, self.tick(place, decimals)) for place in places]


class Drawing(ABC):
    """What pages show and files hold; `name` is for its file, `legend` has the class of each curve and what it is."""

    name: str
    title: str
    legend: Sequence[tuple[str, str]]
    size: tuple[int, int]  # width and height

    @property
    @abstractmethod
    def drawing(self) -> Markup:
        """An SVG element without colours of its own."""

    def standalone(self, num_runs: int = len(RUN_COLOURS)) -> str:
        """The drawing as a file of its own, with title, legend, the colours of `num_runs` runs and a white ground."""
        legend: list[tuple[str, str, float, int]] = []
        left, row = 2.0, 0
        for kind, text in self.legend:
            taken = 28 + 7.2 * len(text) + 20
            if legend and left + taken > self.size[0] + 20:  # the last entry needs no space behind it
                left, row = 2.0, row + 1
            legend.append((kind, text, left, 38 + 18 * row))
            left += taken
        return (
            environment()
            .get_template("figure.svg.j2")
            .render(
                figure=self,
                style=Markup(template_file(PACKAGE, "figure.css") + run_styles(num_runs)),
                legend=legend,
                head=HEAD + 18 * row,
                drawing=Markup(self.drawing.partition(">")[2].removesuffix("</svg>")),
            )
        )

    def _repr_svg_(self) -> str:
        """Notebooks show the drawing below its cell."""
        return self.standalone()


@dataclass(frozen=True)
class Figure(Drawing):
    """A chart of curves."""

    name: str
    title: str
    series: Sequence[Series]
    x: Axis
    y: Axis
    legend: Sequence[tuple[str, str]] = ()
    size: tuple[int, int] = (640, 340)

    @cached_property
    def drawing(self) -> Markup:
        """An SVG that scales with its container; the y label stands above the axis, the x label below it."""
        all_x = np.concatenate([np.asarray(one.xs, dtype=np.float64) for one in self.series])
        all_y = np.concatenate([np.asarray(one.ys, dtype=np.float64) for one in self.series])
        x_ticks, y_ticks = self.x.ticks(all_x), self.y.ticks(all_y)
        (width, height), left, top = self.size, max(62, 12 + 7 * max(len(text) for _, text in y_ticks)), 40
        right, bottom = width - 18, height - 56
        x_low, x_high = min(x_ticks[0][0], float(all_x.min())), float(all_x.max())
        if x_high == x_low:
            x_high = x_low + 1
        at_x = _scale(x_low, x_high, left, right)
        at_y = _scale(y_ticks[0][0], y_ticks[-1][0], bottom, top)
        curves = []
        for one in self.series:
            places = [(at_x(float(x)), at_y(float(y))) for x, y in zip(one.xs, one.ys, strict=True)]
            curves.append((one, places, "L".join(f"{x} {y}" for x, y in places)))
        template = environment().get_template("chart.svg.j2")
        drawing = template.render(
            figure=self,
            other=self.y.other,
            x_ticks=[(at_x(value), text) for value, text in x_ticks if value <= x_high],
            y_ticks=[(at_y(value), value, text) for value, text in y_ticks],
            curves=curves,
            left=left,
            right=right,
            bottom=bottom,
        )
        return Markup(drawing)


def run_class(number: int) -> str:
    """The class of the curve of a page's run, counted from 0; after eight runs the colours repeat, dashed."""
    return f"run{number}"


def run_styles(num_runs: int) -> str:
    """Style rules for the curves of so many runs."""
    rules = []
    for number in range(num_runs):
        colour, name = RUN_COLOURS[number % len(RUN_COLOURS)], run_class(number)
        dash = "stroke-dasharray: 6 4; " if number >= len(RUN_COLOURS) else ""
        curve = f"path.{name} {{ stroke: {colour}; stroke-width: 2; {dash}}}"
        rules.append(f"{curve} circle.{name}, rect.{name} {{ fill: {colour}; }}")
    return "\n".join(rules)


def smooth(ys: Floats) -> Floats:
    """Mean over a centred window of about a fiftieth of the curve, shorter at its ends: it adds no lag."""
    reach = len(ys) // 100
    sums = np.concatenate([[0.0], np.cumsum(ys)])
    index = np.arange(len(ys))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(ys))
    return np.asarray((sums[high] - sums[low]) / (high - low), dtype=np.float64)


def thin(values: Floats) -> Floats:
    """At most `MAX_POINTS` values: means of neighbours, so that no part of the curve is skipped."""
    if len(values) <= MAX_POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, MAX_POINTS)])


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> tuple[list[float], int]:
    """Round values that cover low to high in steps of 1, 2 or 5, and the decimals that they need."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= span * 0.999)
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [index * step for index in range(first, max(last, first + 1) + 1)], decimals


def _scale(low: float, high: float, first: int, last: int) -> Callable[[float], float]:
    """Values from `low` to `high` as places from `first` to `last`."""
    return lambda value: round(first + (value - low) / (high - low) * (last - first), 1)
