"""REFs to documents: files of any of the `formats`, datasets of the hub, and the primer.

A document, its name and its faults depend on its file alone, not on how the file was cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any, Self

from cartilha.config import VocabConfig
from cartilha.corpus import lines
from cartilha.corpus.document import Document
from cartilha.corpus.domains import domain_keys
from cartilha.corpus.files import SourceFile, refuse_changed
from cartilha.corpus.formats import file_part, read_records
from cartilha.corpus.hints import log_hints
from cartilha.corpus.hub import opened, read_hub
from cartilha.corpus.lines import LEAVE_OUT, Fault, Span, too_long, without_surrogates
from cartilha.corpus.primer import read_primer
from cartilha.corpus.records import JoinedLines, Numbered, ReadSettings, missing_column
from cartilha.corpus.sources import HubSource, PrimerSource, Source, resolve_inputs
from cartilha.errors import UserError


@dataclass
class ReadCounts:
    """What has been read so far; filled while documents are consumed."""

    documents: int = 0
    empty: int = 0  # records left out because their text is missing (null), empty or only white space
    replaced_bytes_documents: int = 0  # in whose text invalid bytes became U+FFFD
    nul_documents: int = 0
    joined_rows: int = 0  # rows of CSV and TSV whose quotes joined several lines
    first_joined: str = ""  # its place
    skipped: Counter[str] = field(default_factory=Counter)  # faulty records left out, by reason
    first_skipped: dict[str, str] = field(default_factory=dict)  # the message of the first of each reason

    def add(self, other: Self) -> None:
        """Add what another reader counted; in the order of the parts, so that the first messages are the same."""
        for name, number in vars(other).items():
            if isinstance(number, int):
                setattr(self, name, getattr(self, name) + number)
        self.first_joined = self.first_joined or other.first_joined
        self.skipped.update(other.skipped)
        self.first_skipped = other.first_skipped | self.first_skipped


@dataclass(frozen=True)
class SourcePart:
    """A part of a source that can be read alone, with the same documents, ids and messages as in the whole."""

    source: Source
    span: Span = Span()


@dataclass(frozen=True)
class _Origin:
    """How a source is called: in documents (`name`, and a `domain` for those that name none) and in messages."""

    name: str
    domain: str
    path: str
    unit: str
    domain_keys: tuple[str, ...] = ()


def read_documents(
    refs: Sequence[str | Source], settings: ReadSettings | None = None, counts: ReadCounts | None = None
) -> Iterator[Document]:
    r"""Stream the documents of REFs (`resolve_inputs`), in the order of the input; `counts` is filled as they are read.

    Texts are never stripped; empty ones are left out and counted. A `.txt` file is one document per line, split at `\n`
    only (a `\r` before it is dropped). A UserError names the place of what cannot be read, and the remedy: at once if
    the arguments are wrong, those in the files when they are reached.
    """
    reading = settings or ReadSettings()
    found = ReadCounts() if counts is None else counts
    sources = resolve_inputs(refs)
    if any(isinstance(ref, str) for ref in refs):  # callers that resolved them before have logged the hints
        log_hints(sources, reading)
    return (document for source in sources for document in read_part(SourcePart(source), reading, found))


def first_documents(documents: Iterable[Document], max_chars: int) -> Iterator[Document]:
    """The documents up to the one with which they have `max_chars` characters in all."""
    num_chars = 0
    for document in documents:
        yield document
        num_chars += len(document.text)
        if num_chars >= max_chars:
            return


def input_documents(config: VocabConfig) -> Iterator[Document]:
    """Stream the documents of `--input`, up to `--limit_documents`; a UserError says that there is none."""
    sources, settings = opened(resolve_inputs(config.input)), ReadSettings.of(config)
    log_hints(sources, settings)
    documents = islice(read_documents(sources, settings), config.limit_documents)
    first = next(documents, None)
    if first is None:
        raise no_text(config.input)
    yield first
    yield from documents


def no_text(refs: Sequence[str]) -> UserError:
    """The error for an input without a document."""
    return UserError(f"The input holds no text ({', '.join(refs)}); check the files and --text_column.")


def read_part(part: SourcePart, settings: ReadSettings, counts: ReadCounts) -> Iterator[Document]:
    """Stream the documents of a part; a UserError says that it cannot be read, or changed since it was found."""
    if isinstance(part.source, PrimerSource):
        for document in read_primer(part.source.language):
            counts.documents += 1
            yield document
        return
    if isinstance(part.source, SourceFile):
        refuse_changed(part.source)
    origin, records = _open(part, settings)
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
    if isinstance(part.source, SourceFile):
        refuse_changed(part.source)


def read_raw(source: Source, settings: ReadSettings) -> Iterator[tuple[str, str | Mapping[str, Any]]]:
    """Stream the records of a source with their places as ids; a UserError says what is wrong with one."""
    if isinstance(source, PrimerSource):
        yield from ((document.id, document.text) for document in read_primer(source.language))
        return
    origin, records = _open(SourcePart(source), settings)
    for number, record in records:
        if isinstance(record, Fault):
            raise UserError(record.message)
        yield f"{origin.name}:{number}", record


def _open(part: SourcePart, settings: ReadSettings) -> tuple[_Origin, Numbered]:
    source, span = part.source, part.span
    if isinstance(source, HubSource):
        origin = _Origin(source.label, source.label, source.ref, "row")
        records = read_hub(source, span)
    else:
        assert isinstance(source, SourceFile)
        to_read = file_part(source, settings, span)
        records = read_records(to_read)
        # Names that are not valid UTF-8 come with surrogates from the file system.
        names = without_surrogates(source.name), without_surrogates(source.domain)
        origin = _Origin(*names, str(source.path), to_read.unit)
        if source.format == ".txt":
            if settings.text_unit == "file" and source.domain == source.stem:  # the stem would be of one document only
                folder = without_surrogates(source.path.absolute().parent.name)
                origin = replace(origin, domain=folder or origin.domain)
            return origin, records
        if span.begin or span.length is not None:
            return replace(origin, domain_keys=_keys_of_file(source, settings)), records
    keys, records = domain_keys(records, settings, origin.path)
    return replace(origin, domain_keys=keys), records


@lru_cache(maxsize=64)
def _keys_of_file(source: SourceFile, settings: ReadSettings) -> tuple[str, ...]:
    """The keys of the whole file, for a part of it."""
    return _open(SourcePart(source), settings)[0].domain_keys


def _document(
    record: str | Mapping[str, Any], number: int | str, origin: _Origin, settings: ReadSettings, counts: ReadCounts
) -> Document | Fault | None:
    """The document in a record, or None if the text is empty, which is counted."""
    place = f"{origin.path}, {origin.unit} {number}"
    labels: Mapping[str, Any] = {} if isinstance(record, str) else record
    text: Any = record
    if not isinstance(record, str):
        if settings.text_column not in record:
            return missing_column(place, settings.text_column, list(record))
        text = record[settings.text_column]
        if isinstance(record, JoinedLines):
            counts.joined_rows += 1
            counts.first_joined = counts.first_joined or place
        if settings.domain_column in origin.domain_keys and settings.domain_column not in record and text:
            return missing_column(place, settings.domain_column, list(record), "domain")
    if text is None or (isinstance(text, str) and (not text or text.isspace())):
        counts.empty += 1
        return None
    if not isinstance(text, str):
        kind = type(text).__name__
        return Fault(
            "no_text", f"{place}: {settings.text_column!r} holds a {kind}, no text; give another --text_column."
        )
    if len(text) > lines.MAX_DOCUMENT_BYTES:
        return too_long(place)
    clean = text if text is record else without_surrogates(text)
    if clean != text:
        if settings.invalid_bytes == "stop":
            return Fault(
                "invalid_bytes",
                f"{place}: the text holds invalid bytes or half a surrogate pair, which is not a"
                f" character; correct it, put U+FFFD in its place by --invalid_bytes replace, {LEAVE_OUT}",
            )
        counts.replaced_bytes_documents += 1
    counts.nul_documents += "\0" in clean
    named = settings.domain_column is not None
    domains = [_label(labels, key) for key in origin.domain_keys if named or isinstance(labels.get(key), str)]
    # A text column that is called `id` says nothing about the document.
    given_id = _label(labels, "id") if settings.text_column != "id" else ""
    domain = next(filter(None, domains), origin.domain)
    return Document(clean, given_id or f"{origin.name}:{number}", origin.name, domain)


def _label(record: Mapping[str, Any], key: str) -> str:
    """A text or number under a key; empty if there is none."""
    value = record.get(key)
    is_label = isinstance(value, (str, int)) and not isinstance(value, bool)
    return without_surrogates(str(value)) if is_label else ""
