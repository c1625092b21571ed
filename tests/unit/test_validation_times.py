"""After which steps a run is validated, and how long its best evaluation has been the best."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cartilha.errors import UserError
from cartilha.runs.best import evaluation_of_model, since_best
from cartilha.runs.validation_times import ValidationTimes
from cartilha.training.state import StepRecord


def step(number: int, per_step: int, steps_per_epoch: int) -> StepRecord:
    values: dict[str, Any] = dict.fromkeys(("loss", "lr", "grad_norm", "skipped", "seconds", "total_seconds"), 0.0)
    return StepRecord(
        step=number,
        epoch=(number - 1) // steps_per_epoch + 1,
        ends_epoch=number % steps_per_epoch == 0,
        num_targets=per_step,
        tokens=number * per_step,
        memory_bytes=0,
        **values,
    )


def due(times: ValidationTimes, per_step: int, steps_per_epoch: int, epochs: int) -> list[int]:
    numbers = range(1, epochs * steps_per_epoch + 1)
    return [number for number in numbers if times.is_due(step(number, per_step, steps_per_epoch))]


def test_without_a_rhythm_only_the_epochs_ends_are_validated():
    assert due(ValidationTimes.of(None, 100), 10, 10, 3) == [10, 20, 30]


@pytest.mark.parametrize(
    ("asked", "expected"), [("25%", [3, 5, 8, 10]), ("40", [4, 8, 10]), ("60", [6, 10]), ("0.1k", [10])]
)
def test_every_epoch_has_the_same_times_and_none_shortly_before_its_end(asked, expected):
    times = ValidationTimes.of(asked, 100)
    assert due(times, 10, 10, 2) == [*expected, *(10 + number for number in expected)]
    assert times.per_epoch == len(expected)


def test_an_amount_that_is_none_is_refused():
    with pytest.raises(UserError, match="--validate_every is a number of tokens such as 2000000 or 2m"):
        ValidationTimes.of("often", 100)


@given(st.integers(1, 50), st.integers(1, 40), st.integers(1, 3000))
def test_validations_are_half_of_the_rhythm_apart_and_never_much_more_than_it(per_step, steps_per_epoch, every):
    times = ValidationTimes(per_step * steps_per_epoch, every)
    found = due(times, per_step, steps_per_epoch, 3)
    assert {steps_per_epoch, 2 * steps_per_epoch, 3 * steps_per_epoch} <= set(found)
    gaps = [per_step * (later - earlier) for earlier, later in zip([0, *found], found, strict=False)]
    assert all(
        every / 2 - per_step < gap < 1.5 * every + per_step for gap in gaps if per_step < every < times.tokens_per_epoch
    )
    assert len(found) <= 3 * times.per_epoch


# Patience


def row(step: int, loss: float | None, text: str = "a") -> dict[str, Any]:
    return {"step": step, "loss": loss, "corpus_hash": text, "protocol": {"hash": "p"}}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0], 0),
        ([3.0, 2.0], 0),
        ([3.0, 3.0], 1),  # as good is not better
        ([3.0, 2.0, 2.5, 2.1], 2),
        ([3.0, 2.0, 2.5, 1.9], 0),
        ([3.0, 4.0, 5.0], 2),  # worse than before training
        ([3.0, math.nan, None], 2),
    ],
)
def test_patience_counts_the_validations_since_the_best(losses, expected):
    assert since_best([row(i, loss) for i, loss in enumerate(losses)]) == expected


def test_evaluations_of_another_text_do_not_count():
    rows = [row(0, 1.0, "b"), row(1, 1.5, "b"), row(2, 3.0), row(3, 2.0)]
    assert since_best(rows) == 0


def test_the_models_evaluation_is_that_of_its_step_and_else_the_last():
    rows = [row(0, 3.0), row(5, 2.0), row(9, 2.5)]
    assert evaluation_of_model({"evaluations": rows, "model_step": 5})["loss"] == 2.0
    assert evaluation_of_model({"evaluations": rows})["loss"] == 2.5


@pytest.mark.parametrize(
    ("asked", "num_epochs", "found"),
    [
        (None, 1.0, None),
        ("40", 1.0, None),
        ("80", 3.0, "an epoch has 100 tokens"),  # nearer to the epoch's end than half of it
        ("5m", 1.0, "an epoch has 100 tokens"),
        ("50", 0.3, "this training has 30 tokens"),
    ],
)
def test_a_rhythm_that_no_training_reaches_is_said(asked, num_epochs, found):
    assert ValidationTimes.of(asked, 100).too_short(num_epochs) == found
