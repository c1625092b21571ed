"""Recipes: found by name inside the package, or by path."""

from __future__ import annotations

import difflib
import importlib.resources
import os
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from cartilha.errors import UserError

MAX_RECIPE_BYTES = 1_000_000


class _PlainLoader(yaml.SafeLoader):
    """Plain values only: no Python objects, and no aliases, a few lines of which can make gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node that is no alias."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "a recipe has no aliases (*name)")
        return super().compose_node(parent, index)


def recipe_names() -> list[str]:
    """The names of the built-in recipes."""
    folder = importlib.resources.files("cartilha.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The contents of a built-in recipe or of a YAML file; a UserError says that there is none, or no mapping."""
    names = recipe_names()
    if name in names:
        return read_settings(importlib.resources.files("cartilha.recipes") / f"{name}.yaml", f"The recipe {name}")
    if not Path(name).is_file():
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}, or give a YAML file."
        raise UserError(f"There is no recipe {name!r}; {hint}")
    return read_settings(name, f"The recipe {name}")


def read_settings(file: str | Traversable, what: str) -> dict[str, Any]:
    """The mapping in a YAML file, or a UserError that calls it `what`, such as `The file x.yaml`."""
    try:
        if isinstance(file, str) and os.path.getsize(file) > MAX_RECIPE_BYTES:
            raise UserError(f"{what} is larger than {MAX_RECIPE_BYTES // 1000} kB: it holds no settings.")
        text = (Path(file) if isinstance(file, str) else file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read ({error}).") from error
    try:
        values = yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise UserError(f"{what} is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date that does not exist
        where = str(error).splitlines()[-1].strip()
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            where = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise UserError(f"{what} is not valid YAML ({where}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{what} must be a YAML mapping such as `model: ...`.")
    return values
