"""When a checkpoint is due, and writing it while training goes on."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cartilha.machine.memory import free_memory_bytes
from cartilha.machine.processes import is_main_process
from cartilha.training.checkpoint import BYTES_PER_PARAMETER, freeze, write_checkpoint
from cartilha.training.state import TrainingState

log = logging.getLogger("cartilha")

MAX_SHARE_OF_TIME = 0.03  # checkpoints by the clock wait so long that they cost no more than this


class CheckpointWriter:
    """Writes a run's checkpoints, in a thread of its own where the host has room for a copy of the state.

    Args:
        run: The run's directory.
        every_steps: Write after every so many steps; None for never.
        every_minutes: Write when so much time has passed since the last one; 0 for never.
        keep: Newest checkpoints to keep.
        background: Whether training may go on while a checkpoint is written.
    """

    def __init__(
        self, run: Path, *, every_steps: int | None, every_minutes: float, keep: int, background: bool
    ) -> None:
        self._run = run
        self._keep = keep
        self._every_steps = every_steps
        self._every_s = 60 * every_minutes
        self._last = time.monotonic()
        # One thread for all of them: each new one would take an arena of memory of its own.
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._writing: Future[Path] | None = None
        self.stall_s = 0.0  # what training has waited for checkpoints

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, by steps or by the clock."""
        if not is_main_process():  # of several processes the first one writes
            return False
        if self._every_steps and step % self._every_steps == 0:
            return True
        return bool(self._every_s) and time.monotonic() - self._last >= self._every_s

    def write(
        self,
        state: TrainingState,
        settings: dict[str, Any],
        validation_loss: float | None = None,
        *,
        goes_on: bool = True,
    ) -> None:
        """Write a checkpoint of the state, after the one before is finished.

        Args:
            state: To be written.
            settings: See `freeze`.
            validation_loss: See `write_checkpoint`.
            goes_on: Whether training does. What nothing goes on beside is written at once, from no copy.

        Raises:
            OSError: This one, or the one before it, could not be written.
        """
        if not is_main_process():
            return
        started = time.monotonic()
        self.finish()
        in_background = self._thread if goes_on else None
        frozen = freeze(state, settings, copy=in_background is not None)
        if in_background is not None:
            self._writing = in_background.submit(write_checkpoint, self._run, frozen, validation_loss, self._keep)
        else:
            write_checkpoint(self._run, frozen, validation_loss, self._keep)
        self._last = time.monotonic()
        stall = self._last - started
        self.stall_s += stall
        if goes_on and self._every_s and stall > MAX_SHARE_OF_TIME * self._every_s:
            self._every_s = stall / MAX_SHARE_OF_TIME
            minutes = self._every_s / 60
            log.info("A checkpoint took %.1f s: the next one by the clock comes in %.0f minutes.", stall, minutes)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            OSError: It could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, where another error is on its way already: one of the disk is only said."""
        try:
            self.finish()
        except OSError as error:
            log.warning("The last checkpoint could not be written (%s).", error.strerror)
        if self._thread is not None:
            self._thread.shutdown()


def can_write_in_background(device: torch.device, num_parameters: int) -> bool:
    """Whether there is room for a copy of the state: on a GPU the host needs one in any case, on a CPU twice over."""
    if device.type == "cuda":
        return True
    return free_memory_bytes(torch.device("cpu")) > 2 * BYTES_PER_PARAMETER * num_parameters
