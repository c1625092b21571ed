"""One reader a format: a file, or a part of one, to numbered records.

A record is a mapping of column to value, a text alone that is known to be valid, or a `Fault` where it cannot be
read. A reader holds one record at a time (Parquet: one small batch). Invalid bytes reach a mapping as lone surrogates,
the marks of `lines`.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from cartilha.corpus import lines
from cartilha.corpus.lines import MARK_INVALID, Fault, open_seekable, read_lines, too_long
from cartilha.corpus.sources import SourceFile
from cartilha.errors import UserError

DOMAIN_KEYS = ("domain", "genre", "source")
PARQUET_BATCH_ROWS = 256
PARQUET_BATCH_BYTES = 8 << 20  # of the text column; at least one row is read at a time
PARQUET_BUFFER_BYTES = 2**20

Record = str | Mapping[str, Any] | Fault
Numbered = Iterator[tuple[int | str, Record]]  # the hub's rows are numbered within data files: "2:15"


@dataclass(frozen=True)
class Part:
    """What to read of a file, and how.

    Attributes:
        source: The file.
        begin: First byte of the part; in Parquet first row group.
        end: Byte or row group after it; None for the end of the file.
        first: Number of its first line or row.
        text_column: Key or column that holds the text.
        encoding: Of text files, as `known_encoding` gives it.
        marks: Keep invalid bytes as marks; otherwise the line is a fault.
        whole: A `.txt` file is one document, not one a line.
    """

    source: SourceFile
    begin: int
    end: int | None
    first: int
    text_column: str
    encoding: str
    marks: bool
    whole: bool

    @property
    def unit(self) -> str:
        """What messages count by."""
        return "line" if self.source.format in (".txt", ".jsonl", ".ndjson") else "row"

    def at(self, number: int) -> str:
        """A place for messages."""
        return f"{self.source.path}, {self.unit} {number}"

    def lines(self, marks: bool | None = None) -> Iterator[tuple[int, str | Fault]]:
        """Its lines, numbered."""
        return read_lines(
            self.source,
            self.encoding,
            begin=self.begin,
            end=self.end,
            first=self.first,
            marks=self.marks if marks is None else marks,
        )


def read_records(part: Part) -> Numbered:
    """The records of a part of a file; the last may be a fault that stands for the rest of it.

    Raises:
        UserError: The file cannot be opened.
    """
    reader = _READERS[".txt whole" if part.whole and part.source.format == ".txt" else part.source.format]
    number: int | str = 0
    try:
        for number, record in reader(part):
            yield number, record
    except (EOFError, zlib.error, OSError) as error:
        system = error.strerror if isinstance(error, OSError) else None  # decompressors set none
        place = f"{part.source.path} cannot be read" + (f" after {part.unit} {number}" if number else "")
        if system:
            remedy = "change its permissions" if isinstance(error, PermissionError) else "check the file and the disk"
            raise UserError(f"{place} ({system}); {remedy}.") from error
        yield (
            number,
            Fault(
                "damaged_file",
                f"{place} ({error}); it is damaged or cut off: copy or download it again, or go on without the"
                " rest of it by --on_error skip.",
            ),
        )


def missing_column(place: str, text_column: str, names: Sequence[str]) -> Fault | None:
    """The fault of a record or file that does not have the column of the text exactly once."""
    if names.count(text_column) == 1:
        return None
    if text_column in names:
        message = f"{place} has more than one {text_column!r}; rename all but the one that holds the text."
        return Fault("no_text_column", message)
    there = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    message = (
        f"{place} has no {text_column!r}, only: {there or 'nothing'};"
        " name the one that holds the text by --text_column."
    )
    return Fault("no_text_column", message)


def _read_txt(part: Part) -> Numbered:
    for number, line in part.lines():
        if isinstance(line, Fault):
            yield number, line
        else:
            text = line[:-1].removesuffix("\r") if line.endswith("\n") else line
            yield number, {part.text_column: text} if part.marks else text


def _read_whole(part: Part) -> Numbered:
    """A file as one document; its line ends stay as they are."""
    text: list[str] = []
    num_chars = 0
    for _, line in part.lines():
        if isinstance(line, str):
            text.append(line)
            num_chars += len(line)
        if isinstance(line, Fault) or num_chars > lines.MAX_DOCUMENT_BYTES:
            yield 1, line if isinstance(line, Fault) else too_long(str(part.source.path))
            return
    yield 1, {part.text_column: "".join(text)}


def _read_jsonl(part: Part) -> Numbered:
    for number, line in part.lines():
        if isinstance(line, Fault):
            yield number, line
        elif not line or line.isspace():  # empty: nothing but a byte-order mark
            yield number, {part.text_column: None}
        else:
            yield number, _json_record(line, part, number)


def _json_record(line: str, part: Part, number: int) -> Record:
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
    if not isinstance(record, dict):
        return Fault(
            "broken_json",
            f"{part.at(number)}: JSON, but not an object; each line must be an object with the key"
            f" {part.text_column!r} (a file of plain texts is named .txt).",
        )
    return record


class _CsvLines:
    """Feeds a CSV parser and remembers the lines of the record that it is in, so that it can begin again after one.

    A quote that is never closed swallows the lines up to the next quote. Where such a record is left out, only its
    first line is: the parser begins again with the second.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._lines = part.lines(marks=True)
        self._again: list[str] = []
        self._held: list[str] = []
        self._held_chars = 0
        self.first_line = self.line = 0
        self.fault: Fault | None = None  # of the bytes of this record

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
        if self._held_chars > lines.MAX_DOCUMENT_BYTES:
            raise _TooLongError
        if not self._part.marks and self.fault is None:
            judged = lines.judged(line, self.line, self._part.source, self._part.encoding)
            self.fault = judged if isinstance(judged, Fault) else None
        return line

    def next_record(self) -> None:
        """A record was read: what follows is another."""
        self._held.clear()
        self._held_chars = 0
        self.fault = None
        self.first_line = self.line + 1

    def begin_again(self) -> None:
        """Take the lines after the faulty record's first once more."""
        self.line -= len(self._held) - 1
        self._again += reversed(self._held[1:])
        self.next_record()


