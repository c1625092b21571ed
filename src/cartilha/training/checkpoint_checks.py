"""What is checked of a checkpoint before any of it is used: it may be damaged, or made to do harm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cartilha.training.state import Progress


def check_progress(values: Any) -> Progress:
    """The progress that state.json records; a ValueError names a number that is missing, none, or out of range."""
    known = {field.name: type(field.default) for field in fields(Progress)}
    if not isinstance(values, dict) or values.keys() != known.keys():
        raise ValueError("its progress has other fields")
    for name, kind in known.items():
        value = values[name]
        if type(value) not in (int, kind) or not 0 <= value < 2**63:  # true and false are no numbers here
            raise ValueError(f"its progress says {name} = {value!r:.40}")
    return Progress(**values)


def check_scaler(values: Any, enabled: bool) -> None:
    """Raise a ValueError unless a gradient scaler's state is numbers above 0, all there where it is at work."""
    expected = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"} if enabled else set()
    if not isinstance(values, dict) or values.keys() != expected:
        raise ValueError("its gradient scaler belongs to another dtype")
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0 <= value < 2**64 or (value == 0 and name != "_growth_tracker"):
            raise ValueError(f"its gradient scaler says {name} = {value!r}")


_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}  # as safetensors names them


def check_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Compare a safetensors file's header with the tensors that it must have, by name; no tensor is read.

    A ValueError names a tensor that is unknown, missing, or of another shape or type.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name in [*sorted(names - tensors.keys()), *sorted(tensors.keys() - names)]:
            raise ValueError(f"{name} is {'unknown' if name in names else 'missing'} in {path.name}")
        for name in sorted(names):
            tensor = file.get_slice(name)
            found = f"{tensor.get_dtype()} {tensor.get_shape()}"
            expected = f"{_TYPES[tensors[name].dtype]} {list(tensors[name].shape)}"
            if found != expected:
                raise ValueError(f"{name} is {found} in {path.name}, not {expected}")
