"""The energy of a run: results.json, `energy`, the joules that its device counted, in how many seconds, and by what."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cartilha.machine.energy import EnergyMeter
from cartilha.runs.files import RunWriter

READ_EVERY_S = 60.0  # counters of processors go round


@contextmanager
def counting_energy(device: torch.device, record: RunWriter) -> Iterator[Callable[[], None]]:
    """Add what this command uses to what the run's record has; the record is brought up to date whenever it is read.

    Yields a function to be called after each step, so that no counter goes round unseen. A command that is killed
    loses what it has used since its last update. Nothing is recorded where nothing counts.
    """
    meter, started = EnergyMeter(device), time.perf_counter()
    before = record.values.get("energy") or {"joules": 0.0, "seconds": 0.0}
    last = started

    def add() -> None:
        joules = meter.joules()
        if joules is not None:
            record.values["energy"] = {
                "joules": before["joules"] + joules,
                "seconds": before["seconds"] + time.perf_counter() - started,
                "source": meter.source,
            }

    def add_now_and_then() -> None:
        nonlocal last
        if time.perf_counter() - last >= READ_EVERY_S:
            last = time.perf_counter()
            add()

    record.before_writing.append(add)
    try:
        yield add_now_and_then
    finally:
        add()
        record.before_writing.remove(add)
