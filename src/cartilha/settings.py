"""What a configuration is made of: fields with a help text, and the base class that reads and writes their values."""

from __future__ import annotations

import os
from dataclasses import Field, dataclass, field, fields
from functools import partial
from inspect import get_annotations
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a configuration, with the text that the command line and `help(...)` show.

    The metadata: `required=True`; `positional=True` where the command line gives it a place instead of a flag;
    `hidden=True` for what only recipes set; `verbatim=True` for text in which `~/` is not the home directory;
    `writes=SUFFIX` for a file that the command writes; bounds of a number: `minimum` and `maximum`, which are allowed,
    and `above`, which is not; `decides=True` as `deciding` has it.
    """
    return field(default=default, metadata={"help": help, **metadata})


# An option that decides the result: a store made, or a run begun, with another value is not the one that is asked for.
deciding = partial(option, decides=True)

SEEDS = {"minimum": 0, "maximum": 2**63 - 1}  # what every generator of random numbers takes

IN_WORDS = "_in_words"  # ends the name of a recorded setting that says another one, by that name, for people


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the configurations: a string may stand for a list of one, a list for a tuple, and a path for a string.

    `~/` is the home directory.
    """

    def __post_init__(self) -> None:
        """Bring values to the types that are declared."""
        for item in fields(self):
            value = getattr(self, item.name)
            if str(item.type).startswith("tuple["):
                value = tuple(map(str, (value,) if isinstance(value, str | os.PathLike) else value))
            elif isinstance(value, os.PathLike):
                value = str(value)
            if not item.metadata.get("verbatim"):
                value = tuple(map(_at_home, value)) if isinstance(value, tuple) else _at_home(value)
            object.__setattr__(self, item.name, value)

    def to_dict(self) -> dict[str, Any]:
        """The values that can be given, as JSON and YAML keep them."""
        values = {}
        for item in options(type(self)):
            value = getattr(self, item.name)
            if isinstance(value, Settings):
                stage = value.to_dict()
                value = {name: stage[name] for name in stage if name not in item.metadata["set_by_job"]}
            values[item.name] = list(value) if isinstance(value, tuple) else value
        return values

    def deciding_values(self) -> dict[str, Any]:
        """Those that decide the result."""
        values = self.to_dict()
        return {item.name: values[item.name] for item in fields(self) if item.metadata.get("decides")}


def _at_home(value: Any) -> Any:
    # A shell expands neither `--output=~/run` nor what stands in Python or YAML.
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith(("~/", "~\\")) else value


def options(config: type[Settings]) -> list[Field[Any]]:
    """The fields of a configuration: its own, then those of the groups that it shares with other commands."""
    return sorted(fields(config), key=lambda item: item.name not in get_annotations(config))
