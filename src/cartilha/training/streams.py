"""The streams of random numbers that training may draw from: torch's on every device, Python's and numpy's."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """States of all generators, as plain values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": _to_text(torch.get_rng_state()),
        "cuda": [_to_text(s) for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
    }
    if torch.backends.mps.is_available():
        state["mps"] = _to_text(torch.mps.get_rng_state())
    return state


def restore_random_state(saved: dict[str, Any]) -> None:
    """Put the generators back, except those of devices that are not here.

    A ValueError, TypeError, KeyError or RuntimeError says that `saved` is not a state of these generators.
    """
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_text(saved["torch"]))
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_from_text(text) for text in saved["cuda"]])
    if torch.backends.mps.is_available() and "mps" in saved:
        torch.mps.set_rng_state(_from_text(saved["mps"]))


@contextmanager
def random_numbers_apart() -> Iterator[None]:
    """Put all generators back at the end of the block, whatever was drawn or seeded in it."""
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(before)


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
