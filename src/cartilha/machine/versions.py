"""Versions of the software that a result depends on."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence

TEXT_PACKAGES = ("cartilha", "tokenizers", "numpy", "pyarrow")  # what the ids of a text depend on
MODEL_PACKAGES = ("cartilha", "torch", "transformers", "tokenizers", "numpy", "pyarrow")


def versions(packages: Sequence[str] = MODEL_PACKAGES) -> dict[str, str]:
    """Versions of Python and of these packages."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if "torch" in found and "torch" in sys.modules:  # its own version names the build, such as +cpu or +cu130
        found["torch"] = str(sys.modules["torch"].__version__)
    return found
