"""Tables for a terminal of any width: words wrap, numbers stay whole, and columns without room begin another table."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

LEAST_TEXT = 16  # narrower columns of words are slivers

Cell = str | Text


def show_table(
    console: Console,
    titles: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    words: Collection[int] = (0,),
    title: str = "",
) -> None:
    """Print a table, in parts where it is wider than the terminal; each part repeats the first column.

    Args:
        console: Where it is printed.
        titles: A heading a column.
        rows: A cell a column, taken as they are (no markup); an empty row is a line across.
        words: Which columns hold words; the others hold numbers, which are never broken.
        title: Stands above.
    """
    rows = list(rows)
    columns = [[title, *(str(row[i]) for row in rows if row)] for i, title in enumerate(titles)]
    least = [_longest(cells, words=i in words) for i, cells in enumerate(columns)]
    parts: list[list[int]] = [[0]]
    for i in range(1, len(columns)):
        if len(parts[-1]) > 1 and _room(console, [least[j] for j in (*parts[-1], i)]) < 0:
            parts.append([0])
        parts[-1].append(i)
    for part in parts:
        widths = {i: least[i] for i in part}
        wanted = {i: max(map(cell_len, columns[i])) - least[i] for i in part}
        for i in sorted(part, key=lambda i: wanted[i]):  # what lacks little is given all of it
            widths[i] += max(0, min(wanted[i], _room(console, widths.values())))
        table = Table(title=Text(title, "italic") if title else None)
        for i in part:
            table.add_column(
                Text(titles[i]), width=widths[i], justify="left" if i in words else "right", overflow="fold"
            )
        for row in rows:
            if row:
                table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in (row[i] for i in part)))
            else:
                table.add_section()
        console.print(table)


def show_markdown_table(console: Console, markdown: str) -> None:
    """Print Markdown's table as the terminal's, and what follows it as it is."""
    lines = markdown.splitlines()
    cells = [
        [re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|")
    ]
    words = [i for i, rule in enumerate(cells[1]) if not rule.endswith(":")]
    show_table(console, cells[0], cells[2:], words=words)
    for line in lines:
        if line and not line.startswith("|"):
            console.print(line, markup=False)


def _longest(cells: Sequence[str], *, words: bool) -> int:
    """The least width of a column: its numbers whole, its words and its heading wrapped."""
    heading = max(map(cell_len, cells[0].split()), default=0)
    longest = max(map(cell_len, cells[1:]), default=0)
    return max(1, min(heading, LEAST_TEXT), min(longest, LEAST_TEXT) if words else longest)


def _room(console: Console, widths: Iterable[int]) -> int:
    """How much of the terminal's width is left beside columns of these widths and their borders."""
    widths = list(widths)
    return console.width - sum(widths) - 3 * len(widths) - 1
