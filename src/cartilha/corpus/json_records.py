"""JSON: one object per line, or a file of one array or of objects one after another."""

from __future__ import annotations

import io
import json
import re
from typing import Any

from cartilha.corpus import lines
from cartilha.corpus.files import open_file
from cartilha.corpus.lines import LEAVE_OUT, MARK_INVALID, Fault, damaged, too_long
from cartilha.corpus.records import FilePart, Numbered, Record

BLOCK_CHARS = 1 << 20

_BEFORE_ITEM = re.compile(r"\s*[\[,]?\s*")


def read_jsonl(part: FilePart) -> Numbered:
    """One object per line."""
    for number, line in part.lines():
        if isinstance(line, Fault):
            yield number, line
        elif not line or line.isspace():  # empty: nothing but a byte-order mark
            yield number, {part.settings.text_column: None}
        else:
            yield number, _parse_line(line, part, number)


def read_json(part: FilePart) -> Numbered:
    """A `.json` file: if its first line is an object, one object per line; else an array or objects over many lines."""
    for _, line in part.lines(marks=True):
        if isinstance(line, Fault) or not line.isspace():
            is_lines = isinstance(line, str) and line.startswith("{") and line.rstrip().endswith("}")
            return read_jsonl(part) if is_lines else _read_values(part)
    return iter(())


def _parse_line(line: str, part: FilePart, number: int) -> Record:
    try:
        record = json.loads(line.rstrip("\r\n"))  # the line's end would be named as the place of the fault
    except (ValueError, RecursionError) as error:
        # The decoder's own words name line 1, whichever it is.
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        return Fault(
            "broken_json",
            f"{part.at(number)}: not valid JSON ({reason}); correct or remove this line, {LEAVE_OUT}",
        )
    return _object(record, part, number)


def _object(value: Any, part: FilePart, number: int) -> Record:
    if isinstance(value, dict):
        return value
    return Fault("broken_json", f"{part.at(number)}: JSON, but not an object; give one, or plain texts in a .txt file.")


def _read_values(part: FilePart) -> Numbered:
    """The items of an array, or values one after another; a value that cannot be parsed ends the file."""
    decode = json.JSONDecoder().raw_decode
    number, held, at, in_array = 0, "", 0, False
    with io.TextIOWrapper(open_file(part.source), part.settings.encoding, MARK_INVALID, newline="") as file:
        while True:
            before = _BEFORE_ITEM.match(held, at)
            assert before is not None  # it matches the empty string, too
            opened = in_array or "[" in before.group()
            if opened and "," not in before.group() and held.startswith("]", before.end()):
                at, in_array = before.end() + 1, False
                continue
            try:
                value, end = decode(held, before.end())
            except (ValueError, RecursionError) as error:
                is_long = len(held) - at > lines.MAX_DOCUMENT_BYTES
                block = "" if is_long else file.read(BLOCK_CHARS)
                if block:
                    held, at = held[at:] + (block if held else block.removeprefix("\ufeff")), 0
                    continue
                if is_long:
                    yield number + 1, too_long(part.at(number + 1))
                elif in_array or held[at:].strip():
                    yield number + 1, _broken(part, error if before.end() < len(held) else "it ends too early", number)
                return
            number, at, in_array = number + 1, end, opened
            yield number, _object(value, part, number)


def _broken(part: FilePart, error: Exception | str, number: int) -> Fault:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
    place = f"after record {number}" if number else "from its beginning"
    return damaged(f"{part.source.path} is not valid JSON {place} ({reason}); write it anew as one array of objects")
