"""Files to lines of text: decoded and split at line feeds only, a block at a time.

Bytes that the encoding does not allow become a `Fault` with line and offset, or are kept as marks: the decoder puts a
lone surrogate, which no valid text contains, in their place, so that a record is taken apart before its text is judged.
Memory is bounded by `MAX_DOCUMENT_BYTES` whatever the lengths of the lines.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from cartilha.corpus.files import SourceFile, open_file
from cartilha.errors import UserError
from cartilha.storage import LONE_SURROGATES

MARK_INVALID = "cartilha.mark"  # the name of the decoders' error handler below
BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 16 << 20  # beyond any document; the work on one takes some twenty times as much memory

_WINDOWS_MARKS = re.compile("[\udc80-\udc9f]")  # of bytes that Latin-1 text does not hold
# What UTF-8 makes of another encoding's byte-order mark; the longer one first, for it begins with the shorter.
_FOREIGN_MARKS = (("\udcff\udcfe\0\0", "utf-32"), ("\udcff\udcfe", "utf-16"), ("\udcfe\udcff", "utf-16"))
# Encodings in which the byte 0x0A is a line feed and nothing else, so that bytes can be cut there.
_CUT_AT_LINE_FEEDS = re.compile(r"utf-8|ascii|iso8859-\d+|cp125\d|cp437|cp850|cp860|koi8-\w|mac-\w+")


@dataclass(frozen=True)
class Fault:
    """What is wrong with one record, or with the rest of a file.

    Attributes:
        reason: The name under which it is counted where faulty records are left out.
        message: One sentence with the place and the remedy.
    """

    reason: str
    message: str


def known_encoding(encoding: str) -> str:
    """The encoding's usual name; UTF-8 with a byte-order mark is UTF-8, since the mark is dropped anyway.

    Raises:
        UserError: There is no such text encoding.
    """
    try:
        "\n".encode(encoding)  # a codec that is no text encoding (rot13, hex) fails here
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError):
        raise UserError(f"{encoding!r} is no text encoding that Python knows; try utf-8, latin-1 or utf-16.") from None
    return "utf-8" if name == "utf-8-sig" else name


def can_be_cut(encoding: str) -> bool:
    """Whether a file in this encoding can be cut at any byte 0x0A, so that its parts are read apart."""
    return _CUT_AT_LINE_FEEDS.fullmatch(encoding) is not None


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Decode an invalid sequence as one lone surrogate that tells its first byte, where `replace` puts one U+FFFD."""
    assert isinstance(error, UnicodeDecodeError)
    return chr(0xDC00 + error.object[error.start]), error.end


