"""How a loss falls with the tokens of training: power laws through a few measured trainings, and how far they agree.

A law is floor + (start - floor) (1 + tokens / scale) ^ -exponent, with the loss before training as its start: the form
of arXiv:2001.08361 with a floor, in which pretraining counts as tokens seen before (arXiv:2102.01293).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EXPONENTS = np.geomspace(0.05, 1.0, 25)
FLOORS = np.linspace(0.0, 0.9, 19)  # as shares of the lowest loss that was measured
SCALES = np.geomspace(0.01, 100.0, 61)  # as multiples of the longest training
TOLERANCE = 0.05  # of the fall so far: by how much trainings miss such a law (docs/log.md)
INTERVAL = (0.025, 0.5, 0.975)


class Expected(NamedTuple):
    """The loss after a training: the median of the laws that agree with what was measured, and their 95 % interval."""

    low: float
    median: float
    high: float


def expected_losses(
    start: float, tokens: Sequence[int], losses: Sequence[float], at: Sequence[float]
) -> list[Expected]:
    """The losses after trainings of `at` tokens, from those after trainings of `tokens`.

    Every law on a grid has the weight exp(-chi^2 / 2) of the measured losses. Where no law lies within the tolerance,
    the tolerance is as large as the distance of the nearest one.
    """
    floor, scale, exponent = np.meshgrid(min(losses) * FLOORS, max(tokens) * SCALES, EXPONENTS, indexing="ij")

    def law(number: float) -> np.ndarray:
        return floor + (start - floor) * (1 + number / scale) ** -exponent

    squares = sum((law(number) - loss) ** 2 for number, loss in zip(tokens, losses, strict=True))
    squares = np.asarray(squares).ravel()
    noise = max(TOLERANCE * abs(start - min(losses)), float(np.sqrt(squares.min() / len(losses))), 1e-12)
    weights = np.exp((squares.min() - squares) / (2 * noise**2))
    found = []
    for number in at:
        values = law(number).ravel()
        order = np.argsort(values)
        passed = np.cumsum(weights[order]) / weights.sum()
        low, median, high = (float(values[order][np.searchsorted(passed, share)]) for share in INTERVAL)
        found.append(Expected(low - 2 * noise, median, high + 2 * noise))
    return found
