"""What the figures were taken on, asked in a process of its own: whoever starts the sections holds no GPU memory."""

from __future__ import annotations

import platform
from typing import Any

import torch

from training_speed.setup import Shape


def describe(shape: Shape) -> dict[str, Any]:
    """The device of this name, `available` or not; of a CUDA device its capability and memory too."""
    from cartilha.machine.versions import versions

    about = {"versions": versions(), "cuda": torch.version.cuda}
    if shape.device == "cpu":
        return {"available": True, "name": platform.processor() or "cpu", "capability": None, **about}
    if not torch.cuda.is_available():
        return {"available": False, "name": "", "capability": None, **about}
    free, total = torch.cuda.mem_get_info()
    capability = list(torch.cuda.get_device_capability())
    return {"available": True, "name": torch.cuda.get_device_name(), "capability": capability,
            "free_bytes": free, "total_bytes": total, **about}  # fmt: skip
