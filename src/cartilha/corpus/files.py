"""Files on the disk: what was found under a name, and its decompressed bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from cartilha.errors import UserError
from cartilha.storage import refuse_lfs_pointer


def _open_zstd(path: Path) -> Any:
    import pyarrow as pa

    return pa.input_stream(path.open("rb"), compression="zstd")  # Arrow itself opens no path that is not UTF-8


COMPRESSIONS: dict[str, Callable[[Path], Any]]
COMPRESSIONS = {".gz": gzip.open, ".zst": _open_zstd, ".xz": lzma.open, ".bz2": bz2.open}
READ_ERRORS = (EOFError, zlib.error, lzma.LZMAError, OSError)  # a file that cannot be opened, is damaged or incomplete
COMPRESSED_EXPANSION = 4.0  # bytes of text per compressed byte, for estimates only


@dataclass(frozen=True)
class SourceFile:
    """A file to read; from its size (on the disk) and time of change a store tells whether it is still the same.

    Its file name is told apart by `split_name`. Its documents are named after its path below the input, and belong to
    the domain, which is its folder below the input or else its stem, unless they name another.
    """

    path: Path
    size_bytes: int
    modified_ns: int
    stem: str
    format: str
    compression: str
    name: str = field(compare=False)
    domain: str = field(compare=False)


def split_name(name: str) -> tuple[str, str, str]:
    """A file name as stem, suffix of the format and compression; the suffixes in lower case, empty if missing."""
    stem, compression = os.path.splitext(name)
    if compression.lower() not in COMPRESSIONS:
        stem, compression = name, ""
    stem, kind = os.path.splitext(stem)
    return stem, kind.lower(), compression.lower()


def open_file(source: SourceFile) -> IO[bytes]:
    """The file's decompressed bytes; one of `READ_ERRORS` or, if it is only a Git LFS pointer, a UserError."""
    refuse_lfs_pointer(source.path)
    if not source.compression:
        return source.path.open("rb")
    if source.size_bytes == 0:
        raise EOFError("the file is empty")  # gzip and Arrow would read an empty text
    return cast(IO[bytes], COMPRESSIONS[source.compression](source.path))


@contextmanager
def open_seekable(source: SourceFile) -> Iterator[IO[bytes]]:
    """The file's decompressed bytes, seekable as Parquet needs them: a compressed file is unpacked to the disk."""
    with open_file(source) as stream:
        if not source.compression:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked)
            unpacked.seek(0)
            yield unpacked


def refuse_changed(source: SourceFile) -> None:
    """Raise a UserError if size and time of change are no longer those that were found."""
    try:
        status = source.path.stat()
    except OSError as error:
        raise UserError(f"{source.path} cannot be read ({error.strerror}); check the file and the disk.") from error
    if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.modified_ns):
        sizes = f"from {source.size_bytes:,} to {status.st_size:,} bytes"
        raise UserError(f"{source.path} changed while it was read ({sizes}); run the same command once it is complete.")
