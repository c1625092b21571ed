"""Tables for a terminal of any width: words wrap, numbers stay whole, and columns without room begin another table."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

LEAST_TEXT = 16  # a narrower column of words is hard to read

Cell = str | int | Text
Values = Mapping[str, Any]


@dataclass(frozen=True)
class FittingTable:
    """A table that rich prints in parts where it is wider than the terminal; each part repeats the first column.

    A row has one cell per column, without markup; whole numbers get thousands separators. An empty row is a rule. The
    columns `words` hold words, the others numbers, which are never broken.
    """

    titles: Sequence[str]
    rows: Iterable[Sequence[Cell]]
    words: Collection[int] = (0,)
    title: str = ""

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Table]:
        rows = [[_text(cell) for cell in row] for row in self.rows]
        columns = [[title, *(row[i].plain for row in rows if row)] for i, title in enumerate(self.titles)]
        least = [_longest(cells, words=i in self.words) for i, cells in enumerate(columns)]
        parts: list[list[int]] = [[0]]
        for i in range(1, len(columns)):
            if len(parts[-1]) > 1 and _room(options, [least[j] for j in (*parts[-1], i)]) < 0:
                parts.append([0])
            parts[-1].append(i)
        for part in parts:
            widths = {i: least[i] for i in part}
            wanted = {i: max(map(cell_len, columns[i])) - least[i] for i in part}
            for i in sorted(part, key=lambda i: wanted[i]):  # a column that lacks little gets all of it
                widths[i] += max(0, min(wanted[i], _room(options, widths.values())))
            table = Table(title=Text(self.title, "italic") if self.title else None)
            for i in part:
                table.add_column(Text(self.titles[i]), width=widths[i], overflow="fold")
                table.columns[-1].justify = "left" if i in self.words else "right"
            for row in rows:
                if row:
                    table.add_row(*(row[i] for i in part))
                else:
                    table.add_section()
            yield table


Parts = Iterator[FittingTable | str]  # what a command shows, one below the other


def markdown_table(markdown: str) -> Parts:
    """A Markdown table as a terminal's, and the text that follows it as it is."""
    lines = [line for line in markdown.splitlines() if line]
    cells = [
        [re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|")
    ]
    words = [i for i, rule in enumerate(cells[1]) if not rule.endswith(":")]
    yield FittingTable(cells[0], cells[2:], words)
    yield from (line for line in lines if not line.startswith("|"))


def _text(cell: Cell) -> Text:
    return cell if isinstance(cell, Text) else Text(f"{cell:,}" if isinstance(cell, int) else cell)


def _longest(cells: Sequence[str], *, words: bool) -> int:
    """The least width of a column: its numbers whole, its words and its heading wrapped."""
    heading = max(map(cell_len, cells[0].split()), default=0)
    longest = max(map(cell_len, cells[1:]), default=0)
    return max(1, min(heading, LEAST_TEXT), min(longest, LEAST_TEXT) if words else longest)


def _room(options: ConsoleOptions, widths: Iterable[int]) -> int:
    """How much of the terminal's width is left beside columns of these widths and their borders."""
    widths = list(widths)
    return options.max_width - sum(widths) - 3 * len(widths) - 1
