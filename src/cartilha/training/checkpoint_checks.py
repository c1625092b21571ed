"""What is checked of a checkpoint before any of it is used: it may be damaged, or made to do harm."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import safe_open

from cartilha.training.state import Progress


def check_progress(values: Any) -> Progress:
    """The progress that state.json records.

    Raises:
        ValueError: A number is missing, not a number, or out of range.
    """
    known = {field.name: type(field.default) for field in fields(Progress)}
    if not isinstance(values, dict) or values.keys() != known.keys():
        raise ValueError("its progress has other fields")
    for name, kind in known.items():
        value = values[name]
        right_kind = isinstance(value, int) if kind is int else isinstance(value, (int, float))
        if not right_kind or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise ValueError(f"its progress says {name} = {value!r}")
        if value >= 2**63:
            raise ValueError(f"its progress says {name} = {value:.0e}")
    return Progress(**values)


def check_scaler(values: Any, enabled: bool) -> None:
    """Check a gradient scaler's state: numbers above 0, all there where the scaler is at work.

    Raises:
        ValueError: It is not such a state.
    """
    expected = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"} if enabled else set()
    if not isinstance(values, dict) or values.keys() != expected:
        raise ValueError("its gradient scaler belongs to another dtype")
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0 <= value < 2**64 or (value == 0 and name != "_growth_tracker"):
            raise ValueError(f"its gradient scaler says {name} = {value!r}")


def check_tensors(path: Path, shapes: dict[str, tuple[int, ...]], *, all_there: bool = True) -> None:
    """Compare a safetensors file's header with the expected shapes by name, all float32; no tensor is read.

    With `all_there`, each of them must be in the file.

    Raises:
        ValueError: A tensor is missing, unknown, or of another shape or type.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        missing = shapes.keys() - names if all_there else ()
        for name in [*sorted(names - shapes.keys()), *sorted(missing)]:
            raise ValueError(f"{name} is {'unknown' if name in names else 'missing'} in {path.name}")
        for name in sorted(names):
            tensor = file.get_slice(name)
            if tuple(tensor.get_shape()) != shapes[name] or tensor.get_dtype() != "F32":
                found = f"{tensor.get_dtype()} {list(tensor.get_shape())}"
                raise ValueError(f"{name} is {found} in {path.name}, not F32 {list(shapes[name])}")
