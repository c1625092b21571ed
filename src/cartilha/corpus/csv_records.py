"""CSV and TSV: what separates the fields, whether quotes enclose them, and rows joined out of several lines."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count

from cartilha.corpus import lines
from cartilha.corpus.lines import LEAVE_OUT, Fault, invalid_bytes, too_long
from cartilha.corpus.records import FilePart, JoinedLines, Numbered, missing_column
from cartilha.errors import counted

HEAD_CHARS = 4 << 20  # of a file, in which its way of quoting must show

_QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"')


class _CsvLines:
    """Feeds a CSV parser, and remembers the lines of the current record.

    A quote that is never closed swallows the lines up to the next quote. Of such a record only the first line is left
    out: the parser begins again with the second.
    """

    def __init__(self, part: FilePart) -> None:
        self._part = part
        self._lines = part.lines(marks=True)
        self._again: list[str] = []
        self._held: list[str] = []
        self._held_chars = 0
        self.first_line = self.line = 0
        self.fault: Fault | None = None  # invalid bytes in this record

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._again:
            line = self._again.pop()
        else:
            _, read = next(self._lines)
            line = "" if isinstance(read, Fault) else read
            self._held_chars += lines.MAX_DOCUMENT_BYTES + 1 if isinstance(read, Fault) else len(line)
        self.line += 1
        self._held.append(line)
        if self.is_too_long:
            raise csv.Error
        if not self._part.marks and self.fault is None:
            self.fault = invalid_bytes(line, self.line, self._part.source, self._part.settings.encoding)
        return line

    @property
    def is_too_long(self) -> bool:
        return self._held_chars > lines.MAX_DOCUMENT_BYTES

    def next_record(self) -> None:
        self._held.clear()
        self._held_chars = 0
        self.fault = None
        self.first_line = self.line + 1

    def begin_again(self) -> None:
        self.line -= len(self._held) - 1
        self._again += reversed(self._held[1:])
        self.next_record()


def read_csv(part: FilePart) -> Numbered:
    """The rows of a file with a header."""
    csv.field_size_limit(lines.MAX_DOCUMENT_BYTES)
    feed = _CsvLines(part)
    delimiter = _delimiter(part)
    if quotes_are_plain(part):
        rows: Iterator[list[str]] = map(partial(_split, delimiter), feed)  # a `map` continues after an exception
    else:
        rows = csv.reader(feed, delimiter=delimiter, strict=True)
    text_column = part.settings.text_column
    header: list[str] | None = None
    for number in count():  # the header is 0
        feed.next_record()
        try:
            row = next(rows, None)
        except csv.Error as error:
            place = part.at(number)
            yield number, too_long(place) if feed.is_too_long else _broken_csv(place, feed, str(error))
            feed.begin_again()
            continue
        if feed.fault:
            yield number, feed.fault
        elif header is None:
            header = [lines.without_surrogates(name) for name in row or []]
            fault = missing_column(f"{part.source.path}, header", text_column, header)
            if fault:
                yield 0, fault
                return
        elif row is None:
            return
        elif row and len(row) != len(header):
            fields = f"{counted(len(row), 'field')} where the header has {len(header)}"
            yield number, _broken_csv(part.at(number), feed, fields)
            feed.begin_again()
        elif not row:
            yield number, {text_column: None}
        else:
            record = dict(zip(header, row, strict=True))
            yield number, record if feed.line == feed.first_line else JoinedLines(record)


def _split(delimiter: str, line: str) -> list[str]:
    text = line.rstrip("\r\n")
    return text.split(delimiter) if text else []


def _delimiter(part: FilePart) -> str:
    """What is asked for; else a tab in `.tsv`, and in `.csv` the first sign that gives the header the text's column."""
    if part.settings.csv_delimiter != "auto":
        return part.settings.csv_delimiter
    if part.source.format == ".tsv":
        return "\t"
    _, header = next(part.lines(marks=True), (1, ""))
    for sign in ",;\t|":
        with suppress(csv.Error):  # a header that is not CSV with this sign; the reader reports it
            if isinstance(header, str) and part.settings.text_column in next(csv.reader([header], delimiter=sign), []):
                return sign
    return ","


def quotes_are_plain(part: FilePart) -> bool:
    """Whether quotes are ordinary characters; where `csv_quoting` is `auto`, told from the head of the file.

    They are in TSV if more lines with the header's number of fields hold a field that only begins with a quote than
    there are lines with another number, of which every quoted line break makes at least one.
    """
    if part.settings.csv_quoting != "auto":
        return part.settings.csv_quoting == "none"
    if _delimiter(part) != "\t":
        return False
    width = num_chars = evidence = 0
    for _, line in part.lines(marks=True):
        fields = _split("\t", line) if isinstance(line, str) else []
        width = width or len(fields)
        if len(fields) == width:
            evidence += any(field.startswith('"') and not _QUOTED_FIELD.fullmatch(field) for field in fields)
        elif fields:
            evidence -= 1
        num_chars += len(line) if isinstance(line, str) else HEAD_CHARS
        if num_chars > HEAD_CHARS:
            break
    return width > 1 and evidence > 0


def _broken_csv(place: str, feed: _CsvLines, reason: str) -> Fault:
    of_file = f"line {feed.first_line}" if feed.line == feed.first_line else f"lines {feed.first_line} to {feed.line}"
    return Fault(
        "broken_csv",
        f"{place} ({of_file}): broken CSV ({reason}); look for a stray or unclosed quote there (inside quotes, one is"
        f" written twice), say --csv_quoting none if quotes are plain characters, {LEAVE_OUT}",
    )
