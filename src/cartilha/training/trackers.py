"""Mirrors of metrics.jsonl: TensorBoard, Trackio, W&B, MLflow, or a plug-in; metrics.jsonl itself stays complete.

A tracker is any object with the three methods of `Tracker`. A plug-in is a function that makes one, named in the entry
points (group `cartilha.trackers`) of its package; docs/trackers.md shows one. A tracker that fails is left out from
then on, with one warning, and the run goes on.
"""

from __future__ import annotations

import math
import re
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partialmethod
from html import escape
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from cartilha.errors import UserError, install_command, log, missing_extra
from cartilha.storage import write_atomically

ENTRY_POINTS = "cartilha.trackers"
STEP_FIGURES = ("loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "epoch", "tokens")
EVALUATION_FIGURES = ("loss", "perplexity", "word_perplexity", "bits_per_byte", "bits_per_char")


class Tracker(Protocol):
    """Takes what a run records; nothing comes after `close`."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take figures of a step: `train/loss`, `validation/bits_per_byte`, `validation/bits_per_byte/DOMAIN` ..."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a text that the model wrote after that step."""

    def close(self) -> None:
        """Write what is held back."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told at the beginning."""

    path: Path  # the run's directory; trackers that write files put them in a folder of their own there
    resumed_step: int  # steps already taken; later steps that were logged before are repeated
    settings: Mapping[str, Any]


class _TensorBoard:
    """Event files in RUN/tensorboard; those of steps that a resume repeats are purged."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.resumed_step + 1 if run.resumed_step else None
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)
        if not run.resumed_step:
            rows = "\n".join(f"    {name}: {value}" for name, value in run.settings.items())
            self._writer.add_text("settings", rows, 0)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """A local Trackio project named after the directory that holds the run; `trackio show` opens it."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        project, name, _ = _names(run)
        resume = "allow" if run.resumed_step else "never"
        with redirect_stdout(sys.stderr):  # it prints to standard output, which belongs to `--json`
            self._run = trackio.init(project, name=name, config=dict(run.settings), resume=resume, embed=False)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


class _Wandb(_Trackio):
    """A run of Weights & Biases, whose interface Trackio has, too; its files are in RUN/wandb.

    Its own variables hold (WANDB_MODE=offline ...).
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        project, name, key = _names(run)
        with redirect_stdout(sys.stderr):
            self._run = wandb.init(
                project=project, name=name, id=key, config=dict(run.settings), dir=str(run.path), resume="allow"
            )

    def text(self, step: int, name: str, text: str) -> None:
        import wandb

        self._run.log({name: wandb.Html(f"<pre>{escape(text)}</pre>")}, step=step)


class _MLflow:
    """A run of MLflow at MLFLOW_TRACKING_URI (where that is not set: MLflow's own default)."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        project, name, key = _names(run)
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        before = self._client.search_runs([experiment], f"tags.cartilha = '{key}'", max_results=1)
        if before and run.resumed_step:
            self._id = before[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            return
        self._id = self._client.create_run(experiment, run_name=name, tags={"cartilha": key}).info.run_id
        for setting, value in run.settings.items():
            self._client.log_param(self._id, setting, value)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            # A store in files keeps `a/b` as a file, which cannot be the directory of `a/b/c`, too.
            group, _, figure = _plain(name).partition("/")
            self._client.log_metric(self._id, f"{group}/{figure.replace('/', '.')}", value, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{_plain(name)}/step-{step:08d}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _plain(name: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^\w. /-]", "_", name)


def _names(run: TrackedRun) -> tuple[str, str, str]:
    """A project for the directory that holds the run, the run's name, and a key by which a resume finds it again."""
    path, kept = run.path.resolve(), run.path / "tracker.id"
    if not (run.resumed_step and kept.is_file()):
        write_atomically(kept, uuid.uuid4().hex[:16])
    return path.parent.name or "cartilha", path.name, kept.read_text(encoding="utf-8")


# Each tracker, and the extra that it needs.
_OURS: dict[str, tuple[Callable[[TrackedRun], Tracker], str]] = {
    "tensorboard": (_TensorBoard, "trackers"),
    "trackio": (_Trackio, "trackers"),
    "wandb": (_Wandb, "wandb"),
    "mlflow": (_MLflow, "mlflow"),
}


def check_tracker(name: str) -> None:
    """Refuse, with a UserError, a name that neither a tracker of ours nor a plug-in has, and one not installed."""
    known = ["none", *_OURS, *_plug_ins()]
    if name not in known:
        raise UserError(
            f"There is no tracker {name!r}; choose from {', '.join(known)}, or install a plug-in (docs/trackers.md)."
        )
    if name in _OURS and find_spec(name) is None:
        raise missing_extra(f"The tracker {name}", _OURS[name][1])


def open_tracker(name: str, run: TrackedRun) -> Tracker | None:
    """The tracker of that name, made safe; None for `none`. A UserError says that it is missing or does not start."""
    if name == "none":
        return None
    make, extra = _OURS.get(name, (None, "trackers"))
    try:
        make = make or _plug_ins()[name].load()
        return _Careful(name, make(run))
    except ImportError as error:
        raise UserError(
            f"The tracker {name} is not installed ({error}); install it with: {install_command(extra)}"
        ) from error
    except Exception as error:  # no server, no permission ...: better now than after the training
        raise UserError(
            f"The tracker {name} could not be started ({type(error).__name__}: {error}); correct that, or leave it out."
        ) from error


def _plug_ins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


class _Careful:
    """A tracker that is left out as soon as it fails."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name = name
        self._tracker: Tracker | None = tracker

    def _call(self, method: str, *arguments: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:  # whatever a server or a disk far away does
            self._tracker = None
            log.warning(
                "The tracker %s failed (%s: %s) and is left out from here on; metrics.jsonl has everything.",
                *(self._name, type(error).__name__, error),
            )

    log = partialmethod(_call, "log")
    text = partialmethod(_call, "text")
    close = partialmethod(_call, "close")


def figures_of(line: Mapping[str, Any]) -> dict[str, float]:
    """What a line of metrics.jsonl holds for a tracker; a number that is not finite is left out."""
    evaluation = line.get("evaluation")
    if evaluation:
        named = {f"validation/{name}": evaluation.get(name) for name in EVALUATION_FIGURES}
        for domain, figures in evaluation.get("domains", {}).items():
            named[f"validation/bits_per_byte/{domain}"] = figures.get("bits_per_byte")
    else:
        named = {f"train/{name}": line.get(name) for name in STEP_FIGURES}
    return {
        name: float(value) for name, value in named.items() if isinstance(value, (int, float)) and math.isfinite(value)
    }
