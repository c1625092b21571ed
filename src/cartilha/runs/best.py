"""Which of a run's evaluations is the best: patience counts from it, and RUN/model holds the weights of its step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]  # of `evaluations` in results.json


def loss_of(row: Row) -> float:
    """Its loss in nats per token; infinite where it is none."""
    loss = row.get("loss")
    return float(loss) if isinstance(loss, (int, float)) and math.isfinite(loss) else math.inf


def comparable(evaluations: list[Row]) -> list[Row]:
    """Those that were measured as the last one was: on the same text, by the same protocol."""

    def measured_on(row: Row) -> tuple[Any, Any]:
        return row["corpus_hash"], row["protocol"]["hash"]

    return [row for row in evaluations if measured_on(row) == measured_on(evaluations[-1])]


def since_best(evaluations: list[Row]) -> int:
    """How many evaluations in a row, up to the last, brought no lower loss than the best before them."""
    best, waited = math.inf, 0
    for row in comparable(evaluations):
        best, waited = (loss_of(row), 0) if loss_of(row) < best else (best, waited + 1)
    return waited


def evaluation_of_model(results: Mapping[str, Any]) -> Row:
    """The evaluation of the weights that RUN/model holds; of a run that is not finished, the last one."""
    evaluations: list[Row] = results["evaluations"]
    held = [row for row in evaluations if row["step"] == results.get("model_step")]
    return held[0] if held else evaluations[-1]
