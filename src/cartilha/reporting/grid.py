"""Grids of coloured cells as SVG: who sees whom in a block, and what rows of text are filled with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from markupsafe import Markup

from cartilha.reporting.chart import RUN_COLOURS, Drawing, run_class
from cartilha.reporting.pages import environment

WIDTH, ABOVE, BELOW = 640, 26, 30  # of the whole drawing; of the labels above and below the cells


@dataclass(frozen=True)
class Grid(Drawing):
    """Rows of cells; a cell is the number of its colour, or -1 for an empty one. All rows are equally long."""

    name: str
    title: str
    cells: Sequence[Sequence[int]]
    x: str  # labels of the axes
    y: str
    legend: Sequence[tuple[str, str]] = ()
    row_height: float | None = None  # by default cells are squares

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell."""
        width = WIDTH / max(map(len, self.cells))
        return width, self.row_height or width

    @property
    def size(self) -> tuple[int, int]:  # type: ignore[override]
        """Width and height of the drawing."""
        return WIDTH, round(len(self.cells) * self.cell[1]) + ABOVE + BELOW

    @cached_property
    def drawing(self) -> Markup:
        """Neighbours of one colour are one rectangle, so that the file stays small."""
        width, height = self.cell
        rectangles = []
        for row, values in enumerate(self.cells):
            at = 0
            for value, cells in groupby(values):
                length = len(list(cells))
                if value >= 0:
                    place = (at * width, ABOVE + row * height, length * width, height)
                    rectangles.append((run_class(value % len(RUN_COLOURS)), *(round(x, 2) for x in place)))
                at += length
        template = environment().get_template("grid.svg.j2")
        return Markup(template.render(figure=self, rectangles=rectangles, above=ABOVE, below=BELOW))
