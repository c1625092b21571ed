"""The energy that a device has used, as it counts itself: GPUs by NVML, processors by RAPL. Nothing is estimated."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

if TYPE_CHECKING:
    import torch

RAPL = Path("/sys/class/powercap")


class Counter(Protocol):
    """Counts joules from some moment on, whoever uses them."""

    name: ClassVar[str]  # in records, which say by it what was counted

    def joules(self) -> float | None:
        """Since that moment; None where they cannot be read (any more)."""


class EnergyMeter:
    """Joules that this process's device has used since the meter was made: all of the device, whoever uses it.

    There is none on a part of a GPU (MIG), on GPUs before Volta, and for processors in most virtual machines and where
    only root may read their counters.
    """

    def __init__(self, device: torch.device) -> None:
        found = _Gpu.of(device) if device.type == "cuda" else _Processors.of() if device.type == "cpu" else None
        self._counter: Counter | None = found
        self._begun = found.joules() if found is not None else None

    @property
    def source(self) -> str | None:
        """The counter's name: `NVML` or `RAPL`, or None."""
        return None if self._counter is None else self._counter.name

    def joules(self) -> float | None:
        """Since the meter was made, or None where the device does not count."""
        now = None if self._counter is None else self._counter.joules()
        return None if now is None or self._begun is None else now - self._begun


class _Gpu:
    """One GPU, which NVML counts from the Volta generation on."""

    name: ClassVar[str] = "NVML"

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def of(cls, device: torch.device) -> Self | None:
        """None without the library, or where it does not know the device."""
        import torch

        handle = ctypes.c_void_p()
        try:
            library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
            name = b"GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-").encode()
            if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
                return None
        except (OSError, AttributeError):
            return None
        return cls(library, handle)

    def joules(self) -> float | None:
        millijoules = ctypes.c_ulonglong()
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
        return None if failed else millijoules.value / 1000


class _Processors:
    """All processors of a Linux machine with their memory, where that is counted apart (Intel's RAPL; AMD has it, too).

    Their counters begin anew at some hundred kilojoules. They must be read before they have gone round, within half an
    hour.
    """

    name: ClassVar[str] = "RAPL"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._ranges = [int((zone / "max_energy_range_uj").read_text(encoding="ascii")) for zone in zones]
        self._last = self._read()
        self._microjoules = 0

    @classmethod
    def of(cls) -> Self | None:
        """None where there is no such counter, or where this user may not read it."""
        try:
            zones = [zone for zone in sorted(RAPL.glob("intel-rapl:*")) if _is_counted(zone)]
            return cls(zones) if zones else None
        except (OSError, ValueError):
            return None

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text(encoding="ascii")) for zone in self._zones]

    def joules(self) -> float | None:
        with suppress(OSError, ValueError):
            now = self._read()
            for each, before, size in zip(now, self._last, self._ranges, strict=True):
                self._microjoules += each - before if each >= before else each - before + size
            self._last = now
            return self._microjoules / 1e6
        return None


def _is_counted(zone: Path) -> bool:
    """Whether a zone is a processor, or the memory beside it; others are parts of these, or hold them (`psys`)."""
    return (zone / "name").read_text(encoding="ascii").startswith(("package", "dram"))
