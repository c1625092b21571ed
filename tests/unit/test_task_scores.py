"""Intervals of tasks' scores: known values, their coverage, and what is read of the harness."""

from __future__ import annotations

import numpy as np
import pytest

from cartilha.evaluation.task_scores import before_and_after, harness_scores, paired_interval, wilson


def test_wilsons_interval_of_known_counts():
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # statsmodels, proportion_confint(8, 10)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.mark.parametrize(("gained", "lost"), [(0.02, 0.02), (0.15, 0.05), (0.4, 0.1)])
def test_the_paired_interval_covers_the_difference(gained, lost):
    rng = np.random.default_rng(5)
    number, trials, covered = 60, 1500, 0
    for draw in rng.random((trials, number)):
        first = np.where(draw < gained, 0.0, np.where(draw < gained + lost, 1.0, np.round(draw)))
        second = np.where(draw < gained, 1.0, np.where(draw < gained + lost, 0.0, np.round(draw)))
        low, high = paired_interval(first, second)
        covered += low <= gained - lost <= high
    assert 0.93 < covered / trials <= 1.0


def test_models_that_answer_alike_may_still_differ():
    answers = np.array([1.0, 0.0] * 10)
    low, high = paired_interval(answers, answers)
    assert low == -high and high > 0.05
    assert paired_interval(answers[:1], answers[:1]) is None
    low, high = paired_interval(np.array([0.5, 1.5, 2.5]), np.array([1.5, 2.5, 3.5]))  # no shares
    assert low == high == 1.0


def harness(values: list[float], perplexity: float) -> dict:
    """What the harness returns for a task with a mean and another metric, and for a group with two parts."""
    rows = [{"doc_id": i, "acc": value, "filter": "none"} for i, value in reversed(list(enumerate(values)))]
    accuracy = {"acc,none": float(np.mean(values)), "acc_stderr,none": 0.1}
    return {
        "results": {
            "t": {"alias": "t", **accuracy, "ppl,none": perplexity, "ppl_stderr,none": 2.0},
            "g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "g_a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1},
        },
        "group_subtasks": {"g": ["g_a"], "t": []},
        "higher_is_better": {"t": {"acc": True, "ppl": False}},
        "n-samples": {"t": {"effective": len(values)}, "g_a": {"effective": 7}},
        "samples": {"t": rows, "g_a": []},
    }  # fmt: skip


def test_what_is_read_of_the_harness():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    accuracy, perplexity, group = harness_scores(harness(values, 30.0))
    assert accuracy.values is not None and accuracy.values.tolist() == values  # in the order of the questions
    assert accuracy.interval == wilson(0.6, 5) and accuracy.num_questions == 5
    assert perplexity.interval == pytest.approx((30 - 3.92, 30 + 3.92), abs=0.01) and not perplexity.higher_is_better
    assert (group.task, group.value, group.interval, group.num_questions) == ("g", 0.5, None, 7)

    rows = before_and_after(harness_scores(harness([0.0] * 5, 40.0)), [accuracy, perplexity, group])
    assert [row["task"] for row in rows] == ["t", "t", "g"]
    assert rows[0]["difference"] == pytest.approx(0.6) and rows[0]["difference_interval"][0] < 0.6
    assert rows[1]["difference"] == -10 and rows[1]["difference_interval"] is None
