"""metrics.jsonl: one line per step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from cartilha.errors import counted, log
from cartilha.machine.processes import is_main_process
from cartilha.storage import parse_json, to_json, write_atomically
from cartilha.training.state import StepRecord
from cartilha.training.trackers import Tracker, figures_of
from cartilha.training.watch import LossWatch


class MetricsFile:
    """Writes metrics.jsonl: each step's line when the next step comes, so that no step waits for the device.

    Lines after `resumed_step`, the steps already taken, are dropped, and so is a torn last line. `watch` judges each
    step as it is written, and adds its marks to the line; `tracker` mirrors what is written.
    """

    def __init__(self, path: Path, resumed_step: int, watch: LossWatch, tracker: Tracker | None = None) -> None:
        # Of several processes only the main one writes.
        self._file: IO[str] = _open_at(path, resumed_step) if is_main_process() else open(os.devnull, "w")  # noqa: SIM115
        self._watch = watch
        self._tracker = tracker
        self._pending: StepRecord | None = None

    def step(self, record: StepRecord) -> None:
        """Take a step's record; the one before is written."""
        self.flush()
        self._pending = record

    def evaluation(self, step: int, epoch: int, evaluation: dict[str, Any]) -> None:
        """Write an evaluation made after `step`."""
        self.flush()
        self._write({"step": step, "epoch": epoch, "evaluation": evaluation})

    def flush(self) -> None:
        """Write the record that is held back."""
        record, self._pending = self._pending, None
        if record is not None:
            self._write(
                {
                    "step": record.step,
                    "epoch": record.epoch,
                    "tokens": record.tokens,
                    "loss": float(record.loss),
                    "lr": record.lr,
                    "grad_norm": float(record.grad_norm),
                    "tokens_per_second": record.tokens_per_second,
                    "memory_bytes": record.memory_bytes,
                    "micro_batch_size": record.micro_batch_size,
                    "seconds": record.total_seconds,
                    **self._watch.judge(record),
                }
            )

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(to_json(line) + "\n")
        self._file.flush()
        if self._tracker is not None:
            self._tracker.log(line["step"], figures_of(line))

    def texts(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Hand prompts, and what the model made of them after `step`, to the tracker; samples.jsonl has them, too."""
        if self._tracker is not None:
            for number, (prompt, text) in enumerate(texts, 1):
                self._tracker.text(step, f"samples/{number} {prompt.strip()}", text)

    def sync(self) -> None:
        """Write what is held back to the disk itself: the steps before a checkpoint must last as long as it does."""
        self.flush()
        if is_main_process():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is held back and close the file."""
        self.flush()
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()


def _open_at(path: Path, resumed_step: int) -> IO[str]:
    """The metrics file, cut after the last line of the steps already taken, open for appending."""
    kept, steps = [], set()
    if resumed_step and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # splitlines would split at U+2028
            try:
                values = parse_json(line)
                if values["step"] <= resumed_step:
                    kept.append(line + "\n")
                    steps |= {values["step"]} if "evaluation" not in values else set()
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill
    lacking = resumed_step - len(steps)
    if lacking > 0:
        log.warning(
            "%s has lost %d of the %s before this one: their curve has a gap.",
            *(path, lacking, counted(resumed_step, "step")),
        )
    write_atomically(path, "".join(kept))
    return path.open("a", encoding="utf-8")
