"""REFs to documents: `.txt`, `.jsonl`, `.csv` and `.parquet`, plain or compressed, the hub and the primer.

    REFs -> resolve_inputs -> a reader for each format: (number, record) -> _document -> Document

A reader holds one record at a time (Parquet: one small batch). Invalid bytes reach `_document` as lone surrogates, the
marks of `lines`; half a surrogate pair that JSON spells out is treated alike.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

from cartilha.corpus.document import Document
from cartilha.corpus.hub import read_hub
from cartilha.corpus.lines import (
    MARK_INVALID,
    explain_faults,
    known_encoding,
    open_seekable,
    read_lines,
    without_surrogates,
)
from cartilha.corpus.primer import read_primer
from cartilha.corpus.sources import HubSource, PrimerSource, Source, SourceFile, resolve_inputs
from cartilha.errors import UserError

__all__ = ["HubSource", "PrimerSource", "ReadCounts", "Source", "SourceFile", "read_documents", "resolve_inputs"]

DOMAIN_KEYS = ("domain", "genre", "source")
# Beyond any document, and small enough that a quote that is never closed does not fill the memory.
CSV_FIELD_LIMIT = 2**28
PARQUET_BATCH_ROWS = 256
PARQUET_BUFFER_BYTES = 2**20

Numbered = Iterator[tuple[int, Mapping[str, Any]]]


@dataclass
class ReadCounts:
    """What was read so far; filled while `read_documents` is consumed.

    Attributes:
        documents: Documents given out.
        empty: Records left out because their text is missing (null), empty or only whitespace.
        replaced_bytes_documents: Documents in whose text invalid bytes became U+FFFD.
    """

    documents: int = 0
    empty: int = 0
    replaced_bytes_documents: int = 0


@dataclass(frozen=True)
class _Settings:
    text_column: str
    encoding: str
    stop: bool  # at invalid bytes


@dataclass(frozen=True)
class _Origin:
    """How a source is called: in documents (`name`, `domain`) and in messages (`path`, and what it counts by)."""

    name: str
    domain: str
    path: str
    unit: str

    def at(self, number: int) -> str:
        return f"{self.path}, {self.unit} {number}"


def read_documents(
    refs: Sequence[str | Source],
    *,
    text_column: str = "text",
    encoding: str = "utf-8",
    invalid_bytes: Literal["stop", "replace"] = "stop",
    limit_documents: int | None = None,
    counts: ReadCounts | None = None,
) -> Iterator[Document]:
    r"""Stream the documents of REFs, in input order. Texts are never stripped; empty ones are left out and counted.

    A `.txt` file is one document a line, split at `\n` only (a `\r` before it is dropped). Mistakes in the arguments
    are raised at once, those in the files when they are reached.

    Args:
        refs: What to read (`resolve_inputs`).
        text_column: Key or column that holds the text, where records have keys.
        encoding: Of `.txt`, `.jsonl` and `.csv` files.
        invalid_bytes: What to do with bytes that the encoding does not allow, and with half surrogate pairs in JSON.
        limit_documents: Stop after this many documents.
        counts: Filled as documents are read.

    Raises:
        UserError: What was asked for cannot be read; the message names the place and the remedy.
    """
    if limit_documents is not None and limit_documents < 1:
        raise UserError(f"--limit_documents is {limit_documents}; give 1 or more, or leave it out to read everything.")
    settings = _Settings(text_column, known_encoding(encoding), stop=invalid_bytes == "stop")
    documents = _documents(resolve_inputs(refs), settings, ReadCounts() if counts is None else counts)
    return islice(documents, limit_documents)


def _documents(sources: list[Source], settings: _Settings, counts: ReadCounts) -> Iterator[Document]:
    for source in sources:
        if isinstance(source, PrimerSource):
            for document in read_primer():
                counts.documents += 1
                yield document
            continue
        origin, records = _open_source(source, settings)
        for number, record in records:
            found = _document(record, number, origin, settings, counts)
            if found is not None:
                counts.documents += 1
                yield found


def _open_source(source: SourceFile | HubSource, settings: _Settings) -> tuple[_Origin, Numbered]:
    if isinstance(source, HubSource):
        origin = _Origin(source.label, source.label, f"hf:{source.label}", "row")
        return origin, enumerate(read_hub(source), 1)
    unit = "line" if source.format in (".txt", ".jsonl", ".ndjson") else "row"
    # Names that are not valid UTF-8 come with surrogates from the file system.
    origin = _Origin(without_surrogates(source.path.name), without_surrogates(source.stem), str(source.path), unit)
    return origin, explain_faults(source, _READERS[source.format](source, origin, settings))


def _document(
    record: Mapping[str, Any], number: int, origin: _Origin, settings: _Settings, counts: ReadCounts
) -> Document | None:
    """The document in a record, or None where the text is empty, which is counted."""
    if settings.text_column not in record:
        _check_column(origin.at(number), settings.text_column, list(record))
    text = record[settings.text_column]
    if text is None or (isinstance(text, str) and (not text or text.isspace())):
        counts.empty += 1
        return None
    if not isinstance(text, str):
        raise UserError(
            f"{origin.at(number)}: {settings.text_column!r} holds a {type(text).__name__}, not a text;"
            " name the one with the text by --text_column."
        )
    clean = without_surrogates(text)
    if clean != text:
        if settings.stop:
            raise UserError(
                f"{origin.at(number)}: the text holds invalid bytes or half a surrogate pair, which is no character;"
                " mend it, or put U+FFFD in its place by --invalid_bytes replace."
            )
        counts.replaced_bytes_documents += 1
    # A text column that is called `source` or `id` says nothing about the document.
    labels = {key: record.get(key) for key in ("id", *DOMAIN_KEYS) if key != settings.text_column}
    domains = [value for key, value in labels.items() if key != "id" and isinstance(value, str) and value]
    given_id = labels.get("id")
    has_id = isinstance(given_id, (str, int)) and not isinstance(given_id, bool) and given_id != ""
    return Document(
        text=clean,
        id=without_surrogates(str(given_id)) if has_id else f"{origin.name}:{number}",
        source=origin.name,
        domain=without_surrogates(domains[0]) if domains else origin.domain,
    )


def _check_column(place: str, text_column: str, names: Sequence[str]) -> None:
    if names.count(text_column) == 1:
        return
    if text_column in names:
        raise UserError(f"{place} has more than one {text_column!r}; rename all but the one that holds the text.")
    there = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise UserError(
        f"{place} has no {text_column!r}, only: {there or 'nothing'};"
        " name the one that holds the text by --text_column."
    )


# One reader a format


def _read_txt(source: SourceFile, origin: _Origin, settings: _Settings) -> Numbered:
    for number, line in enumerate(read_lines(source, settings.encoding, settings.stop), 1):
        text = line[:-1].removesuffix("\r") if line.endswith("\n") else line
        yield number, {settings.text_column: text}


def _read_jsonl(source: SourceFile, origin: _Origin, settings: _Settings) -> Numbered:
    for number, line in enumerate(read_lines(source, settings.encoding, settings.stop), 1):
        if not line or line.isspace():  # empty: nothing but a byte-order mark
            yield number, {settings.text_column: None}
            continue
        try:
            record = json.loads(line.rstrip("\r\n"))  # the line's end would be named as the place of the fault
        except (ValueError, RecursionError) as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):  # its own words speak of line 1, whichever it is
                reason = f"{error.msg} at column {error.colno}"
            raise UserError(
                f"{origin.at(number)}: not valid JSON ({reason}); each line must be one JSON object: mend or remove"
                " this one."
            ) from None
        if not isinstance(record, dict):
            raise UserError(
                f"{origin.at(number)}: JSON, but not an object; each line must be an object with the key"
                f" {settings.text_column!r} (a file of plain texts is named .txt)."
            )
        yield number, record


def _read_csv(source: SourceFile, origin: _Origin, settings: _Settings) -> Numbered:
    csv.field_size_limit(CSV_FIELD_LIMIT)
    delimiter = "\t" if source.format == ".tsv" else ","
    rows = csv.reader(read_lines(source, settings.encoding, settings.stop), delimiter=delimiter, strict=True)
    number = 0
    try:
        header = [without_surrogates(name) for name in next(rows, [])]
        _check_column(f"{origin.path}, header", settings.text_column, header)
        for number, row in enumerate(rows, 1):
            if row and len(row) != len(header):
                raise UserError(
                    f"{origin.at(number)} (up to line {rows.line_num}) has {len(row)} fields where the header has"
                    f" {len(header)}; put quotes around fields that hold a comma, a tab or a line break."
                )
            yield number, dict(zip(header, row, strict=True)) if row else {settings.text_column: None}
    except csv.Error as error:
        raise UserError(
            f"{origin.at(number + 1)} (up to line {rows.line_num}): broken CSV ({error}); look for a stray or unclosed"
            ' quote there (a quote inside a quoted field is written twice: "").'
        ) from None


def _read_parquet(source: SourceFile, origin: _Origin, settings: _Settings) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # With Arrow's defaults a whole column chunk, often hundreds of megabytes, is held.
        buffering = {"buffer_size": PARQUET_BUFFER_BYTES, "pre_buffer": False}
        with open_seekable(source) as stream, pq.ParquetFile(stream, **buffering) as file:
            names = file.schema_arrow.names
            _check_column(origin.path, settings.text_column, names)
            columns = [name for name in names if name in {settings.text_column, "id", *DOMAIN_KEYS}]
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
                values = [_column_values(column) for column in batch.columns]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, dict(zip(batch.schema.names, row, strict=True))
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{source.path} cannot be read as Parquet ({reason}); copy, download or write it anew, or rename it if it"
            " is of another kind."
        ) from None


def _column_values(column: Any) -> list[Any]:
    """A column's values; strings are decoded here, since Arrow goes no further at invalid bytes."""
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return cast(list[Any], column.to_pylist())
    values = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", MARK_INVALID) for value in values]


_READERS: dict[str, Callable[[SourceFile, _Origin, _Settings], Numbered]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
