"""What a person sees during training: a panel on a terminal, otherwise a plain line from time to time."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from rich.columns import Columns
from rich.console import RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cartilha.console import PLAIN_INTERVAL_S, terminal
from cartilha.errors import log
from cartilha.evaluation.sums import perplexity
from cartilha.runs.files import RunWriter, read_samples
from cartilha.training.schedule import Schedule
from cartilha.training.state import StepRecord
from cartilha.units import show_duration

SAMPLE_CHARS = 240
RECENT = 0.1  # weight of the newest step in the means


@dataclass
class TrainingStatus:
    """What is known of a run after its latest step.

    `loss` (nats per token), `tokens_per_second` and `seconds_per_step` are recent means. The loss is read one step
    late, so that no step waits for the device.
    """

    title: str
    schedule: Schedule
    step: int = 0
    epoch: int = 1
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    seconds: float = 0.0
    memory_bytes: int | None = None
    validation_perplexity: float | None = None
    sample: str = ""
    _previous: StepRecord | None = None
    _num_steps: int = 0

    def update(self, step: StepRecord) -> None:
        """Take a step's record."""
        if self._previous is not None:
            loss = float(self._previous.loss)
            self.loss = _mean(self.loss, loss) if math.isfinite(loss) else self.loss
        self._previous = step
        self.step, self.epoch, self.memory_bytes = step.step, step.epoch, step.memory_bytes
        self.seconds = step.total_seconds
        self._num_steps += 1
        # The first step of a process may compile: it is shown until there is another one, and then forgotten.
        seconds, rate = (None, None) if self._num_steps == 2 else (self.seconds_per_step, self.tokens_per_second)
        self.seconds_per_step = _mean(seconds, step.seconds)
        self.tokens_per_second = _mean(rate, step.tokens_per_second)

    def read(self, record: RunWriter) -> None:
        """Take the last evaluation and the last text that the run has recorded."""
        evaluations = record.values.get("evaluations") or [{}]
        self.validation_perplexity = evaluations[-1].get("perplexity")
        samples = read_samples(record.path)
        # A terminal obeys control characters, and a model may write any.
        shown = "".join(c if c.isprintable() else " " for c in samples[-1]["text"]) if samples else ""
        self.sample = shown[:SAMPLE_CHARS] + ("…" if len(shown) > SAMPLE_CHARS else "")

    @property
    def seconds_left(self) -> float | None:
        """Until the steps or the time budget end, whichever comes first; without evaluations."""
        if self.seconds_per_step is None:
            return None
        left = (self.schedule.num_steps - self.step) * self.seconds_per_step
        budget = self.schedule.time_budget_s
        return left if budget is None else min(left, max(0.0, budget - self.seconds))

    def figures(self) -> dict[str, str]:
        """Name and text of each figure that is known."""
        found = {"epoch": str(self.epoch)}
        if self.loss is not None:
            found["loss"] = f"{self.loss:.3f} nats/token"
            found["perplexity"] = f"{perplexity(self.loss):,.2f}"
        if self.validation_perplexity is not None:
            found["validation"] = f"perplexity {self.validation_perplexity:,.2f}"
        if self.tokens_per_second is not None:
            found["speed"] = f"{self.tokens_per_second:,.0f} tokens/s"
        if self.memory_bytes is not None:
            found["memory"] = f"{self.memory_bytes / 1e9:.2f} GB"
        if self.seconds_left is not None:
            found["time left"] = show_duration(self.seconds_left)
        return found

    def line(self) -> str:
        """All figures in one line, for a log."""
        figures = ", ".join(f"{name} {text}" for name, text in self.figures().items())
        return f"Step {self.step:,} of {self.schedule.num_steps:,}: {figures}"

    def __rich__(self) -> RenderableType:
        total = self.schedule.num_steps
        parts = (((f"{name} ", "dim"), (text, "bold")) for name, text in self.figures().items())
        figures = [Text.assemble(*both, no_wrap=True) for both in parts]
        rows = Table.grid(expand=True)  # a bar ends no line by itself: a row does
        rows.add_row(ProgressBar(total=total, completed=self.step))
        rows.add_row(Columns(figures, padding=(0, 3)))
        if self.sample:
            rows.add_row(Text(self.sample, style="italic"))
        return Panel(rows, title=Text(f"{self.title}: step {self.step:,} of {total:,}"), title_align="left")


@contextmanager
def training_view(record: RunWriter, schedule: Schedule, title: str) -> Iterator[Callable[[StepRecord], None]]:
    """Show a run while the block lasts; yields a function that takes each step's record and waits for no device."""
    if not log.isEnabledFor(logging.INFO) or not log.hasHandlers():
        yield lambda step: None
        return
    status, on_terminal = TrainingStatus(title, schedule), sys.stderr.isatty()
    num_read, last = -1, time.monotonic()

    def take(step: StepRecord) -> None:
        nonlocal num_read, last
        if num_read != len(record.values["evaluations"]):
            num_read = len(record.values["evaluations"])
            status.read(record)
        status.update(step)
        if not on_terminal and time.monotonic() - last >= PLAIN_INTERVAL_S:
            last = time.monotonic()
            log.info("%s", status.line())

    panel = Live(status, console=terminal(), transient=True, refresh_per_second=4) if on_terminal else nullcontext()
    with panel:
        yield take


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + RECENT * (new - old)
