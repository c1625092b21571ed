"""Durable files: whatever is written appears whole or not at all, and whatever is read is bounded and checked.

A temporary file or directory is locked by the process that writes it. The lock dies with the process, however it ends,
so that the next one knows what was abandoned and sweeps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cartilha.errors import UserError

log = logging.getLogger("cartilha")

LFS_POINTER = re.compile(rb"version https://[^\n]+/spec/v\d+\s+(?:ext-.+\s+)*oid \w+:[0-9a-f]+\s+size (\d+)\r?\n?")
LONE_SURROGATES = re.compile("[\ud800-\udfff]")  # no characters; in names that are not UTF-8 they stand for bytes
MAX_JSON_BYTES = 64 * 2**20  # far above anything that is written here, far below any machine's memory

# What the user's disk or path can be at fault for, and no mistake of ours.
DISK_FAULTS = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EDQUOT", "EEXIST", "EFBIG", "EIO", "EISDIR", "ENAMETOOLONG", "ENODEV", "ENOSPC", "ENOTCONN"),
        *("ENOTDIR", "EPERM", "EROFS", "ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EREMOTEIO", "ENXIO"),
    )
    if hasattr(errno, name)
)


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error behind an exception, or None; safetensors writes its number into a message."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file that appears whole or not at all: see `new_file`."""
    with new_file(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` that, flushed to the disk, takes its place when the block ends.

    A reader finds the old file or the new one, whole. The directory is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        with _held(temporary):
            yield temporary
            _flush_to_disk(temporary)
            temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        raise _named(error, path) from error.__cause__
    _flush_directory(path.parent)


def _named(error: BaseException, path: Path) -> BaseException:
    """The error, with the path where the system's error names none: a full disk is met in the middle of a file."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        return OSError(error.errno, os.strerror(error.errno), str(path))
    return error


@contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that becomes `path` when the block ends without an exception.

    Args:
        path: The directory to make.
        replace: Put it in the place of one that is already there; the old one is removed after the rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _held(temporary):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush_to_disk(file)
            if replace and path.exists():
                _put_in_place_of(temporary, path)
            else:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
                temporary.replace(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _named(error, path) from error.__cause__
    _flush_directory(path.parent)


def _put_in_place_of(temporary: Path, path: Path) -> None:
    """Give the new directory the old one's name, in one go where the system can; the old one is removed."""
    if _exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    # Two renames: whoever is killed between them leaves the old one under this name, and `_sweep` puts it back.
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a run that had this process id
    with _held(path):
        path.replace(old)
        try:
            temporary.replace(path)
        except BaseException:
            old.replace(path)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two directory entries atomically (Linux's renameat2); False where that cannot be done."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_working_directory, swap = -100, 2
    done = rename(at_working_directory, os.fsencode(left), at_working_directory, os.fsencode(right), swap)
    return bool(done == 0)


def _sweep(path: Path) -> None:
    """Remove what killed processes left of writing `path`, and put back the old one if it was being replaced."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.old"):
        if _is_abandoned(left):
            if path.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.replace(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if _is_abandoned(left):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def sweep_below(directory: Path) -> None:
    """Remove every abandoned temporary file or directory below a directory that this process has for itself."""
    for left in [*directory.rglob(".*.tmp"), *directory.rglob(".*.old")]:
        if left.name.removesuffix(left.suffix).rpartition(".")[2].isdigit() and _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    """Whether nobody holds the lock of a temporary file or directory any more; no where that cannot be told."""
    if sys.platform == "win32":
        import psutil

        process_id = path.name.split(".")[-2]
        return process_id.isdigit() and not psutil.pid_exists(int(process_id))
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a file's or directory's lock while the block runs (not on Windows, where an open file cannot be renamed)."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Take the lock of an open file if it is free; False where it is taken, or where there are no locks."""
    try:
        return _lock(descriptor)
    except OSError:
        return False


def _lock(descriptor: int) -> bool:
    """Take the lock of an open file; False where another process has it.

    Raises:
        OSError: The file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            os.lseek(descriptor, 2**30, os.SEEK_SET)  # beyond the text, which others may read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:  # Windows does not tell the two apart
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; it dies with the process, so that a kill leaves no lock behind.

    Args:
        path: The lock file; removed at the end.
        what: What is locked, for the message.

    Raises:
        UserError: Another process holds it.
    """
    with _open_lock(path, what) as file:
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            if sys.platform != "win32":  # where an open file cannot be removed
                _remove_lock(path)
    if sys.platform == "win32":
        _remove_lock(path)


def _remove_lock(path: Path) -> None:
    """Remove a lock file; a disk that has turned read-only keeps it, and has a more telling error on its way."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _open_lock(path: Path, what: str) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            taken = _lock(file.fileno())
        except OSError as error:
            log.warning(
                "The disk of %s has no locks (%s): see to it yourself that no other process uses %s.",
                *(path.parent, error.strerror, what),
            )
            return file
        if not taken:
            with file, contextlib.suppress(OSError):
                file.seek(0)
                holder = file.read(200).strip()
            raise UserError(
                f"{what} is in use by another process ({holder or 'unknown'}); wait for its end, or name another place."
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its last holder removed it between our opening and locking


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    """Make renames in a directory durable, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network drives refuse it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse the short text that Git leaves in place of a file that Git LFS has not fetched; a missing file passes.

    Raises:
        UserError: The file is such a pointer.
    """
    with contextlib.suppress(OSError):
        small = 0 < path.stat().st_size <= 1024  # no pointer is longer
        if small and (pointer := LFS_POINTER.fullmatch(path.read_bytes())):
            raise UserError(
                f"{path} is only a Git LFS pointer to the {int(pointer[1]):,} bytes of the file; run `git lfs pull` in"
                " its folder, or download the file itself."
            )


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. NaN and infinities become null: they are not JSON."""
    write_atomically(path, to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file that somebody else may have written.

    Raises:
        ValueError: It is too large, nested too deeply, or no JSON in UTF-8; the message says which.
        OSError: It cannot be read.
        UserError: It is only a Git LFS pointer.
    """
    refuse_lfs_pointer(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{size:,} bytes are too many")
    return parse_json(path.read_bytes())


def parse_json(data: bytes | str) -> Any:
    """`json.loads`, for text from others: deep nesting is a ValueError too.

    Raises:
        ValueError: It is no JSON, or nested too deeply.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_sealed_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object that ends with a hash of its own, so that no change of it goes unnoticed."""
    write_atomically(path, _sealed(values))


def read_sealed_json(path: Path) -> dict[str, Any]:
    """The object that `write_sealed_json` wrote, without its hash.

    Raises:
        ValueError: It is not as it was written, to the byte.
        OSError: It cannot be read.
    """
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.pop("sha256", None), str):
        raise ValueError("it has no hash of its own")
    if _sealed(values).encode("utf-8", "surrogatepass") != path.read_bytes():
        raise ValueError("it was changed after it was written")
    return values


def _sealed(values: dict[str, Any]) -> str:
    digest = hashlib.sha256(to_json(values).encode("utf-8", "surrogatepass")).hexdigest()
    return to_json({**values, "sha256": digest}, indent=2) + "\n"


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text of plain values, numpy scalars included; non-finite floats become null, lone surrogates U+FFFD."""
    text = json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return LONE_SURROGATES.sub("\ufffd", text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if type(value).__module__ == "numpy":  # not imported here: `cartilha --help` starts without it
        return _plain(value.item())
    return value
