"""Typed values from files that anything may have written: a value of another type counts as absent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from cartilha.errors import counted
from cartilha.storage import parse_json

T = TypeVar("T")


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
    """A mapping with its keys as texts; empty if the value is no mapping."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """A list; empty if the value is no list."""
    return value if isinstance(value, list) else []


def interval(value: Any) -> tuple[float, float] | None:
    """Two finite bounds."""
    bounds = [number(bound) for bound in items(value)]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        return None
    return bounds[0], bounds[1]


_PLAIN = {int: integer, float: number, str: text, Any: lambda value: value, tuple[float, float]: interval}


def fill(cls: type[T], raw: Any, **ready: Any) -> T:
    """A record from a mapping, each field read by its declared type: None or empty if there is no such value.

    Args:
        cls: A dataclass of numbers, texts, other such dataclasses, and tuples or mappings of them.
        raw: Any value; one that is no mapping counts as an empty mapping.
        ready: Fields whose values are given and not read.
    """
    source = raw if isinstance(raw, dict) else {}
    types = _types(cls)  # type: ignore[arg-type]
    return cls(**{name: _reader(types[name])(source.get(name)) for name in types if name not in ready}, **ready)


@cache
def _types(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


@cache
def _reader(wanted: Any) -> Callable[[Any], Any]:
    """The function that reads a value of that type."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if isinstance(wanted, type) and is_dataclass(wanted):
        return partial(fill, wanted)
    if origin is UnionType:  # `X | None`
        read = _reader(arguments[0])
        return (lambda value: read(value) if isinstance(value, dict) else None) if is_dataclass(arguments[0]) else read
    if origin is Mapping:
        read = _reader(arguments[1])
        return lambda value: {key: read(item) for key, item in mapping(value).items()}
    if origin is tuple and arguments[1] is Ellipsis:
        read = _reader(arguments[0])
        return lambda value: tuple(found for item in items(value) if (found := read(item)) is not None)
    return _PLAIN[wanted]


def read_text(path: Path, missing: list[str]) -> str | None:
    """A file's text; if there is no such file, its name joins `missing`."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")  # a torn line may end inside a character
    except OSError:
        missing.append(path.name)
        return None


def read_object(path: Path, missing: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file; if there is none, `missing` says so."""
    found = read_text(path, missing)
    value = None if found is None else _object(found)
    if found is not None and value is None:
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
