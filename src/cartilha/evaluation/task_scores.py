"""Scores of downstream tasks with 95 % intervals, and how two models differ on the same questions.

Shares of right answers get Wilson's interval (JASA 22, 1927), and their paired difference that of Bonett and Price
(2012, doi:10.3102/1076998611411915). Both hold for few questions and near 0 and 1; other means get the normal interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Z = 1.959964  # of the normal distribution, for 95 %


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task; `values` has that of each question where the score is their mean, in the task's order."""

    task: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    num_questions: int | None
    higher_is_better: bool = True
    values: np.ndarray | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the questions."""
        return {name: value for name, value in vars(self).items() if name != "values"}


def harness_scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """The scores in what `lm_eval.simple_evaluate` returns: of each task, or of its group as a whole."""
    parts = {task for tasks in results.get("group_subtasks", {}).values() for task in tasks}
    scores = []
    for task, row in results["results"].items():
        better = results.get("higher_is_better", {}).get(task, {})
        rows = sorted(results.get("samples", {}).get(task, ()), key=lambda row: row["doc_id"])
        for key, value in row.items():
            metric, _, filtered = key.partition(",")
            if task in parts or metric.endswith("_stderr") or not filtered or not isinstance(value, float):
                continue
            values = _of_questions(rows, metric, filtered, value)
            number = _num_questions(results, task)
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            interval = _interval(value, row.get(f"{metric}_stderr,{filtered}"), number, values)
            scores.append(TaskScore(task, name, value, interval, number, better.get(metric) is not False, values))
    return scores


def _of_questions(rows: Sequence[Mapping[str, Any]], metric: str, filtered: str, mean: float) -> np.ndarray | None:
    """The metric of each question, if the task's score is their mean."""
    found = [row[metric] for row in rows if metric in row and row.get("filter", filtered) == filtered]
    if not found or not all(isinstance(value, int | float | np.number) for value in found):
        return None
    values = np.array(found, float)
    return values if math.isclose(values.mean(), mean, rel_tol=1e-6, abs_tol=1e-9) else None


def _num_questions(results: Mapping[str, Any], task: str) -> int | None:
    """The questions of a task, or of all parts of a group."""
    counts = results.get("n-samples", {})
    if task in counts:
        return int(counts[task]["effective"])
    parts = results.get("group_subtasks", {}).get(task, ())
    return sum(int(counts[part]["effective"]) for part in parts) if parts and all(p in counts for p in parts) else None


def _interval(value: float, stderr: Any, number: int | None, values: np.ndarray | None) -> tuple[float, float] | None:
    if values is not None and _is_zero_or_one(values):
        return wilson(values.mean(), len(values))
    if isinstance(stderr, int | float) and number and number > 1 and math.isfinite(stderr):
        return value - Z * stderr, value + Z * stderr
    return None


def _is_zero_or_one(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def wilson(share: float, number: int) -> tuple[float, float]:
    """The 95 % interval of a share of `number` questions."""
    center = (share + Z * Z / (2 * number)) / (1 + Z * Z / number)
    half = Z / (1 + Z * Z / number) * math.sqrt(share * (1 - share) / number + Z * Z / (4 * number * number))
    return max(0.0, center - half), min(1.0, center + half)


def paired_interval(first: np.ndarray | None, second: np.ndarray | None) -> tuple[float, float] | None:
    """The 95 % interval of the mean of second minus first over the same questions; None for fewer than two."""
    if first is None or second is None or len(first) != len(second) or len(first) < 2:
        return None
    number = len(first)
    if _is_zero_or_one(first) and _is_zero_or_one(second):
        gained = (float(((first == 0) & (second == 1)).sum()) + 1) / (number + 2)
        lost = (float(((first == 1) & (second == 0)).sum()) + 1) / (number + 2)
        center, half = gained - lost, Z * math.sqrt((gained + lost - (gained - lost) ** 2) / (number + 2))
        return max(-1.0, center - half), min(1.0, center + half)
    change = second - first
    center, half = float(change.mean()), Z * float(change.std(ddof=1)) / math.sqrt(number)
    return center - half, center + half


def before_and_after(before: Iterable[TaskScore], after: Iterable[TaskScore]) -> list[dict[str, Any]]:
    """One row for each metric of each task that both models have, as a run's record keeps it."""
    known = {(score.task, score.metric): score for score in before}
    rows = []
    for score in after:
        first = known.get((score.task, score.metric))
        if first is None:
            continue
        rows.append(
            {
                "task": score.task,
                "metric": score.metric,
                "num_questions": score.num_questions,
                "higher_is_better": score.higher_is_better,
                "before": first.value,
                "before_interval": first.interval,
                "after": score.value,
                "after_interval": score.interval,
                "difference": score.value - first.value,
                "difference_interval": paired_interval(first.values, score.values),
            }
        )
    return rows
