"""Processes that end while others of the same run go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cartilha.errors import InterruptedRunError
from cartilha.machine.processes import is_lost_process, world
from cartilha.training.checkpoint import newest_name


def lost_process(run: Path) -> InterruptedRunError:
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
        raise lost_process(run) from error
