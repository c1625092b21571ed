"""From a loss to a perplexity: the one place that takes the exponential of a loss."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats per token; infinite where a diverged model's is beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf
