"""Scalars of a step that are read late: they are copied to the host as soon as the device has computed them.

`tensor.item()` would wait for all that the device has been given meanwhile, and so for the next step, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class HostCopy:
    """A tensor's copy in the host's memory; on CUDA it is made behind the work that was launched before it."""

    def __init__(self, tensor: Tensor) -> None:
        self._made: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            stream = torch.cuda.current_stream(tensor.device)
            tensor = tensor.to("cpu", non_blocking=True)  # pinned memory: the host does not wait
            self._made = torch.cuda.Event()
            self._made.record(stream)
        self._values = tensor

    def wait(self) -> None:
        """Wait until the copy is made, and for nothing that was launched after it; only CUDA needs that."""
        if self._made is not None:
            self._made.synchronize()

    def values(self) -> list[float]:
        """The copy, which this waits for."""
        self.wait()
        found: list[float] = self._values.tolist()
        return found


@dataclass(frozen=True)
class LateScalar:
    """One number of a copy. `float` and `bool` wait for it."""

    copy: HostCopy
    place: int

    def __float__(self) -> float:
        return self.copy.values()[self.place]

    def __bool__(self) -> bool:
        return bool(float(self))


def read_late(*scalars: Tensor) -> tuple[HostCopy, list[LateScalar]]:
    """Begin to copy float32 or boolean scalars of one device, together; returns the copy and its numbers."""
    copy = HostCopy(torch.stack([scalar.float() for scalar in scalars]))
    return copy, [LateScalar(copy, place) for place in range(len(scalars))]
