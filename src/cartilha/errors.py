"""Every exception that a user can meet, and the log of notices; each message says what is wrong and what to do next.

The command line prints the message of an exception and ends with `exit_code`. An `assert` guards what only a fault of
ours can break. In the log, INFO is progress, WARNING is a fallback or a finding that the results must record.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

log = logging.getLogger("cartilha")


class UserError(ValueError):
    """A mistake in what was asked for: one sentence that names the fault and the remedy."""

    exit_code = 2


class UnfinishedError(UserError):
    """Something outside stopped the work half-way; what is done is kept, and the same command goes on."""


class HubUnreachableError(UnfinishedError):
    """A model or dataset of the hub is needed and cannot be had from here."""


class CheckFailedError(RuntimeError):
    """A check of the set-up failed; nothing was trained."""

    exit_code = 3


class OutOfMemoryError(RuntimeError):
    """The device's memory did not suffice; the run is recorded with the status `out_of_memory`."""

    exit_code = 2


class InterruptedRunError(RuntimeError):
    """The run was asked to stop; a checkpoint is saved and the same command with `--resume auto` goes on."""

    exit_code = 75


def missing_extra(what: str, extra: str) -> UserError:
    """The error for a feature (`what`, singular) whose optional dependencies are not installed."""
    return UserError(f"{what} needs the extra `{extra}`, which is not installed: {install_command(extra)}.")


def import_extra(module: str, what: str, extra: str) -> Any:
    """An optional dependency, imported; `missing_extra` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing_extra(what, extra) from None


def install_command(extra: str) -> str:
    """The command that installs an extra of this package from its own origin: index, URL, repository or clone."""
    from urllib.request import url2pathname  # takes a while to import

    try:
        record = json.loads(distribution("cartilha").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # the sources alone are on the path
        record = {}
    url = record.get("url", "")
    if record.get("dir_info", {}).get("editable"):
        what = f'-e "{_shortest(url2pathname(url.removeprefix("file://")))}[{extra}]"'
    else:
        repository = record.get("vcs_info")
        origin = f" @ {repository['vcs']}+{url}@{repository['commit_id']}" if repository else f" @ {url}" if url else ""
        what = f'"cartilha[{extra}]{origin}"'
    in_environment = sys.prefix != sys.base_prefix
    pip = _shortest(os.path.join(os.path.dirname(sys.executable), "pip")) if in_environment else "pip"
    return f"{shlex.quote(pip)} install {what}"


def _shortest(path: str) -> str:
    """A path as it is, or relative to the working directory where it lies below that."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive of Windows
        return path
    return path if relative.startswith("..") else relative


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop; the name of its type where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def counted(number: int, noun: str, one: str = "", many: str = "") -> str:
    """A number with its noun, for messages: `1 step`, `2 steps`, `12,345 micro-batches`; `one` or `many` follows it."""
    plural = "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{number:,} {noun} {one}".rstrip() if number == 1 else f"{number:,} {noun}{plural} {many}".rstrip()
