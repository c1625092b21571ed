"""When a checkpoint is due, and writing it while training goes on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cartilha.errors import log
from cartilha.machine.memory import free_memory_bytes
from cartilha.machine.processes import is_main_process
from cartilha.model.sharding import is_sharded
from cartilha.training.checkpoint import freeze, write_checkpoint
from cartilha.training.optimizer import StateSize
from cartilha.training.state import TrainingState

MAX_SHARE_OF_TIME = 0.03  # checkpoints by the clock wait so long that they cost no more than this


class CheckpointWriter:
    """Writes a run's checkpoints and keeps the newest `keep`; training goes on meanwhile if `background` says so.

    All processes of a sharded model write at once, and training waits for them.

    One is due after every `every_steps` (None: never), and `every_minutes` (0: never) after the last one.
    """

    def __init__(
        self, run: Path, *, every_steps: int | None, every_minutes: float, keep: int, background: bool
    ) -> None:
        self._run = run
        self._keep = keep
        self._every_steps = every_steps
        self._every_s = 60 * every_minutes
        self._last = time.monotonic()
        self._background = background
        # One thread for all of them: each new thread would take an arena of memory of its own.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self.stall_s = 0.0  # time that training has waited for checkpoints

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, by steps or by the clock."""
        by_steps = self._every_steps and step % self._every_steps == 0
        by_clock = self._every_s and time.monotonic() - self._last >= self._every_s
        return is_main_process() and bool(by_steps or by_clock)

    def write(self, state: TrainingState, settings: dict[str, Any], loss: float | None, *, goes_on: bool) -> None:
        """Write a checkpoint (see `freeze`) with its validation loss, after the one before is finished.

        If training does not go on, it is written at once and without a copy of the state. An OSError says that this
        one, or the one before it, could not be written.
        """
        if not is_main_process() and not is_sharded(state.model):
            return
        started = time.monotonic()
        self.finish()
        beside = goes_on and self._background and not is_sharded(state.model)
        what = self._run, freeze(state, settings, copy=beside), loss, self._keep
        if beside:
            self._writing = self._thread.submit(write_checkpoint, *what)
        else:
            write_checkpoint(*what)
        self._last = time.monotonic()
        stall = self._last - started
        self.stall_s += stall
        if goes_on and self._every_s and stall > MAX_SHARE_OF_TIME * self._every_s:
            self._every_s = stall / MAX_SHARE_OF_TIME
            minutes = self._every_s / 60
            log.info("A checkpoint took %.1f s: the next one by the clock comes in %.0f minutes.", stall, minutes)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; an OSError says that it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for the checkpoint and end the thread; an error of the disk is only logged, since the run is over."""
        try:
            self.finish()
        except OSError as error:
            log.warning("The last checkpoint could not be written (%s).", error.strerror)
        self._thread.shutdown()


def can_write_in_background(device: torch.device, size: StateSize) -> bool:
    """Whether the host has room for a copy of the state; a GPU's state is copied to the host in any case."""
    return device.type == "cuda" or free_memory_bytes(torch.device("cpu")) > 2 * size.checkpoint_bytes
