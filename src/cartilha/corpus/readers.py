"""REFs to documents: `.txt`, `.jsonl`, `.csv` and `.parquet`, plain or compressed, the hub and the primer.

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
from typing import Any, Literal

from cartilha.corpus import lines
from cartilha.corpus.document import Document
from cartilha.corpus.formats import DOMAIN_KEYS, Numbered, Part, missing_column, read_records
from cartilha.corpus.hub import read_hub
from cartilha.corpus.lines import Fault, known_encoding, refuse_changed, too_long, without_surrogates
from cartilha.corpus.primer import read_primer
from cartilha.corpus.sources import HubSource, PrimerSource, Source, SourceFile, resolve_inputs
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


@dataclass(frozen=True)
class ReadSettings:
    """How records become documents.

    Attributes:
        text_column: Key or column that holds the text, where records have keys.
        encoding: Of `.txt`, `.jsonl` and `.csv` files; any of the names that Python knows it by.
        invalid_bytes: `replace` puts U+FFFD for bytes that the encoding does not allow and for half surrogate pairs in
            JSON, and counts the documents; with `stop` they are a fault like others.
        on_error: `stop` at the first faulty record, or `skip` it and count it by its reason.
        text_unit: Whether a `.txt` file is a document a `line` or one document (`file`).

    Raises:
        UserError: There is no such encoding.
    """

    text_column: str = "text"
    encoding: str = "utf-8"
    invalid_bytes: Literal["stop", "replace"] = "stop"
    on_error: Literal["stop", "skip"] = "stop"
    text_unit: Literal["line", "file"] = "line"

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoding", known_encoding(self.encoding))


@dataclass
class ReadCounts:
    """What was read so far; filled while documents are consumed.

    Attributes:
        documents: Documents given out.
        empty: Records left out because their text is missing (null), empty or only whitespace.
        replaced_bytes_documents: Documents in whose text invalid bytes became U+FFFD.
        nul_documents: Documents that hold NUL characters, which are kept.
        skipped: Faulty records left out, by reason; `damaged_file` stands for the rest of a file.
        first_skipped: The message of the first one of each reason.
    """

    documents: int = 0
    empty: int = 0
    replaced_bytes_documents: int = 0
    nul_documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)

    def add(self, other: ReadCounts) -> None:
        """Add what another reader counted; in the order of the pieces, so that the first messages are the same."""
        self.documents += other.documents
        self.empty += other.empty
        self.replaced_bytes_documents += other.replaced_bytes_documents
        self.nul_documents += other.nul_documents
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
    *,
    text_column: str = "text",
    encoding: str = "utf-8",
    invalid_bytes: Literal["stop", "replace"] = "stop",
    on_error: Literal["stop", "skip"] = "stop",
    text_unit: Literal["line", "file"] = "line",
    limit_documents: int | None = None,
    counts: ReadCounts | None = None,
) -> Iterator[Document]:
    r"""Stream the documents of REFs, in input order. Texts are never stripped; empty ones are left out and counted.

    A `.txt` file is one document a line, split at `\n` only (a `\r` before it is dropped). Mistakes in the arguments
    are raised at once, those in the files when they are reached.

    Args:
        refs: What to read (`resolve_inputs`).
        text_column: As in `ReadSettings`, like the next four.
        encoding: The same.
        invalid_bytes: The same.
        on_error: The same.
        text_unit: The same.
        limit_documents: Stop after this many documents.
        counts: Filled as documents are read.

    Raises:
        UserError: What was asked for cannot be read; the message names the place and the remedy.
    """
    if limit_documents is not None and limit_documents < 1:
        raise UserError(f"--limit_documents is {limit_documents}; give 1 or more, or leave it out to read everything.")
    settings = ReadSettings(text_column, encoding, invalid_bytes, on_error, text_unit)
    pieces = [Piece(source) for source in resolve_inputs(refs)]
    found = ReadCounts() if counts is None else counts
    documents = (document for piece in pieces for document in read_piece(piece, settings, found))
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
    marks = settings.invalid_bytes == "replace"
    whole = settings.text_unit == "file"
    part = Part(source, piece.begin, piece.end, piece.first, settings.text_column, settings.encoding, marks, whole)
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
