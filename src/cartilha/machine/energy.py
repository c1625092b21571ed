"""The energy that a GPU has used, as it counts itself (NVML); nothing is estimated where nothing counts."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class EnergyMeter:
    """Joules that this process's device has used since the meter was made: all of the device, whoever uses it.

    NVML counts them on GPUs of the Volta generation and later; elsewhere, and on a part of a GPU (MIG), there are none.
    """

    def __init__(self, device: torch.device) -> None:
        self._counter = _counter(device) if device.type == "cuda" else None
        self._begun = self._read()

    def joules(self) -> float | None:
        """Since the meter was made, or None where the device does not count."""
        now = self._read()
        return None if now is None or self._begun is None else now - self._begun

    def _read(self) -> float | None:
        if self._counter is None:
            return None
        library, handle = self._counter
        millijoules = ctypes.c_ulonglong()
        failed = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return None if failed else millijoules.value / 1000


def _counter(device: torch.device) -> tuple[Any, ctypes.c_void_p] | None:
    """NVML and its handle of a device; None without the library, or where it does not know the device."""
    import torch

    handle = ctypes.c_void_p()
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        name = b"GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-").encode()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
            return None
    except (OSError, AttributeError):
        return None
    return library, handle
