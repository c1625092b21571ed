"""What the pages of this package and of the explorer are made from: the files in a package's `templates`."""

from __future__ import annotations

from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined

PACKAGE = "cartilha.reporting"


@cache
def environment(package: str = PACKAGE) -> Environment:
    """The package's templates: whatever they show is escaped, and a name that is not defined is an error."""
    return Environment(
        loader=PackageLoader(package), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def template_file(package: str, name: str) -> str:
    """The text of a style sheet, a script or a list of texts."""
    return (resources.files(package) / "templates" / name).read_text(encoding="utf-8")
