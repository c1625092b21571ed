"""The files of a run directory: results.json, metrics.jsonl, samples.jsonl, config.yaml, and who may write there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cartilha.config import TrainConfig
from cartilha.errors import UserError, log
from cartilha.machine.processes import is_main_process
from cartilha.reporting.lenient import read_lines
from cartilha.storage import exclusive, read_json, sweep_below, to_json, write_atomically, write_json

if TYPE_CHECKING:  # they import torch, and a mistake is named before that
    from cartilha.evaluation.continuation import Continuation
    from cartilha.evaluation.measures import Evaluation

FORMAT_VERSION = 1
LISTS = ("resumed_from_step", "epochs", "evaluations", "notices")
LOCK = ".lock"


class RunWriter:
    """Writes results.json of a run: its values are changed in memory, and the whole file is written at each change.

    `heard` are the warnings of the command that runs.
    """

    def __init__(self, path: Path, values: dict[str, Any], heard: Sequence[str] = ()) -> None:
        self.path = path
        self.values = values
        self.heard = heard
        self.before_writing: list[Callable[[], None]] = []

    @property
    def notices(self) -> list[str]:
        """Those of earlier commands and of this one, each once."""
        return list(dict.fromkeys([*self.values["notices"], *self.heard]))

    def update(self, **values: Any) -> None:
        """Set values and write the file (of several processes, the main one writes)."""
        self.values.update(values)
        for bring_up_to_date in self.before_writing:
            bring_up_to_date()
        if is_main_process():
            write_json(self.path / "results.json", self.values)

    def add_evaluation(self, step: int, epoch: int, evaluation: Evaluation) -> None:
        """Append an evaluation; one of the same step is replaced (an epoch's end may be the run's end)."""
        rows = [row for row in self.values["evaluations"] if row["step"] != step]
        self.update(evaluations=[*rows, {"step": step, "epoch": epoch, **evaluation.to_dict()}])


def values_at(path: Path, step: int, values: dict[str, Any]) -> dict[str, Any]:
    """The contents of results.json of a run that begins, or goes on from a step: what came after that is removed."""
    new: dict[str, Any] = {"format_version": FORMAT_VERSION, "name": path.resolve().name}
    new |= {"status": "running", "error": None, **{name: [] for name in LISTS}}
    old = _history(path, new) if step else new
    steps_per_epoch = max(1, values["packing"]["steps_per_epoch"])
    old["epochs"] = [row for row in old["epochs"] if row["epoch"] * steps_per_epoch <= step]
    old["evaluations"] = [row for row in old["evaluations"] if row["step"] <= step]
    if old.get("comparison") and old["comparison"]["steps"][1] > step:
        old["comparison"] = None
    english = old.get("english")
    if isinstance(english, dict) and isinstance(english.get("after"), dict) and english["after"].get("step", 0) > step:
        old["english"] = {"before": english.get("before")}
    for name in ("ended_by", "model_step", "tasks"):  # of a run that was finished before
        old.pop(name, None)
    if step:
        old["resumed_from_step"] = [*old["resumed_from_step"], step]
        _note_another_machine(old, values)
    return {**old, **values, "status": "running", "error": None}


def _history(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """What results.json says of the run so far; if it is damaged, the run goes on without its history."""
    try:
        old = {**new, **read_results(path)}
        steps = [row["epoch"] for row in old["epochs"]] + [row["step"] for row in old["evaluations"]]
        lists = [old[name] for name in LISTS]
    except (UserError, KeyError, TypeError):
        lists, steps = [], [None]
    if not (all(isinstance(n, int) for n in steps) and all(isinstance(x, list) for x in lists)):
        log.warning("%s/results.json is damaged: what it said of the steps before is lost.", path)
        return new
    return old


def _note_another_machine(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Warn if the run goes on with another machine or versions: its last bits may differ from the unbroken run's."""
    before, now = ({**(values.get("machine") or {}), **(values.get("versions") or {})} for values in (old, new))
    names = ("device_name", "threads", "cartilha", "torch", "transformers")
    changed = [f"{n} was {before[n]}, now {now[n]}" for n in names if n in before and before[n] != now.get(n)]
    if changed:
        log.warning("The run goes on elsewhere (%s): rounding may differ in the last bits.", "; ".join(changed))


def read_status(run: Path) -> str | None:
    """The status in results.json, or None where there is no readable one."""
    try:
        return str(read_results(run)["status"])
    except (UserError, KeyError):
        return None


def run_directory(path: str) -> Path:
    """The directory of a run: the one named, or the run inside a recipe's directory (a line says so)."""
    run = Path(path) / "run"
    if (Path(path) / "results.json").is_file() or not (run / "results.json").is_file():
        return Path(path)
    log.info("%s is a recipe's directory; its run is %s.", path, run)
    return run


def check_output(run: Path, resume: bool) -> None:
    """Refuse, with a UserError, an output that holds something already, unless it is a run that is to go on."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; name a directory for the run with --output.")
    if not run.is_dir() or all(path.name == LOCK for path in run.iterdir()):
        return
    if not (run / "results.json").is_file():
        raise UserError(f"The directory {run} is not empty and holds no run; choose another --output.")
    if not resume:
        raise UserError(f"{run} holds a run already; go on with it by --resume auto, or choose another --output.")


@contextmanager
def only_process(run: Path) -> Iterator[None]:
    """Hold a run's directory, or a UserError says who does; what a killed process left half-written is removed."""
    run.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(run / LOCK, f"The run {run}"):
            sweep_below(run)
            yield
    finally:
        with suppress(OSError):  # it is empty if the command failed: a mistake leaves no directory behind
            run.rmdir()


def write_config(run: Path, config: TrainConfig) -> None:
    """config.yaml: the settings as they were asked for."""
    text = yaml.safe_dump({"train": config.to_dict()}, sort_keys=False, allow_unicode=True)
    write_atomically(run / "config.yaml", text)


def add_samples(run: Path, step: int, continuations: Sequence[Continuation]) -> None:
    """Append generated texts to samples.jsonl; those of this step or a later one (before a resume) are replaced."""
    rows = [row for row in read_samples(run) if row["step"] < step]
    rows += [{"step": step, "prompt": s.prompt, "text": s.text, "mode": s.mode} for s in continuations]
    write_atomically(run / "samples.jsonl", "".join(to_json(row) + "\n" for row in rows))


def read_samples(run: Path) -> list[dict[str, Any]]:
    """The texts generated so far, in the order of the steps."""
    rows = read_lines(run / "samples.jsonl", missing=[])
    return [row for row in rows if isinstance(row.get("step"), int)]


def read_results(run: Path) -> dict[str, Any]:
    """The contents of results.json; a UserError says that it is not there or not readable."""
    try:
        values = read_json(run / "results.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{run}/results.json cannot be read ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{run}/results.json holds no record of a run.")
    return values
