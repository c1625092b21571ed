"""Files to lines of text: decompressed, decoded, and split at line feeds only.

Bytes that the encoding does not allow are refused by line and offset, or kept as marks: the decoder puts a lone
surrogate, which no valid text contains, in their place, so that a record is taken apart before its text is judged.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TypeVar, cast

from cartilha.corpus.sources import SourceFile
from cartilha.errors import UserError

MARK_INVALID = "cartilha.mark"  # the name of the decoders' error handler below

_SURROGATES = re.compile("[\ud800-\udfff]")
# What UTF-8 makes of another encoding's byte-order mark; the longer one first, for it begins with the shorter.
_FOREIGN_MARKS = (("\udcff\udcfe\0\0", "utf-32"), ("\udcff\udcfe", "utf-16"), ("\udcfe\udcff", "utf-16"))

Item = TypeVar("Item")


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


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Decode an invalid sequence as one lone surrogate that tells its first byte, where `replace` puts one U+FFFD."""
    assert isinstance(error, UnicodeDecodeError)
    return chr(0xDC00 + error.object[error.start]), error.end


codecs.register_error(MARK_INVALID, _mark)


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each mark or half surrogate pair; the same object where there is none."""
    return text if _first_surrogate(text) is None else _SURROGATES.sub("\ufffd", text)


def _first_surrogate(text: str) -> int | None:
    try:
        text.encode("utf-8")  # several times faster than a search
    except UnicodeEncodeError as error:
        return error.start
    return None


def read_lines(source: SourceFile, encoding: str, stop: bool) -> Iterator[str]:
    r"""Lines with their ends, split at `\n` only, the first without a byte-order mark.

    Args:
        source: A text file; what may go wrong with its bytes is left to `explain_faults`.
        encoding: As `known_encoding` gives it.
        stop: Whether to refuse invalid bytes; otherwise they are marks in the line (`without_surrogates`).

    Raises:
        UserError: Bytes are not valid in the encoding.
    """
    with _open(source) as stream, io.TextIOWrapper(stream, encoding, MARK_INVALID, newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if number == 1 and encoding == "utf-8":
                    _refuse_foreign_mark(line, source)
                if stop:
                    _refuse_invalid(line, number, source, encoding)
                yield line.removeprefix("\ufeff") if number == 1 else line
        except UnicodeError as error:  # UTF-16 and UTF-32 without the mark that tells the byte order
            raise UserError(
                f"{source.path} cannot be read as {encoding} ({error}); say --encoding {encoding}-le or {encoding}-be."
            ) from None


def _refuse_foreign_mark(line: str, source: SourceFile) -> None:
    for mark, encoding in _FOREIGN_MARKS:
        if line.startswith(mark):
            raise UserError(
                f"{source.path}, line 1: not valid utf-8, for the file begins with the byte-order mark of"
                f" {encoding.upper()}; say --encoding {encoding}."
            )


def _refuse_invalid(line: str, number: int, source: SourceFile, encoding: str) -> None:
    position = _first_surrogate(line)
    if position is None:
        return
    # utf-16 and its like begin every encoded string with a byte-order mark, an empty one too.
    offset = len(line[:position].encode(encoding, "replace")) - len("".encode(encoding))
    raise UserError(
        f"{source.path}, line {number}: byte 0x{ord(line[position]) - 0xDC00:02X} at offset {offset} of the line is not"
        f" valid {encoding}; say what the file is written in (--encoding latin-1, say), or put U+FFFD in the place of"
        " such bytes by --invalid_bytes replace."
    )


def _open(source: SourceFile) -> IO[bytes]:
    if source.compression and source.size_bytes == 0:
        raise EOFError("the file is empty")  # gzip and Arrow would call it an empty text
    if source.compression == ".gz":
        return cast(IO[bytes], gzip.open(source.path, "rb"))
    if source.compression == ".zst":
        import pyarrow as pa

        return cast(IO[bytes], pa.input_stream(str(source.path), compression="zstd"))
    return source.path.open("rb")


def explain_faults(source: SourceFile, items: Iterator[Item]) -> Iterator[Item]:
    """Hand on what is read from a file; what the system and the decompressors raise becomes a sentence.

    Raises:
        UserError: The file cannot be opened or read, or is damaged.
    """
    try:
        yield from items
    except (EOFError, zlib.error, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else None  # decompressors set none
        if isinstance(error, PermissionError):
            remedy = "change its permissions"
        else:
            remedy = "check the file and the disk" if reason else "it is damaged or cut off: copy or download it again"
        raise UserError(f"{source.path} cannot be read ({reason or error}); {remedy}.") from error


@contextmanager
def open_seekable(source: SourceFile) -> Iterator[IO[bytes]]:
    """The file's plain bytes with a way back, which Parquet needs: a compressed one is unpacked on the disk first."""
    with _open(source) as stream:
        if not source.compression:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked)
            unpacked.seek(0)
            yield unpacked
