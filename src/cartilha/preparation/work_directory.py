"""The directory beside a store in which it is prepared; finished work stays there when a run is killed."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cartilha.errors import UnfinishedError, UserError, log
from cartilha.storage import exclusive, read_json, write_json

SPARE_BYTES = 32 << 20


@contextmanager
def work_directory(store: Path, identity: dict[str, Any], *, keep: bool = False) -> Iterator[Path]:
    """Hold the work directory of a store; it is removed when the block succeeds, unless it is to be kept.

    Work of another identity is removed with a warning. A UserError says that another process prepares this store, or
    that the disk is full.
    """
    work, lock = _places(store)
    store.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(lock, f"The store {store}"):
        try:
            _begin(work, identity)
            yield work
        except UserError as error:
            # After a mistake in the input or the settings, the corrected command cannot use this work.
            if not isinstance(error, UnfinishedError):
                shutil.rmtree(work, ignore_errors=True)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UnfinishedError(
                f"The disk of {store} is full; free some space and run the same command again: what is done is kept"
                f" in {work.name} beside it."
            ) from error
        if keep:
            log.info("What was read is kept in %s for the next such command; delete it when none is to come.", work)
            return
        shutil.rmtree(work, ignore_errors=True)


def remove_finished_work(store: Path, identity: dict[str, Any]) -> None:
    """Remove the work of a process that was killed after its store had appeared."""
    work, lock = _places(store)
    if work.exists() or lock.exists():
        with contextlib.suppress(UserError, OSError), exclusive(lock, f"The store {store}"):
            if _identity_of(work) in (None, identity):
                shutil.rmtree(work, ignore_errors=True)


def _places(store: Path) -> tuple[Path, Path]:
    return store.with_name(f".{store.name}.work"), store.with_name(f".{store.name}.lock")


def _identity_of(work: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        return read_json(work / "identity.json")
    return None


def _begin(work: Path, identity: dict[str, Any]) -> None:
    if work.is_dir():
        if _identity_of(work) == identity:
            log.info("Going on with what an earlier run of this command left.")
            for temporary in work.glob("*.tmp"):
                shutil.rmtree(temporary, ignore_errors=True)
            return
        log.warning("What was read for another input or other settings is removed (%s).", work.name)
        shutil.rmtree(work)
    work.mkdir()
    write_json(work / "identity.json", identity)


def require_space(place: Path, needed_bytes: float) -> None:
    """Refuse to begin by a `UserError` if the disk has not enough room."""
    free, needed = shutil.disk_usage(place).free, needed_bytes + SPARE_BYTES
    if free < needed:
        raise UserError(
            f"About {needed / 1e9:.2f} GB are needed while the store is written and {free / 1e9:.2f} GB are free on the"
            f" disk of {place}; free some, or choose another --output."
        )
