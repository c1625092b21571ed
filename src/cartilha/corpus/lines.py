"""Files to lines of text: decoded, and split at line feeds only; memory is bounded however long the lines are.

Bytes that the encoding does not allow become a `Fault` with line and offset, or are kept as marks: the decoder replaces
them by a lone surrogate, which no valid text contains, so that a record can be parsed before its text is judged.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, NamedTuple

from cartilha.corpus.files import SourceFile, open_file
from cartilha.errors import UserError
from cartilha.storage import LONE_SURROGATES

MARK_INVALID = "cartilha.mark"  # the name of the decoders' error handler below
BLOCK_CHARS = 1 << 20
MAX_DOCUMENT_BYTES = 16 << 20  # more than any document; the work on one takes some twenty times as much memory
LEAVE_OUT = "or leave such records out by --on_error skip."

_WINDOWS_MARKS = re.compile("[\udc80-\udc9f]")  # of bytes that Latin-1 text does not contain
# What UTF-8 makes of another encoding's byte-order mark; the longer one first, because it begins with the shorter.
_FOREIGN_MARKS = (("\udcff\udcfe\0\0", "utf-32"), ("\udcff\udcfe", "utf-16"), ("\udcfe\udcff", "utf-16"))


class Span(NamedTuple):
    """A part of a source that can be read alone; by default the whole.

    It begins with a byte (text files), a row group (Parquet) or a data file (hub), and its length is a number of lines,
    row groups or data files; None means up to the end. `num_bytes` is its size on the disk, 0 if not known.
    """

    begin: int = 0
    length: int | None = None
    first: int = 1  # the number of its first line or row
    num_bytes: int = 0


@dataclass(frozen=True)
class Fault:
    """What is wrong with one record, or with the rest of a file: a name to count it by, a sentence with the remedy."""

    reason: str
    message: str


def too_long(place: str) -> Fault:
    """The fault of a record that is longer than any document."""
    message = f"{place} is longer than {MAX_DOCUMENT_BYTES:,} bytes, which no document is; cut it into documents"
    return Fault("too_long", f"{message}, {LEAVE_OUT}")


def damaged(message: str) -> Fault:
    """The fault that stands for the rest of a file."""
    return Fault("damaged_file", f"{message}, or go on without the rest of it by --on_error skip.")


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Decode an invalid sequence as one lone surrogate that tells its first byte; `replace` would put one U+FFFD."""
    assert isinstance(error, UnicodeDecodeError)
    return chr(0xDC00 + error.object[error.start]), error.end


codecs.register_error(MARK_INVALID, _mark)


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each mark or half surrogate pair; the same object if there is none."""
    return text if _first_surrogate(text) is None else LONE_SURROGATES.sub("\ufffd", text)


def _first_surrogate(text: str) -> int | None:
    try:
        text.encode("utf-8")  # several times faster than a search
    except UnicodeEncodeError as error:
        return error.start
    return None


def read_lines(source: SourceFile, span: Span, encoding: str, marks: bool) -> Iterator[tuple[int, str | Fault]]:
    r"""Lines with their numbers, split at `\n` only, which all but perhaps the last end with; no byte-order mark.

    Exceptions of the system and the decompressors are left to the caller; a UserError says that the whole file is in
    another encoding. With `marks`, invalid bytes are kept as marks (`without_surrogates`), otherwise such a line is a
    fault. `encoding` is the usual name, as Python has it.
    """
    with open_file(source) as stream:
        if span.begin:
            stream.seek(span.begin)
        for number, line in enumerate(islice(_lines(stream, source, encoding), span.length), span.first):
            if line is None:
                yield number, too_long(f"{source.path}, line {number}")
                continue
            if number == 1:
                if encoding == "utf-8":
                    _refuse_foreign_encoding(line, source)
                line = line.removeprefix("\ufeff")
            yield number, line if marks else invalid_bytes(line, number, source, encoding) or line


def _lines(stream: IO[bytes], source: SourceFile, encoding: str) -> Iterator[str | None]:
    """The lines, perhaps with marks; None stands for one that is too long, of which only a part is held at a time."""
    with io.TextIOWrapper(stream, encoding, MARK_INVALID, newline="\n") as file:
        try:
            while line := file.readline(MAX_DOCUMENT_BYTES):
                if len(line) == MAX_DOCUMENT_BYTES and not line.endswith("\n"):
                    while (rest := file.readline(BLOCK_CHARS)) and not rest.endswith("\n"):
                        pass
                    yield None
                else:
                    yield line
        except UnicodeError as error:  # UTF-16 and UTF-32 without the mark that tells the byte order
            raise UserError(
                f"{source.path} cannot be read as {encoding} ({error}); say --encoding {encoding}-le or {encoding}-be."
            ) from None


def _refuse_foreign_encoding(line: str, source: SourceFile) -> None:
    """Recognise UTF-16 and UTF-32 by their marks, or by a NUL in every other byte of the first line."""
    place = f"{source.path}, line 1"
    for mark, encoding in _FOREIGN_MARKS:
        if line.startswith(mark):
            raise UserError(f"{place}: the byte-order mark is that of {encoding.upper()}; say --encoding {encoding}.")
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        nuls, others = line[first:1000:2], line[1 - first : 1000 : 2]
        if len(nuls) >= 8 and nuls.count("\0") > 0.8 * len(nuls) and others.count("\0") < 0.2 * len(others):
            raise UserError(f"{place}: every other byte is NUL, as in UTF-16; perhaps say --encoding {encoding}.")


def invalid_bytes(line: str, number: int, source: SourceFile, encoding: str) -> Fault | None:
    """The fault of a line that holds marks of invalid bytes; None for other lines."""
    position = _first_surrogate(line)
    if position is None:
        return None
    # UTF-16 and UTF-32 begin every encoded string with a byte-order mark, even an empty one.
    offset = len(line[:position].encode(encoding, "replace")) - len("".encode(encoding))
    # Latin-1 has controls where Windows-1252 has dashes and curly quotes.
    likely = "utf-8" if encoding != "utf-8" else "cp1252" if _WINDOWS_MARKS.search(line) else "latin-1"
    return Fault(
        "invalid_bytes",
        f"{source.path}, line {number}: byte 0x{ord(line[position]) - 0xDC00:02X} at offset {offset} of the line is not"
        f" valid {encoding}; name another (perhaps --encoding {likely}), put U+FFFD there by --invalid_bytes replace,"
        f" {LEAVE_OUT}",
    )
