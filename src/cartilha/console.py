"""What a person sees while a command works: one-line notices, and progress with rate and time left.

Everything goes to standard error, so that `--json` has standard output to itself. Stages only log (`errors.log`).
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from typing import Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cartilha.config import COMMANDS, RunConfig
from cartilha.errors import log

PLAIN_INTERVAL_S = 10.0
NOTEBOOK_INTERVAL_S = 0.5


class Advance(Protocol):
    """Reports work done: `advance(amount)`, with an optional note that replaces the last one."""

    def __call__(self, amount: float, note: str = "", of: float | None = None) -> None:
        """Add `amount` of work; `of` is all of it, where that becomes known on the way."""


class OptionNames(logging.Filter):
    """Names options in messages as the command that runs has them; `flags` are its own, none before it is known.

    Messages are written where the fault is found, by code that several commands share: in a job `--allow_changes` is
    `--train.allow_changes`, and `--on_error`, which `evaluate` lacks, is `cartilha prepare --on_error`.
    """

    def __init__(self, flags: Collection[str] = ()) -> None:
        super().__init__()
        self.flags = flags
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
        if not self.flags or option in self.flags or option not in self._homes:
            return option
        stages = [flag for flag in self.flags if flag.endswith(f".{option[2:]}")]
        return " or ".join(stages) or f"cartilha {self._homes[option]} {option}"


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
    """Keep other libraries' progress bars and warnings away, in a process of ours only, before they are loaded."""
    # What the hub's clients would say is said by `hub` and `model_reference`.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def _has_live_bar() -> bool:
    """Whether a bar can be drawn again and again in one place: on a terminal, or in a notebook that has widgets."""
    return sys.stderr.isatty() or (terminal().is_jupyter and find_spec("ipywidgets") is not None)


def show_by_default() -> None:
    """Show notices and progress to callers from Python, unless they gave the project's logger a level or a handler."""
    if log.level != logging.NOTSET or log.handlers:
        return
    if logging.root.handlers:  # as in Colab: they show the lines
        log.setLevel(logging.INFO)
    else:
        set_up_logging()


@contextmanager
def collecting_notices() -> Iterator[list[str]]:
    """A list of the project's warnings while the block lasts: fallbacks and findings that the results must record."""
    notices: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notices.append(record.getMessage())

    collector = Collector(logging.WARNING)
    log.addHandler(collector)
    try:
        yield notices
    finally:
        log.removeHandler(collector)


@contextmanager
def progress(title: str, total: float | None, unit: str) -> Iterator[Advance]:
    """Show progress: a bar on a terminal or in a notebook, else a plain line every ten seconds, as suits a log.

    `total` is the amount of work, None if it is not known; `unit` the plural name of what it counts.
    """
    if not log.isEnabledFor(logging.INFO) or not log.hasHandlers():
        yield lambda amount, note="", of=None: None
        return
    is_live = _has_live_bar()
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    # A notebook takes what its other threads print for output of the cell, so there the bar is drawn by this thread.
    refresh = not terminal().is_jupyter
    text = TextColumn("{task.description}")
    bar = Progress(text, *columns, console=terminal(), transient=True, auto_refresh=refresh)
    task = bar.add_task(title, total=total, note="")
    started = last = time.monotonic()
    done = 0.0

    def advance(amount: float, note: str = "", of: float | None = None) -> None:
        nonlocal done, last, total
        done += amount
        if of is not None and of != total:
            total = of
            bar.update(task, total=of)
        now = time.monotonic()
        rate = done / max(now - started, 1e-9)
        speed = f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"  # from steps per minute to megabytes
        if is_live:
            bar.update(task, advance=amount, note=f"{speed}  {note}")
            if not refresh and now - last >= NOTEBOOK_INTERVAL_S:
                last = now
                bar.refresh()
        elif now - last >= PLAIN_INTERVAL_S:
            last = now
            left = f", {(total - done) / rate:,.0f} s left" if total and rate else ""
            whole = f" of {total:,.0f}" if total else ""
            told = f" ({note})" if note else ""
            log.info("%s: %s%s %s, %s%s%s", title, f"{done:,.0f}", whole, unit, speed, left, told)

    with bar if is_live else nullcontext():
        yield advance
