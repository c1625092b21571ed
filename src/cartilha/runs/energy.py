"""The energy of a run: results.json, `energy`, the joules that its GPUs counted and in how many seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cartilha.machine.energy import EnergyMeter
from cartilha.runs.files import RunWriter


@contextmanager
def counting_energy(device: torch.device, record: RunWriter) -> Iterator[None]:
    """Add what this command uses to what the run's record has; the record is brought up to date whenever it is read.

    A command that is killed loses what it has used since its last update. Nothing is recorded where nothing counts.
    """
    meter, started = EnergyMeter(device), time.perf_counter()
    before = record.values.get("energy") or {"joules": 0.0, "seconds": 0.0}

    def add() -> None:
        joules = meter.joules()
        if joules is not None:
            seconds = before["seconds"] + time.perf_counter() - started
            record.values["energy"] = {"joules": before["joules"] + joules, "seconds": seconds}

    record.before_writing.append(add)
    try:
        yield
    finally:
        add()
        record.before_writing.remove(add)
