"""What a command returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Result:
    """A command's result: typed for callers from Python, and plain values for `--json`."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        return asdict(self)
