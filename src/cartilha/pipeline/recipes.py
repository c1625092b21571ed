"""Recipes: found by name inside the package, or by path."""

from __future__ import annotations

import difflib
import importlib.resources
from pathlib import Path
from typing import Any

import yaml

from cartilha.errors import UserError

MAX_RECIPE_BYTES = 1_000_000


class _PlainLoader(yaml.SafeLoader):
    """Plain values only: no Python objects, and no aliases, of which a few lines may make gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, unless it refers to another."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "a recipe has no aliases (*name)")
        return super().compose_node(parent, index)


def recipe_names() -> list[str]:
    """The names of the built-in recipes."""
    folder = importlib.resources.files("cartilha.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The contents of a built-in recipe or of a YAML file.

    Raises:
        UserError: No such recipe, or not a YAML mapping.
    """
    names = recipe_names()
    if name in names:
        text = (importlib.resources.files("cartilha.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(name)
        if not path.is_file():
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}, or give a YAML file."
            raise UserError(f"There is no recipe {name!r}; {hint}")
        try:
            if path.stat().st_size > MAX_RECIPE_BYTES:
                raise UserError(f"The recipe {name} is larger than {MAX_RECIPE_BYTES // 1000} kB: that is no recipe.")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The recipe {name} cannot be read ({error}).") from error
    try:
        values = yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise UserError(f"The recipe {name} is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date that does not exist
        where = str(error).splitlines()[-1].strip()
        raise UserError(f"The recipe {name} is not valid YAML ({where}).") from error
    if not isinstance(values, dict):
        raise UserError(f"The recipe {name} must be a YAML mapping such as `model: ...`.")
    return values
