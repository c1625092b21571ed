"""What makes our training fast on a GPU, each of which can be turned off in this process to see what it is worth."""

from __future__ import annotations

import importlib
from typing import Any


def _read_at_once(*scalars: Any) -> Any:
    from cartilha.training.late import read_late

    copy, numbers = read_late(*scalars)
    copy.wait()
    return copy, numbers


# By name: what is replaced, and by what.
SWITCHES: dict[str, tuple[str, Any]] = {
    "late reading": ("cartilha.training.loop.read_late", _read_at_once),
    "large chunks": ("cartilha.model.loss._chunk_on", lambda device, head, dtype: 1024),
    "the factor in the kernel": ("cartilha.model.compiling.query_factors", lambda model: ()),
    "the clip in AdamW": ("cartilha.training.optimizer.CLIPS_IN_STEP", ()),
    "flash attention 3": ("cartilha.model.attention.flash_attention_3", lambda device_type: False),
}


def turn_off(name: str) -> None:
    """Replace one of `SWITCHES` for the rest of this process."""
    path, replacement = SWITCHES[name]
    module, attribute = path.rsplit(".", 1)
    setattr(importlib.import_module(module), attribute, replacement)
