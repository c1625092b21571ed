"""Downstream tasks of a run: its base and its model, and what they scored.

results.json, `tasks`    what was asked, each score before and after the training, and their differences
model/README.md          the card, written anew
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartilha.errors import log
from cartilha.evaluation.task_scores import TaskScore, before_and_after
from cartilha.languages import find_language, language_codes
from cartilha.machine.versions import versions
from cartilha.runs.files import RunWriter, only_process, read_results, run_directory
from cartilha.runs.model_card import write_card


@dataclass(frozen=True)
class TasksOfRun:
    """A finished run, locked while its tasks are run."""

    path: Path
    results: dict[str, Any]

    @property
    def models(self) -> tuple[str, str]:
        """Its base, at the commit that was trained, and its model."""
        base, commit = self.results["settings"]["model"], self.results["settings"].get("model_commit")
        return f"{base.split('@')[0]}@{commit}" if commit else base, str(self.path / "model")

    def keep(self, asked: Sequence[str], before: Sequence[TaskScore], after: Sequence[TaskScore]) -> None:
        """Write the scores into the run's record and its card; those of earlier tasks are replaced."""
        known = (find_language(name) for name in asked if name in language_codes())
        lists = {language.code: language.tasks_list for language in known if language.tasks}
        scores = before_and_after(before, after)
        tasks = {"asked": list(asked), "lists": lists, "harness": versions(("lm_eval",))["lm_eval"], "scores": scores}
        RunWriter(self.path, self.results).update(tasks=tasks)
        write_card(self.path / "model", self.results)
        log.info("The scores are kept in %s: its model card has them, and `cartilha report %s`.", *[self.path] * 2)


@contextmanager
def tasks_of_run(run: str) -> Iterator[TasksOfRun]:
    """A finished run whose record and card will have the scores; a UserError says that another process works on it."""
    path = run_directory(run)
    with only_process(path):
        yield TasksOfRun(path, read_results(path))
