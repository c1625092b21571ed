"""Plain text: one document per line, paragraph or file; and where files of lines can be cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from cartilha.corpus import lines
from cartilha.corpus.files import SourceFile
from cartilha.corpus.lines import Fault, Span, too_long
from cartilha.corpus.records import FilePart, Numbered, ReadSettings, Record

COUNT_BYTES = 4 << 20

_BETWEEN_DOCUMENTS = {"line": re.compile(rb"\n"), "paragraph": re.compile(rb"\n[ \t\r]*\n"), "file": None}
# Encodings in which the byte 0x0A is always a line feed, so that bytes can be cut there.
_CUT_AT_LINE_FEEDS = re.compile(r"utf-8|ascii|iso8859-\d+|cp125\d|cp437|cp850|cp860|koi8-\w|mac-\w+")


def read_txt(part: FilePart) -> Numbered:
    """The documents of a `.txt` file; paragraphs are numbered by their first lines."""
    if part.settings.text_unit == "file":
        yield _joined(part, part.lines())
    elif part.settings.text_unit == "paragraph":
        yield from (_joined(part, block) for is_blank, block in groupby(part.lines(), _is_blank) if not is_blank)
    else:
        for number, line in part.lines():
            if isinstance(line, Fault):
                yield number, line
            else:
                text = _without_end(line)
                yield number, {part.settings.text_column: text} if part.marks else text


def _is_blank(numbered: tuple[int, str | Fault]) -> bool:
    line = numbered[1]
    return isinstance(line, str) and (not line or line.isspace())


def _joined(part: FilePart, numbered: Iterable[tuple[int, str | Fault]]) -> tuple[int, Record]:
    """The lines as one document, in which line ends are kept, or the first fault; and the first line's number."""
    is_file = part.settings.text_unit == "file"
    held: list[str] = []
    first = num_chars = 0
    for number, line in numbered:
        first = first or number
        if isinstance(line, Fault):
            return first, line
        held.append(line)
        num_chars += len(line)
        if num_chars > lines.MAX_DOCUMENT_BYTES:
            return first, too_long(str(part.source.path) if is_file else part.at(first))
    text = "".join(held)
    return first or 1, {part.settings.text_column: text if is_file else _without_end(text)}


def _without_end(text: str) -> str:
    return text[:-1].removesuffix("\r") if text.endswith("\n") else text


def cut_lines(source: SourceFile, settings: ReadSettings, target_bytes: int) -> Iterator[Span]:
    """Cut between documents, unless the file is one; it is read once to count its lines."""
    between = _BETWEEN_DOCUMENTS[settings.text_unit if source.format == ".txt" else "line"]
    if between is None or not _CUT_AT_LINE_FEEDS.fullmatch(settings.encoding):
        yield Span(num_bytes=source.size_bytes)
        return
    begin, first, position, num_lines = 0, 1, 0, 0  # `num_lines` from `begin` up to `position`
    with source.path.open("rb") as stream:
        while block := stream.read(COUNT_BYTES):
            offset = 0
            # A part ends at the first end of a document at or beyond the target.
            while found := between.search(block, max(offset, begin + target_bytes - 1 - position)):
                cut = found.end()
                if position + cut >= source.size_bytes:
                    break
                num_lines += block.count(b"\n", offset, cut)
                yield Span(begin, num_lines, first, position + cut - begin)
                begin, first, num_lines, offset = position + cut, first + num_lines, 0, cut
            num_lines += block.count(b"\n", offset)
            position += len(block)
    yield Span(begin, None, first, source.size_bytes - begin)
