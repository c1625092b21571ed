"""JSON: an object a line, or a file of one array or of objects one after another."""

from __future__ import annotations

import io
import json
import re
from typing import Any

from cartilha.corpus import lines
from cartilha.corpus.files import open_file
from cartilha.corpus.lines import MARK_INVALID, Fault, too_long
from cartilha.corpus.records import Numbered, Part, Record

BLOCK_CHARS = 1 << 20

_BEFORE_ITEM = re.compile(r"\s*[\[,]?\s*")


def read_jsonl(part: Part) -> Numbered:
    """An object a line."""
    for number, line in part.lines():
        if isinstance(line, Fault):
            yield number, line
        elif not line or line.isspace():  # empty: nothing but a byte-order mark
            yield number, {part.settings.text_column: None}
        else:
            yield number, _parse_line(line, part, number)


def read_json(part: Part) -> Numbered:
    """A `.json` file: an object a line where its first line is an object, else an array or objects over many lines."""
    for _, line in part.lines(marks=True):
        if isinstance(line, Fault) or not line.isspace():
            is_lines = isinstance(line, str) and line.startswith("{") and line.rstrip().endswith("}")
            return read_jsonl(part) if is_lines else _read_values(part)
    return iter(())


def _parse_line(line: str, part: Part, number: int) -> Record:
    try:
        record = json.loads(line.rstrip("\r\n"))  # the line's end would be named as the place of the fault
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):  # its own words speak of line 1, whichever it is
            reason = f"{error.msg} at column {error.colno}"
        return Fault(
            "broken_json",
            f"{part.at(number)}: not valid JSON ({reason}); each line must be one JSON object: mend or remove this one,"
            " or leave such records out by --on_error skip.",
        )
    return _object(record, part, number, "line")


def _object(value: Any, part: Part, number: int, what: str) -> Record:
    if isinstance(value, dict):
        return value
    return Fault(
        "broken_json",
        f"{part.at(number)}: JSON, but not an object; each {what} must be an object with the key"
        f" {part.settings.text_column!r} (a file of plain texts is named .txt).",
    )


def _read_values(part: Part) -> Numbered:
    """The items of an array, or values one after another; what cannot be parsed stands for the rest of the file."""
    decode = json.JSONDecoder().raw_decode
    number, held, at, in_array = 0, "", 0, False
    with io.TextIOWrapper(open_file(part.source), part.settings.encoding, MARK_INVALID, newline="") as file:
        while True:
            before = _BEFORE_ITEM.match(held, at)
            assert before is not None  # it matches nothing, too
            opened = in_array or "[" in before.group()
            if opened and "," not in before.group() and held.startswith("]", before.end()):
                at, in_array = before.end() + 1, False
                continue
            try:
                value, end = decode(held, before.end())
            except (ValueError, RecursionError) as error:
                block = "" if len(held) - at > lines.MAX_DOCUMENT_BYTES else file.read(BLOCK_CHARS)
                if block:
                    held, at = held[at:] + (block if held else block.removeprefix("\ufeff")), 0
                    continue
                if len(held) - at > lines.MAX_DOCUMENT_BYTES:
                    yield number + 1, too_long(part.at(number + 1))
                elif in_array or held[at:].strip():
                    yield number + 1, _broken(part, error if before.end() < len(held) else "it ends too early", number)
                return
            number, at, in_array = number + 1, end, opened
            yield number, _object(value, part, number, "item" if in_array else "value")


def _broken(part: Part, error: Exception | str, number: int) -> Fault:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
    place = f"after record {number}" if number else "from its beginning"
    return Fault(
        "damaged_file",
        f"{part.source.path} is not valid JSON {place} ({reason}); write it anew as one array of objects, or as an"
        " object a line, or go on without the rest of it by --on_error skip.",
    )
