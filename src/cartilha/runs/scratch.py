"""Runs on slow or unreliable drives: written on the local disk first, and copied to the output directory.

A mounted cloud drive may disconnect, and a network share may fill up. The run itself waits for neither: it writes to a
local directory, and a thread copies what is new, and tries again until the copy is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from cartilha.config import TrainConfig
from cartilha.errors import UserError, log
from cartilha.model_reference import cache_directory
from cartilha.runs.files import check_output, read_status
from cartilha.storage import new_directory, sweep_below, write_atomically
from cartilha.training.checkpoint import list_checkpoints, newest_name

NETWORK_DISKS = ("nfs", "cifs", "smb", "fuse", "9p", "davfs", "afp")
COPY_EVERY_S = 60.0
LAST_TRIES = 4  # at the end of a run, with growing pauses
LAST_PAUSE_S = 2.0


def is_on_network_disk(path: Path) -> bool:
    """Whether a path is on a network or cloud drive (no, if the whole system is)."""
    real = os.path.realpath(path)
    best = None
    for disk in psutil.disk_partitions(all=True):
        inside = real == disk.mountpoint or real.startswith(disk.mountpoint.rstrip(os.sep) + os.sep)
        if inside and (best is None or len(disk.mountpoint) >= len(best.mountpoint)):
            best = disk
    if best is None or best.mountpoint == os.sep or "overlay" in best.fstype:
        return False
    return best.fstype.lower().startswith(NETWORK_DISKS) or "remote" in best.opts


def scratch_directory(config: TrainConfig) -> Path | None:
    """Where a run is written first, or None where it is written straight to its output."""
    if config.scratch == "none":
        return None
    output = Path(config.output)
    root = cache_directory() / "runs" if config.scratch == "auto" else Path(config.scratch)
    if config.scratch == "auto" and (not is_on_network_disk(output) or is_on_network_disk(root)):
        return None
    key = hashlib.sha256(os.fsencode(os.path.realpath(output))).hexdigest()[:16]
    return root / key / output.name


@contextmanager
def place_of_run(config: TrainConfig, resume: bool) -> Iterator[Path]:
    """The directory to write the run to; while the block runs, it is copied to `config.output`.

    A UserError says at the end that the output could not be written; the local directory then has the whole run.
    """
    output, work = Path(config.output), scratch_directory(config)
    if work is None:
        yield output
        return
    check_output(output, resume)
    _fetch(output, work, resume)
    log.info("The run is written to %s first and copied to %s.", work, output)
    copier = Copier(work, output)
    try:
        yield work
    finally:
        fault = copier.finish()
    if fault is not None:
        raise UserError(
            f"The run is complete, but it cannot be copied to {output} ({fault}); it is whole in {work}: copy it from "
            "there, or give the same command with --resume auto when the drive is back."
        )


def _fetch(output: Path, work: Path, resume: bool) -> None:
    """Put the latest state of the run into the local directory, where it already is or from the output."""
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
        return
    if read_status(output) is None:
        if read_status(work) is not None:
            log.warning("%s holds no run: going on with the local copy of it (%s).", output, work)
        return
    same_command = _same_bytes(output / "config.yaml", work / "config.yaml")
    if same_command and (newest_name(work) or "") >= (newest_name(output) or ""):
        return
    with new_directory(work, replace=True) as temporary:
        shutil.copytree(output, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))


class Copier:
    """Copies a run's directory (`work`) to its output in a thread, whenever something in it is new."""

    def __init__(self, work: Path, output: Path) -> None:
        self._work, self._output = work, output
        self._copied: dict[Path, tuple[int, int]] = {}
        self._ended = threading.Event()
        # A drive may never answer: the thread must not keep the process alive.
        self._thread = threading.Thread(target=self._keep_copying, name="copy", daemon=True)
        self._fault: str | None = None
        self._thread.start()

    def finish(self, timeout_s: float = 600.0) -> str | None:
        """Copy what is left, with several tries; returns what is wrong with the drive, or None if all is copied."""
        self._ended.set()
        self._thread.join(timeout_s)
        return "it does not answer" if self._thread.is_alive() else self._fault

    def _keep_copying(self) -> None:
        while not self._ended.wait(COPY_EVERY_S):
            self._try()
        for attempt in range(LAST_TRIES):
            time.sleep(LAST_PAUSE_S * attempt)
            if self._try():
                return

    def _try(self) -> bool:
        try:
            self.copy()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError) and self._work in Path(str(error.filename)).parents
            if not gone:  # an old checkpoint may be removed while it is copied
                self._note(error)
            return False
        if self._fault is not None:
            log.warning("%s can be written to again: the copy is up to date.", self._output)
        self._fault = None
        return True

    def _note(self, error: OSError) -> None:
        if self._fault is None:
            log.warning(
                "%s cannot be written to (%s): the run goes on and is kept in %s; it is tried again every minute.",
                *(self._output, error.strerror, self._work),
            )
        self._fault = error.strerror or str(error)

    def copy(self) -> None:
        """Copy what is new, whole checkpoints first, so that the output is a valid run at any time; or an OSError."""
        here = list_checkpoints(self._work)
        for path in here:
            self._copy(path, self._output / "checkpoints" / path.name)
        for path in sorted(self._work.rglob("*")):
            parts = path.relative_to(self._work).parts
            if path.is_file() and parts[0] not in ("checkpoints", "model") and not path.name.startswith("."):
                self._copy(path, self._output.joinpath(*parts))
        if (self._work / "model").is_dir():
            self._copy(self._work / "model", self._output / "model")
        for path in list_checkpoints(self._output):
            if here and path.name not in {other.name for other in here}:
                shutil.rmtree(path)
        sweep_below(self._output)  # what a copy that failed half-way has left

    def _copy(self, source: Path, target: Path) -> None:
        """Copy a file, or a directory as a whole, unless it is there as it was last changed.

        A directory changes when a file in it is replaced: none is written in place.
        """
        status = source.stat()
        key = (status.st_size, status.st_mtime_ns)
        if self._copied.get(source) == key and target.exists():
            return
        if source.is_file():
            write_atomically(target, source.read_bytes())
        elif not _same_bytes(source / "manifest.json", target / "manifest.json"):  # else a checkpoint that is there
            with new_directory(target, replace=True) as temporary:
                for file in source.iterdir():
                    shutil.copyfile(file, temporary / file.name)
        self._copied[source] = key


def _same_bytes(left: Path, right: Path) -> bool:
    try:
        return left.read_bytes() == right.read_bytes()
    except OSError:
        return False