codecs.register_error(MARK_INVALID, _mark)


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each mark or half surrogate pair; the same object where there is none."""
    return text if _first_surrogate(text) is None else LONE_SURROGATES.sub("\ufffd", text)


def _first_surrogate(text: str) -> int | None:
    try:
        text.encode("utf-8")  # several times faster than a search
    except UnicodeEncodeError as error:
        return error.start
    return None


def too_long(place: str) -> Fault:
    """The fault of a record that is longer than any document."""
    size = f"{MAX_DOCUMENT_BYTES >> 20} MiB" if MAX_DOCUMENT_BYTES >= 1 << 20 else f"{MAX_DOCUMENT_BYTES} bytes"
    return Fault(
        "too_long",
        f"{place} is longer than {size}, which no document is; cut it into documents, or leave out what is too long"
        " by --on_error skip.",
    )


def read_lines(
    source: SourceFile, encoding: str, *, begin: int = 0, end: int | None = None, first: int = 1, marks: bool = False
) -> Iterator[tuple[int, str | Fault]]:
    r"""Lines with their numbers, split at `\n` only, which each but a last one ends with; no byte-order mark.

    Args:
        source: A text file; what the system and the decompressors raise is left to the caller.
        encoding: As `known_encoding` gives it.
        begin: Byte at which a line begins; not 0 only in plain files whose encoding `can_be_cut`.
        end: Byte after a line's end; None for the end of the file.
        first: Number of the first line.
        marks: Keep invalid bytes as marks in the line (`without_surrogates`); otherwise such a line is a fault.

    Raises:
        UserError: The whole file is in another encoding.
    """
    with open_file(source) as stream:
        if begin:
            stream.seek(begin)
        length = None if end is None else end - begin
        read = _cut_lines(stream, encoding, length) if can_be_cut(encoding) else _wide_lines(stream, source, encoding)
        for number, line in enumerate(read, first):
            if line is None:
                yield number, too_long(f"{source.path}, line {number}")
                continue
            if number == 1:
                if encoding == "utf-8":
                    _refuse_foreign_encoding(line, source)
                line = type(line)(line.removeprefix("\ufeff"))
            checked = marks or type(line) is not _Suspect
            plain = str(line)
            yield number, plain if checked else judged(plain, number, source, encoding)


class _Suspect(str):
    """A line that may hold marks of invalid bytes."""

    __slots__ = ()


def _cut_lines(stream: IO[bytes], encoding: str, length: int | None) -> Iterator[str | None]:
    """Lines of an encoding that can be cut: whole blocks are decoded at once, and line by line only where one fails."""
    for block in _blocks(stream, length):
        if block is None:
            yield None
            continue
        try:
            lines = block.decode(encoding).split("\n")
        except UnicodeDecodeError:
            suspects = [_Suspect(line.decode(encoding, MARK_INVALID) + "\n") for line in block.split(b"\n")]
            last = suspects.pop()[:-1]
            yield from suspects
            if last:
                yield _Suspect(last)
            continue
        last = lines.pop()
        for line in lines:
            yield line + "\n"
        if last:
            yield last


def _blocks(stream: IO[bytes], length: int | None) -> Iterator[bytes | None]:
    """Blocks of whole lines; None stands for a line that is too long, of which no more than a block is held."""
    parts: list[bytes] = []  # of a line that the next block goes on with
    held, left = 0, length
    # `read` would hold back what comes before the place where a compressed file is cut off.
    read = getattr(stream, "read1", stream.read)
    while left != 0:
        block = read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left))
        if not block:
            break
        left = None if left is None else left - len(block)
        head = block.find(b"\n") + 1
        if head and held + head > MAX_DOCUMENT_BYTES:
            yield None
            parts, held, block = [], 0, block[head:]
        cut = block.rfind(b"\n") + 1
        if cut:
            yield b"".join([*parts, block[:cut]])
            parts, held = [], 0
        held += len(block) - cut
        parts = [*parts, block[cut:]] if held <= MAX_DOCUMENT_BYTES else []
    if held > MAX_DOCUMENT_BYTES:
        yield None
    elif held:
        yield b"".join(parts)


def _wide_lines(stream: IO[bytes], source: SourceFile, encoding: str) -> Iterator[str | None]:
    """Lines of an encoding in which the byte 0x0A may be half of another character, such as UTF-16."""
    with io.TextIOWrapper(stream, encoding, MARK_INVALID, newline="\n") as file:
        try:
            while line := file.readline(MAX_DOCUMENT_BYTES):
                if len(line) == MAX_DOCUMENT_BYTES and not line.endswith("\n"):
                    while (rest := file.readline(BLOCK_BYTES)) and not rest.endswith("\n"):
                        pass
                    yield None
                else:
                    yield _Suspect(line)
        except UnicodeError as error:  # UTF-16 and UTF-32 without the mark that tells the byte order
            raise UserError(
                f"{source.path} cannot be read as {encoding} ({error}); say --encoding {encoding}-le or {encoding}-be."
            ) from None


def _refuse_foreign_encoding(line: str, source: SourceFile) -> None:
    """UTF-16 and UTF-32 are told by their marks, or by a NUL for every other byte of the first line."""
    for mark, encoding in _FOREIGN_MARKS:
        if line.startswith(mark):
            raise UserError(
                f"{source.path}, line 1: not valid utf-8, for the file begins with the byte-order mark of"
                f" {encoding.upper()}; say --encoding {encoding}."
            )
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        nuls, others = line[first:1000:2], line[1 - first : 1000 : 2]
        if len(nuls) >= 8 and nuls.count("\0") > 0.8 * len(nuls) and others.count("\0") < 0.2 * len(others):
            raise UserError(
                f"{source.path}, line 1: every other byte is NUL, as in UTF-16; say --encoding {encoding}, or look at"
                " what the file holds."
            )


def judged(line: str, number: int, source: SourceFile, encoding: str) -> str | Fault:
    """The line, or its fault where it holds marks of invalid bytes."""
    position = _first_surrogate(line)
    if position is None:
        return line
    # utf-16 and its like begin every encoded string with a byte-order mark, an empty one too.
    offset = len(line[:position].encode(encoding, "replace")) - len("".encode(encoding))
    # Latin-1 has controls where Windows-1252 has dashes and curly quotes.
    likely = "utf-8" if encoding != "utf-8" else "cp1252" if _WINDOWS_MARKS.search(line) else "latin-1"
    return Fault(
        "invalid_bytes",
        f"{source.path}, line {number}: byte 0x{ord(line[position]) - 0xDC00:02X} at offset {offset} of the line is not"
        f" valid {encoding}; say what the file is written in (--encoding {likely}, say), put U+FFFD in the place of"
        " such bytes by --invalid_bytes replace, or leave such records out by --on_error skip.",
    )