class _TooLongError(Exception):
    """A record is longer than any document."""


def _read_csv(part: Part) -> Numbered:
    csv.field_size_limit(lines.MAX_DOCUMENT_BYTES)
    feed = _CsvLines(part)
    rows = csv.reader(feed, delimiter=_delimiter(part), strict=True)
    header: list[str] | None = None
    number = -1
    while True:
        number += 1
        feed.next_record()
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield number, _broken_csv(part, number, feed, str(error))
            feed.begin_again()
            continue
        except _TooLongError:
            yield number, too_long(part.at(number))
            feed.begin_again()
            continue
        if feed.fault:
            yield number, feed.fault
        elif header is None:
            header = [lines.without_surrogates(name) for name in row or []]
            fault = missing_column(f"{part.source.path}, header", part.text_column, header)
            if fault:
                yield 0, fault
                return
        elif row is None:
            return
        elif row and len(row) != len(header):
            yield number, _broken_csv(part, number, feed, f"{len(row)} fields where the header has {len(header)}")
            feed.begin_again()
        else:
            yield number, dict(zip(header, row, strict=True)) if row else {part.text_column: None}


def _delimiter(part: Part) -> str:
    """A semicolon where the header has the text's column so, as spreadsheets write it where the comma is decimal."""
    if part.source.format == ".tsv":
        return "\t"
    _, header = next(part.lines(marks=True), (1, ""))
    if isinstance(header, Fault) or ";" not in header:
        return ","
    by_sign = {sign: next(csv.reader([header], delimiter=sign), []) for sign in ",;"}
    return ";" if part.text_column in by_sign[";"] and part.text_column not in by_sign[","] else ","


def _broken_csv(part: Part, number: int, feed: _CsvLines, reason: str) -> Fault:
    place = f"line {feed.first_line}" if feed.line == feed.first_line else f"lines {feed.first_line} to {feed.line}"
    return Fault(
        "broken_csv",
        f"{part.at(number)} ({place}): broken CSV ({reason}); look for a stray or unclosed quote there: put quotes"
        ' around fields that hold a comma, a tab or a line break, and write a quote inside them twice (""),'
        " or leave such records out by --on_error skip.",
    )


def _read_parquet(part: Part) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = part.first - 1
    try:
        # With Arrow's defaults a whole column chunk, often hundreds of megabytes, is held.
        buffering = {"buffer_size": PARQUET_BUFFER_BYTES, "pre_buffer": False}
        with open_seekable(part.source) as stream, pq.ParquetFile(stream, **buffering) as file:
            names = file.schema_arrow.names
            fault = missing_column(str(part.source.path), part.text_column, names)
            if fault:
                yield 0, fault
                return
            columns = [name for name in names if name in {part.text_column, "id", *DOMAIN_KEYS}]
            groups = range(part.begin, file.num_row_groups if part.end is None else part.end)
            rows = min(
                [PARQUET_BATCH_ROWS, *(_batch_rows(file.metadata.row_group(n), part.text_column) for n in groups)]
            )
            for batch in file.iter_batches(batch_size=rows, columns=columns, row_groups=list(groups)):
                values = [_column_values(column) for column in batch.columns]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, dict(zip(batch.schema.names, row, strict=True))
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        place = f" after row {number}" if number else ""
        yield (
            number,
            Fault(
                "damaged_file",
                f"{part.source.path} cannot be read as Parquet{place} ({reason}); copy, download or write it anew,"
                " rename it if it is of another kind, or go on without the rest of it by --on_error skip.",
            ),
        )


def _batch_rows(group: Any, text_column: str) -> int:
    """Rows of a row group whose texts are about `PARQUET_BATCH_BYTES`, if its rows are of one length."""
    columns = [group.column(number) for number in range(group.num_columns)]
    num_bytes = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)
    num_rows: int = group.num_rows * PARQUET_BATCH_BYTES // max(1, num_bytes)
    return max(1, num_rows)


def row_group_sizes(source: SourceFile) -> list[tuple[int, int]]:
    """Rows and bytes of the row groups of an uncompressed Parquet file; empty where it cannot be read as one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(source.path)
    except (pa.ArrowException, OSError):
        return []
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    # The text is not the only column, but usually nearly all of the file.
    return [
        (group.num_rows, sum(group.column(i).total_compressed_size for i in range(group.num_columns)))
        for group in groups
    ]


def _column_values(column: Any) -> list[Any]:
    """A column's values; strings are decoded here, since Arrow goes no further at invalid bytes."""
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return cast(list[Any], column.to_pylist())
    values = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", MARK_INVALID) for value in values]


_READERS: dict[str, Callable[[Part], Numbered]] = {
    ".txt": _read_txt,
    ".txt whole": _read_whole,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
