"""The energy of a run: added up over commands, and absent where nothing counts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cartilha.machine import energy
from cartilha.machine.energy import EnergyMeter
from cartilha.runs.energy import counting_energy
from cartilha.runs.files import RunWriter, read_results


class Counter:
    """What the meter asks of NVML, in millijoules."""

    now = 5_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object, found: object) -> int:
        found._obj.value = self.now
        return 0


def test_energy_is_added_to_that_of_the_commands_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter()
    monkeypatch.setattr(energy, "_counter", lambda device: (counter, None))
    record = RunWriter(tmp_path, {"energy": {"joules": 100.0, "seconds": 10.0}})
    with counting_energy(torch.device("cuda"), record):
        counter.now += 2_500
        record.update(status="running")
        assert read_results(tmp_path)["energy"]["joules"] == pytest.approx(102.5)
        counter.now += 1_000
    assert record.values["energy"]["joules"] == pytest.approx(103.5) and record.values["energy"]["seconds"] >= 10
    counter.now += 9_000
    record.update(status="finished")
    assert record.values["energy"]["joules"] == pytest.approx(103.5), "what comes after is not the run's"


def test_nothing_is_recorded_where_nothing_counts(tmp_path: Path) -> None:
    assert EnergyMeter(torch.device("cpu")).joules() is None
    record = RunWriter(tmp_path, {})
    with counting_energy(torch.device("cpu"), record):
        record.update(status="running")
    assert "energy" not in record.values
