"""How a run ends early: what its record says of it, and what the user is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cartilha.errors import InterruptedRunError, OutOfMemoryError, UserError
from cartilha.machine.memory import is_out_of_memory
from cartilha.machine.processes import is_lost_process, world
from cartilha.runs.files import RunWriter
from cartilha.storage import DISK_FAULTS, system_error
from cartilha.training.checkpoint import newest_name


def _lost_process(run: Path) -> InterruptedRunError:
    """The error of a process that has nobody left to train with."""
    last = newest_name(run) or "the beginning"
    return InterruptedRunError(
        f"Another of the {world()[1]} processes has ended (it says why, unless it was killed), so that this one stops; "
        f"start them again, any number of them, with --resume auto: the run goes on from {last}."
    )


@contextmanager
def naming_lost_processes(run: Path) -> Iterator[None]:
    """Where another process has ended, say so in a sentence, and how the run goes on."""
    try:
        yield
    except Exception as error:
        if not is_lost_process(error):
            raise
        raise _lost_process(run) from error


@contextmanager
def recording_failures(record: RunWriter) -> Iterator[None]:
    """Write whatever ends the run early to results.json: a failed run is a row of the table too."""
    try:
        yield
    except BaseException as error:
        status, told = _failure(error, record.path)
        with suppress(OSError):  # if the disk is at fault, this cannot be written either
            record.update(status=status, error=str(error) or type(error).__name__, notices=record.notices)
        if told is error:
            raise
        raise told from error


def _failure(error: BaseException, path: Path) -> tuple[str, BaseException]:
    """The status of a run that an error has ended, and the error that the user sees."""
    if is_lost_process(error):
        error = _lost_process(path)
    if isinstance(error, InterruptedRunError | KeyboardInterrupt):
        return "interrupted", error
    if isinstance(error, OutOfMemoryError):
        return "out_of_memory", error
    if is_out_of_memory(error):
        return "out_of_memory", OutOfMemoryError(
            "The device ran out of memory even with one block per forward pass; use a smaller --block_size, "
            "--gradient_checkpointing, or a smaller model (cartilha plan says what fits)."
        )
    fault = system_error(error)
    if fault is None or fault.errno not in DISK_FAULTS:
        return "failed", error
    return "failed", UserError(
        f"The run cannot write to {fault.filename or path} ({fault.strerror}); free space or repair the drive, and "
        f"give the same command with --resume auto: it goes on from {newest_name(path) or 'the beginning'}."
    )
