"""The energy of a run: added up over commands, of GPUs and of processors, and absent where nothing counts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cartilha.machine import energy
from cartilha.machine.energy import EnergyMeter
from cartilha.runs.energy import counting_energy
from cartilha.runs.files import RunWriter, read_results


class Nvml:
    """What the meter asks of NVML, in millijoules."""

    now = 5_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object, found: object) -> int:
        found._obj.value = self.now
        return 0


def test_energy_is_added_to_that_of_the_commands_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml()
    monkeypatch.setattr(energy._Gpu, "of", classmethod(lambda cls, device: cls(library, None)))
    record = RunWriter(tmp_path, {"energy": {"joules": 100.0, "seconds": 10.0}})
    with counting_energy(torch.device("cuda"), record):
        library.now += 2_500
        record.update(status="running")
        assert read_results(tmp_path)["energy"]["joules"] == pytest.approx(102.5)
        library.now += 1_000
    found = record.values["energy"]
    assert found["joules"] == pytest.approx(103.5) and found["seconds"] >= 10 and found["source"] == "NVML"
    library.now += 9_000
    record.update(status="finished")
    assert record.values["energy"]["joules"] == pytest.approx(103.5), "what comes after is not the run's"


@pytest.fixture
def zones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two processors, one with its memory, in microjoules; and zones that are parts of these or hold them."""
    names = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    found = {}
    for number, name in names.items():
        zone = found[name] = tmp_path / "powercap" / f"intel-rapl:{number}"
        zone.mkdir(parents=True)
        for file, text in (("name", name), ("energy_uj", "1000000"), ("max_energy_range_uj", "9000000")):
            (zone / file).write_text(f"{text}\n", encoding="ascii")
    monkeypatch.setattr(energy, "RAPL", tmp_path / "powercap")
    return found


def test_processors_and_their_memory_are_counted_across_the_end_of_their_counters(zones: dict[str, Path]) -> None:
    meter = EnergyMeter(torch.device("cpu"))
    assert meter.joules() == 0 and meter.source == "RAPL"
    for name, now in (("package-0", 3_000_000), ("package-1", 1_500_000), ("dram", 1_250_000), ("core", 8_000_000)):
        (zones[name] / "energy_uj").write_text(str(now), encoding="ascii")
    assert meter.joules() == pytest.approx(2.75)
    (zones["package-0"] / "energy_uj").write_text("500000", encoding="ascii")  # 6.5 J more
    assert meter.joules() == pytest.approx(9.25)


def test_a_long_run_is_counted_between_its_records(
    zones: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cartilha.runs.energy.READ_EVERY_S", 0.0)
    record = RunWriter(tmp_path, {})
    with counting_energy(torch.device("cpu"), record) as after_step:
        for now in (8_000_000, 6_000_000, 4_000_000):  # 7 J each
            (zones["package-1"] / "energy_uj").write_text(str(now), encoding="ascii")
            after_step()
    assert record.values["energy"]["joules"] == pytest.approx(21) and record.values["energy"]["source"] == "RAPL"


@pytest.mark.parametrize("fault", ["absent", "forbidden"])
def test_nothing_is_recorded_where_nothing_counts(
    fault: str, zones: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "absent":
        monkeypatch.setattr(energy, "RAPL", tmp_path / "nowhere")
    else:

        def refuse(counter: object) -> list[int]:
            raise PermissionError

        monkeypatch.setattr(energy._Processors, "_read", refuse)
    assert EnergyMeter(torch.device("cpu")).joules() is None
    record = RunWriter(tmp_path, {})
    with counting_energy(torch.device("cpu"), record):
        record.update(status="running")
    assert "energy" not in record.values
