"""Files on the disk: what was found under a name, and its bytes, decompressed."""

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

    # Arrow itself opens no path that is not UTF-8.
    return pa.input_stream(path.open("rb"), compression="zstd")


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".zst": _open_zstd,
    ".xz": lzma.open,
    ".bz2": bz2.open,
}
READ_ERRORS = (EOFError, zlib.error, lzma.LZMAError, OSError)  # of opening, and of what is damaged or cut off
COMPRESSED_EXPANSION = 4.0  # text bytes in a compressed byte, for estimates only


@dataclass(frozen=True)
class SourceFile:
    """A file to read; size and time of change tell a store whether its input is still the same.

    Attributes:
        path: As it was given or found.
        size_bytes: Its size on the disk, compressed or not.
        modified_ns: Its time of change, in nanoseconds since the epoch.
        name: The path below the input that it was found by, with `/`; documents are called by it.
        domain: Of its documents, where they name none: its folder below the input, else its stem.
    """

    path: Path
    size_bytes: int
    modified_ns: int
    name: str = field(compare=False)
    domain: str = field(default="", compare=False)

    @property
    def format(self) -> str:
        """The suffix that says how to read it, in lower case and without the compression."""
        return split_name(self.path.name)[1]

    @property
    def compression(self) -> str:
        """One of `COMPRESSIONS`, or nothing."""
        return split_name(self.path.name)[2]

    @property
    def stem(self) -> str:
        """The file's name without these suffixes."""
        return split_name(self.path.name)[0]


def split_name(name: str) -> tuple[str, str, str]:
    """A file name as stem, suffix of the format and compression, both in lower case and empty where there is none."""
    stem, compression = os.path.splitext(name)
    if compression.lower() not in COMPRESSIONS:
        stem, compression = name, ""
    stem, kind = os.path.splitext(stem)
    return stem, kind.lower(), compression.lower()


def open_file(source: SourceFile) -> IO[bytes]:
    """The file's bytes, decompressed.

    Raises:
        EOFError: A compressed file is empty.
        OSError: It cannot be opened.
        UserError: It is only a Git LFS pointer to the file.
    """
    refuse_lfs_pointer(source.path)
    if not source.compression:
        return source.path.open("rb")
    if source.size_bytes == 0:
        raise EOFError("the file is empty")  # gzip and Arrow would call it an empty text
    return cast(IO[bytes], COMPRESSIONS[source.compression](source.path))


def refuse_changed(source: SourceFile) -> None:
    """Compare size and time of change with what they were when the file was found.

    Raises:
        UserError: They differ.
    """
    try:
        status = source.path.stat()
    except OSError as error:
        raise UserError(f"{source.path} cannot be read ({error.strerror}); check the file and the disk.") from error
    if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.modified_ns):
        raise UserError(
            f"{source.path} changed while it was read (from {source.size_bytes:,} to {status.st_size:,} bytes); wait"
            " until it is complete and run the same command again."
        )


@contextmanager
def open_seekable(source: SourceFile) -> Iterator[IO[bytes]]:
    """The file's plain bytes with a way back, which Parquet needs: a compressed one is unpacked on the disk first."""
    with open_file(source) as stream:
        if not source.compression:
            yield stream
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(stream, unpacked)
            unpacked.seek(0)
            yield unpacked
