"""What a person sees while a command works: one-line notices, and progress with rate and time left.

Everything goes to standard error, so that `--json` has standard output to itself. Stages only log
(`logging.getLogger("cartilha")`): INFO is progress, WARNING is a fallback or a finding that the results must record.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cartilha.config import COMMANDS, RunConfig

log = logging.getLogger("cartilha")

PLAIN_INTERVAL_S = 10.0


class Advance(Protocol):
    """Reports work done: `advance(amount)`, with an optional note that replaces the last one."""

    def __call__(self, amount: float, note: str = "") -> None:
        """Add `amount` of work."""


class OptionNames(logging.Filter):
    """Names options in messages as the command that runs has them; `flags` are its own.

    Messages are written where the fault is found, by code that several commands share: in a job `--allow_changes` is
    `--train.allow_changes`, and `--on_error`, which `evaluate` lacks, is `cartilha prepare --on_error`.
    """

    def __init__(self, flags: Collection[str]) -> None:
        super().__init__()
        self._flags = flags
        # Of several commands with an option of one name, the first is named with it.
        commands = [(name, config) for name, config in COMMANDS.items() if config is not RunConfig]
        self._homes = {f"--{item.name}": name for name, config in reversed(commands) for item in fields(config)}

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the message of a log record."""
        record.msg, record.args = self.named(record.getMessage()), ()
        return True

    def named(self, message: str) -> str:
        """The message with this command's options; those after the name of a command are that command's, and stay."""
        return re.sub(r"cartilha \w+[^;`]*|(?<![\w-])--[a-z]\w*(?![\w-]|\.\w)", self._named, message)

    def _named(self, found: re.Match[str]) -> str:
        option = found[0]
        if option in self._flags or option not in self._homes:
            return option
        stages = [flag for flag in self._flags if flag.endswith(f".{option[2:]}")]
        return " or ".join(stages) or f"cartilha {self._homes[option]} {option}"


def named_options(message: str) -> str:
    """The message as the log's `OptionNames` would write it, if a command has set one."""
    filters = (known for handler in log.handlers for known in handler.filters)
    return next((known.named(message) for known in filters if isinstance(known, OptionNames)), message)


@cache
def terminal() -> Console:
    """The terminal behind standard error: one for lines and bars alike, so that none writes over another."""
    return Console(stderr=True)


def set_up_logging() -> None:
    """Send the project's log lines to standard error, a line each."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(console=terminal(), show_time=False, show_path=False, show_level=False)
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    # Of several processes one reports progress, the others only errors.
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    log.propagate = False


def silence_bars() -> None:
    """Keep other libraries' progress bars out of logs, in a process of ours only.

    tqdm, which those libraries draw with, reads its variable when it is loaded: call this before. The bars of downloads
    stay on a terminal. The hub's client would report each retry; our own sentence follows if all of them fail.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def show_by_default() -> None:
    """Show notices and progress to callers from Python, unless they gave the project's logger a level or a handler.

    If the root logger has handlers, as in Colab, they show the lines.
    """
    if log.level != logging.NOTSET or log.handlers:
        return
    if logging.root.handlers:
        log.setLevel(logging.INFO)
    else:
        set_up_logging()


@contextmanager
def progress(title: str, total: float | None, unit: str) -> Iterator[Advance]:
    """Show progress: a bar on a terminal, else a plain line every ten seconds, so that a log stays readable.

    Args:
        title: What is being done.
        total: Amount of work, in `unit`; None if it is not known.
        unit: Plural name of the unit, for the rate.
    """
    if not log.isEnabledFor(logging.INFO) or not log.hasHandlers():
        yield lambda amount, note="": None
    elif sys.stderr.isatty():
        columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        with Progress(TextColumn("{task.description}"), *columns, console=terminal(), transient=True) as bar:
            task = bar.add_task(title, total=total, note="")
            started = time.monotonic()

            def advance(amount: float, note: str = "") -> None:
                rate = (bar.tasks[0].completed + amount) / max(time.monotonic() - started, 1e-9)
                bar.update(task, advance=amount, note=f"{_show_rate(rate)} {unit}/s  {note}")

            yield advance
    else:
        yield _plain_lines(title, total, unit)


def _plain_lines(title: str, total: float | None, unit: str) -> Advance:
    started = last = time.monotonic()
    done = 0.0

    def advance(amount: float, note: str = "") -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            rate = done / (now - started)
            left = f", {(total - done) / rate:,.0f} s left" if total and rate else ""
            of = f" of {total:,.0f}" if total else ""
            line = f"{title}: {done:,.0f}{of} {unit}, {_show_rate(rate)} {unit}/s{left}"
            log.info("%s%s", line, f" ({note})" if note else "")

    return advance


def _show_rate(rate: float) -> str:
    """A rate that may be steps per minute or millions of bytes per second."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
