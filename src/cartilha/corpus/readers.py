"""REFs to documents: files of any of the `formats`, the hub and the primer.

    REFs -> resolve_inputs -> pieces of sources (shards) -> a reader for each format: (number, record) -> Document

What is a document, what it is called and what is wrong with it depend on its file alone, not on how the file was cut.
Invalid bytes reach `_document` as lone surrogates, the marks of `lines`; half a surrogate pair that JSON spells out is
treated alike. Faulty records stop the reading, or are left out and counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from cartilha.corpus import lines
from cartilha.corpus.document import Document
from cartilha.corpus.files import SourceFile, refuse_changed
from cartilha.corpus.formats import format_of, read_records
from cartilha.corpus.hints import log_hints
from cartilha.corpus.hub import read_hub
from cartilha.corpus.lines import Fault, too_long, without_surrogates
from cartilha.corpus.primer import read_primer
from cartilha.corpus.records import DOMAIN_KEYS, JoinedLines, Numbered, Part, ReadSettings, missing_column
from cartilha.corpus.sources import HubSource, PrimerSource, Source, resolve_inputs
from cartilha.errors import UserError

__all__ = [
    "HubSource",
    "Piece",
    "PrimerSource",
    "ReadCounts",
    "ReadSettings",
    "Source",
    "SourceFile",
    "read_documents",
    "read_piece",
    "resolve_inputs",
]


@dataclass
class ReadCounts:
    """What was read so far; filled while documents are consumed.

    Attributes:
        documents: Documents given out.
        empty: Records left out because their text is missing (null), empty or only whitespace.
        replaced_bytes_documents: Documents in whose text invalid bytes became U+FFFD.
        nul_documents: Documents that hold NUL characters, which are kept.
        joined_rows: Rows of CSV and TSV whose quotes joined several lines.
        first_joined: Where the first of them is.
        skipped: Faulty records left out, by reason; `damaged_file` stands for the rest of a file.
        first_skipped: The message of the first one of each reason.
    """

    documents: int = 0
    empty: int = 0
    replaced_bytes_documents: int = 0
    nul_documents: int = 0
    joined_rows: int = 0
    first_joined: str = ""
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)

    def add(self, other: ReadCounts) -> None:
        """Add what another reader counted; in the order of the pieces, so that the first messages are the same."""
        self.documents += other.documents
        self.empty += other.empty
        self.replaced_bytes_documents += other.replaced_bytes_documents
        self.nul_documents += other.nul_documents
        self.joined_rows += other.joined_rows
        self.first_joined = self.first_joined or other.first_joined
        self.skipped.update(other.skipped)
        self.first_skipped = other.first_skipped | self.first_skipped


@dataclass(frozen=True)
class Piece:
    """A part of a source that can be read by itself: the same documents, ids and messages as in the whole.

    Attributes:
        source: Where it is from.
        begin: First byte (text files), row group (Parquet) or data file (hub).
        end: The one after the last; None for the end of the source.
        first: Number of its first line or row.
    """

    source: Source
    begin: int = 0
    end: int | None = None
    first: int = 1


@dataclass(frozen=True)
class _Origin:
    """How a source is called: in documents (`name`, `domain`) and in messages (`path`, and what it counts by)."""

    name: str
    domain: str
    path: str
    unit: str

    def at(self, number: int | str) -> str:
        return f"{self.path}, {self.unit} {number}"


def read_documents(
    refs: Sequence[str | Source],
    settings: ReadSettings | None = None,
    *,
    limit_documents: int | None = None,
    counts: ReadCounts | None = None,
) -> Iterator[Document]:
    r"""Stream the documents of REFs, in input order. Texts are never stripped; empty ones are left out and counted.

    A `.txt` file is one document a line, split at `\n` only (a `\r` before it is dropped). Mistakes in the arguments
    are raised at once, those in the files when they are reached.

    Args:
        refs: What to read (`resolve_inputs`).
        settings: How; default `ReadSettings()`.
        limit_documents: Stop after this many documents.
        counts: Filled as documents are read.

    Raises:
        UserError: What was asked for cannot be read; the message names the place and the remedy.
    """
    if limit_documents is not None and limit_documents < 1:
        raise UserError(f"--limit_documents is {limit_documents}; give 1 or more, or leave it out to read everything.")
    reading = settings or ReadSettings()
    sources = resolve_inputs(refs)
    if any(isinstance(ref, str) for ref in refs):  # who resolves them before gives the hints once
        log_hints(sources, reading)
    found = ReadCounts() if counts is None else counts
    documents = (document for source in sources for document in read_piece(Piece(source), reading, found))
    return islice(documents, limit_documents)


def read_piece(piece: Piece, settings: ReadSettings, counts: ReadCounts) -> Iterator[Document]:
    """Stream the documents of a piece, in order.

    Args:
        piece: What to read.
        settings: How.
        counts: Filled as documents are read.

    Raises:
        UserError: It cannot be read, or changed since its source was found; the message names place and remedy.
    """
    if isinstance(piece.source, PrimerSource):
        for document in read_primer():
            counts.documents += 1
            yield document
        return
    if isinstance(piece.source, SourceFile):
        refuse_changed(piece.source)
    origin, records = _open(piece, settings)
    for number, record in records:
        found = record if isinstance(record, Fault) else _document(record, number, origin, settings, counts)
        if isinstance(found, Fault):
            if settings.on_error == "stop":
                raise UserError(found.message)
            counts.skipped[found.reason] += 1
            counts.first_skipped.setdefault(found.reason, found.message)
        elif found is not None:
            counts.documents += 1
            yield found
    if isinstance(piece.source, SourceFile):
        refuse_changed(piece.source)


def _open(piece: Piece, settings: ReadSettings) -> tuple[_Origin, Numbered]:
    source = piece.source
    if isinstance(source, HubSource):
        origin = _Origin(source.label, source.label, f"hf:{source.label}", "row")
        return origin, read_hub(source, piece.begin, piece.end)
    assert isinstance(source, SourceFile)
    part = Part(source, piece.begin, piece.end, piece.first, format_of(source).unit, settings)
    # Names that are not valid UTF-8 come with surrogates from the file system.
    origin = _Origin(without_surrogates(source.path.name), without_surrogates(source.stem), str(source.path), part.unit)
    return origin, read_records(part)


def _document(
    record: str | Mapping[str, Any], number: int | str, origin: _Origin, settings: ReadSettings, counts: ReadCounts
) -> Document | Fault | None:
    """The document in a record, or None where the text is empty, which is counted."""
    if isinstance(record, str):
        text: Any = record
        labels: Mapping[str, Any] = {}
    elif settings.text_column in record:
        text, labels = record[settings.text_column], record
        if isinstance(record, JoinedLines):
            counts.joined_rows += 1
            counts.first_joined = counts.first_joined or origin.at(number)
    else:
        return missing_column(origin.at(number), settings.text_column, list(record))
    if text is None or (isinstance(text, str) and (not text or text.isspace())):
        counts.empty += 1
        return None
    if not isinstance(text, str):
        return Fault(
            "no_text",
            f"{origin.at(number)}: {settings.text_column!r} holds a {type(text).__name__}, not a text;"
            " name the one with the text by --text_column.",
        )
    if len(text) > lines.MAX_DOCUMENT_BYTES:
        return too_long(origin.at(number))
    clean = text if text is record else without_surrogates(text)
    if clean != text:
        if settings.invalid_bytes == "stop":
            return Fault(
                "invalid_bytes",
                f"{origin.at(number)}: the text holds invalid bytes or half a surrogate pair, which is no character;"
                " mend it, put U+FFFD in its place by --invalid_bytes replace, or leave such records out by --on_error"
                " skip.",
            )
        counts.replaced_bytes_documents += 1
    if "\0" in clean:
        counts.nul_documents += 1
    if len(labels) <= 1:  # nothing beside the text
        return Document(clean, f"{origin.name}:{number}", origin.name, origin.domain)
    # A text column that is called `source` or `id` says nothing about the document.
    labels = {key: labels.get(key) for key in ("id", *DOMAIN_KEYS) if key != settings.text_column}
    domains = [value for key, value in labels.items() if key != "id" and isinstance(value, str) and value]
    given_id = labels.get("id")
    has_id = isinstance(given_id, (str, int)) and not isinstance(given_id, bool) and given_id != ""
    return Document(
        text=clean,
        id=without_surrogates(str(given_id)) if has_id else f"{origin.name}:{number}",
        source=origin.name,
        domain=without_surrogates(domains[0]) if domains else origin.domain,
    )
