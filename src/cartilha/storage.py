"""Durable files: every file written appears whole or not at all, and every file read is bounded and checked.

The process that writes a temporary file or directory holds its lock, which ends with the process: a temporary file
without a lock was abandoned, and the next writer removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from unicodedata import normalize

from cartilha.errors import UserError, log

LFS_POINTER = re.compile(rb"version https://[^\n]+/spec/v\d+\s+(?:ext-.+\s+)*oid \w+:[0-9a-f]+\s+size (\d+)\r?\n?")
LONE_SURROGATES = re.compile("[\ud800-\udfff]")  # not characters; Python uses them for the bytes of names not in UTF-8
MAX_JSON_BYTES = 64 * 2**20  # far above any JSON written here, far below any machine's memory

# Errors that the user's disk or path can cause; others are bugs.
_DISK_FAULT_NAMES = (
    *("EACCES", "EDQUOT", "EEXIST", "EFBIG", "EIO", "EISDIR", "ENAMETOOLONG", "ENODEV", "ENOSPC", "ENOTCONN"),
    *("ENOTDIR", "EPERM", "EROFS", "ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EREMOTEIO", "ENXIO"),
)
DISK_FAULTS = frozenset(code for code, name in errno.errorcode.items() if name in _DISK_FAULT_NAMES)


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error behind an exception, or None; safetensors puts its number into the message."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file that appears whole or not at all (`new_file`)."""
    with new_file(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block ends, that file is flushed to disk and renamed to `path`.

    Readers find either the old file or the whole new one. Missing directories are created.
    """
    with _temporary(path, Path.touch) as temporary:
        yield temporary
        _flush_to_disk(temporary)
        temporary.replace(path)


@contextmanager
def new_directory(path: Path, *, replace: bool = False, exist_ok: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that becomes `path` when the block ends without an exception.

    With `replace` it takes the place of an existing directory, which is removed after the rename. With `exist_ok` a
    directory that another process has put there meanwhile stays, since it has the same contents.
    """
    with _temporary(path, Path.mkdir) as temporary:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            _flush_to_disk(file)
        if replace and path.exists():
            _put_in_place_of(temporary, path)
        else:
            try:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
                temporary.replace(path)
            except OSError:
                if not (exist_ok and path.is_dir()):
                    raise
                _remove(temporary)


@contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make what will be renamed to `path`, locked: it is removed if the block fails, else the renaming made durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent.glob, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _remove(temporary)  # left by an earlier process with the same id
        make(temporary)
        with _locked(temporary):
            yield temporary
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # A disk that fills up in the middle of a file gives an error without a path.
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error.__cause__
        raise
    _flush_directory(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put_in_place_of(temporary: Path, path: Path) -> None:
    """Give the new directory the old one's name, atomically where the system can, and remove the old one."""
    old = temporary
    if not _exchange(temporary, path):
        old = temporary.with_suffix(".old")
        _remove(old)  # left by an earlier process with the same id
        with _locked(path):
            path.replace(old)  # if the process is killed after this, `_sweep` restores the old directory
            try:
                temporary.replace(path)
            except BaseException:
                old.replace(path)
                raise
    _remove(old)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two directory entries atomically (renameat2 of Linux); False where that is not possible."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    at_working_directory, swap = -100, 2
    done = rename(at_working_directory, os.fsencode(left), at_working_directory, os.fsencode(right), swap)
    return bool(done == 0)


def sweep_below(directory: Path) -> None:
    """Remove or restore what killed processes left anywhere below a directory that only this process uses."""
    _sweep(directory.rglob, "*")


def _sweep(find: Callable[[str], Iterable[Path]], name: str) -> None:
    """Remove what killed processes left of writing `name`, and restore the old directory if they were replacing it."""
    for left in [*find(f".{name}.*.old"), *find(f".{name}.*.tmp")]:
        written, _, process_id = left.stem.rpartition(".")
        if process_id.isdigit() and _is_abandoned(left):
            replaced = left.with_name(written[1:])
            if left.suffix == ".old" and not replaced.exists():
                left.replace(replaced)
            else:
                _remove(left)


def _is_abandoned(path: Path) -> bool:
    """Whether no process holds the lock of a temporary file or directory; False where that is not known."""
    if sys.platform == "win32":
        import psutil

        return not psutil.pid_exists(int(path.stem.rpartition(".")[2]))
    with contextlib.suppress(OSError), _locked(path) as is_locked:
        return is_locked
    return False


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a file or directory, and yield whether that was possible (not on Windows, which renames no open file)."""
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        is_locked = False
        with contextlib.suppress(OSError):
            is_locked = _lock(descriptor)
        yield is_locked
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file; False if another process has locked it; an OSError if the file system has no locks."""
    from filelock import lock_descriptor  # not needed by most commands, and takes a while to import

    return lock_descriptor(descriptor, blocking=False)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, which is removed at the end; the lock ends with the process, even if that is killed.

    A UserError that begins with `what` says that another process holds it.
    """
    file = _open_lock(path, what)
    try:
        file.truncate(0)
        # On Windows nobody else can read the first byte of a locked file.
        file.write(f" process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        if sys.platform == "win32":  # where an open file cannot be removed
            file.close()
        with contextlib.suppress(OSError):  # a disk that became read-only keeps the file
            path.unlink(missing_ok=True)
        file.close()


def _open_lock(path: Path, what: str) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            is_locked = _lock(file.fileno())
        except OSError as error:
            log.warning(
                "The disk of %s has no locks (%s): make sure yourself that no other process uses %s.",
                *(path.parent, error.strerror, what),
            )
            return file
        if not is_locked:
            holder = "unknown"
            with file, contextlib.suppress(OSError):
                file.seek(1)
                holder = file.read(200).strip() or holder
            raise UserError(
                f"{what} is in use by another process ({holder}); wait until it ends, or name another place."
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the last holder removed it after we had opened it


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


def as_on_disk(path: str) -> str:
    """The path as the file system spells it: accents have two spellings, and archives from macOS use the rarer one."""
    if path.isascii() or os.path.lexists(path):
        return path
    found = ""
    for part in Path(path).parts:
        if not os.path.lexists(os.path.join(found, part)):
            alike = (name for name in listed(found) if normalize("NFC", name) == normalize("NFC", part))
            part = next(alike, part)
        found = os.path.join(found, part)
    return found


def listed(folder: str) -> list[str]:
    """The names in a folder, by default the working directory; none if it cannot be listed."""
    try:
        return sorted(os.listdir(folder or "."))
    except (OSError, ValueError):
        return []


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_to_replace(option: str, path: Path, suffix: str) -> None:
    """Refuse, with a UserError, to write a file over a directory or a file of another kind, or into a store."""
    if path.is_dir():
        raise UserError(f"--{option} {path} is a directory; name a file.")
    if (path.parent / "store.json").is_file():
        raise UserError(f"--{option} {path} lies in a token store, which holds nothing else; name another folder.")
    if path.is_file() and path.suffix.lower() != suffix:
        raise UserError(
            f"--{option} {path} is there already and is no {suffix} file; choose another name for the new one."
        )


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse the short text that Git leaves in place of a file that Git LFS has not fetched; a missing file passes."""
    with contextlib.suppress(OSError):
        small = 0 < path.stat().st_size <= 1024  # no pointer is longer
        if small and (pointer := LFS_POINTER.fullmatch(path.read_bytes())):
            raise UserError(
                f"{path} is only a Git LFS pointer to the {int(pointer[1]):,} bytes of the file; run `git lfs pull`."
            )


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically (`to_json`)."""
    write_atomically(path, to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file of others; a ValueError says that it is too large, too deep, or not JSON in UTF-8."""
    refuse_lfs_pointer(path)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{size:,} bytes are too many")
    return parse_json(path.read_bytes())


def parse_json(data: bytes | str) -> Any:
    """`json.loads` for text from others: deep nesting raises a ValueError, too."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_sealed_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object that contains its own hash, so that every later change is noticed."""
    write_atomically(path, _sealed(values))


def read_sealed_json(path: Path) -> dict[str, Any]:
    """The object that `write_sealed_json` wrote, without its hash; a ValueError if a byte of it has changed."""
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
    """JSON text of plain values, numpy scalars included; NaN and infinities become null, lone surrogates U+FFFD."""
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
