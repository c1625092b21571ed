"""Values from files that anything may have written: a value of another type counts as absent.

A reader is a function from any value to one of its type, or to None or something empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cartilha.errors import counted
from cartilha.storage import parse_json

Reader = Callable[[Any], Any]


class Record(SimpleNamespace):
    """An object of a JSON file, with its keys as attributes."""


def number(value: Any) -> float | None:
    """A finite number."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def integer(value: Any) -> int | None:
    """A finite number, cut to a whole one."""
    found = number(value)
    return None if found is None else int(found)


def text(value: Any) -> str | None:
    """A text."""
    return value if isinstance(value, str) else None


def mapping(value: Any) -> dict[str, Any]:
    """A mapping; empty if the value is none."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """A list; empty if the value is none."""
    return value if isinstance(value, list) else []


def interval(value: Any) -> tuple[float, ...] | None:
    """Two finite bounds."""
    bounds = many(number)(value)
    return bounds if len(bounds) == len(items(value)) == 2 else None


def record(**readers: Reader) -> Callable[[Any], Record]:
    """A reader of objects with these keys; a value that is no object counts as an empty one."""

    def read(value: Any) -> Record:
        found = mapping(value)
        return Record(**{key: reader(found.get(key)) for key, reader in readers.items()})

    return read


def many(reader: Reader) -> Callable[[Any], tuple[Any, ...]]:
    """A reader of lists of such values, which leaves out those that are absent."""
    return lambda value: tuple(found for item in items(value) if (found := reader(item)) is not None)


def by_name(reader: Reader) -> Callable[[Any], dict[str, Any]]:
    """A reader of objects with any keys and such values."""
    return lambda value: {key: reader(item) for key, item in mapping(value).items()}


def read_text(path: Path, missing: list[str]) -> str | None:
    """A file's text; if there is no such file, its name joins `missing`."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")  # a torn line may end inside a character
    except OSError:
        missing.append(path.name)
        return None


def read_object(path: Path, missing: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file; if there is none, `missing` says so."""
    if (found := read_text(path, missing)) is None:
        return None
    if (value := _object(found)) is None:
        missing.append(f"{path.name} (not readable)")
    return value


def read_lines(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; lines that a kill or a full disk tore are left out and counted."""
    lines = (read_text(path, missing) or "").split("\n")
    found = [_object(line) for line in lines if line.strip()]
    records = [record for record in found if record is not None]
    if torn := len(found) - len(records):
        missing.append(f"{path.name}: {counted(torn, 'unreadable line')}")
    return records


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
