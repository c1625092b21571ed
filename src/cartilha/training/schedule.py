"""Learning-rate schedules: a linear warm-up, then a shape: a function in `SHAPES`, whose name `--schedule` takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cartilha.errors import UserError

DECAY_FRACTION = 0.2  # of the steps after the warm-up: the decay of WSD


def cosine(done: float, final: float) -> float:
    """Half a cosine wave from 1 down to `final`."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def linear(done: float, final: float) -> float:
    """A straight line from 1 down to `final`."""
    return 1 + (final - 1) * done


def constant(done: float, final: float) -> float:
    """1 to the end."""
    return 1.0


def warmup_stable_decay(done: float, final: float) -> float:
    """1, then a straight line down to `final` in the last fifth (WSD, arXiv:2404.06395)."""
    return linear(max(0.0, 1 - (1 - done) / DECAY_FRACTION), final)


# From the part of the time after the warm-up that has passed (0 to 1), and the share of the peak rate at which a decay
# ends, to the share of the peak rate.
SHAPES: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": warmup_stable_decay,
}


def check_shape(name: str) -> None:
    """Refuse, with a UserError, a name that is not in `SHAPES`."""
    if name not in SHAPES:
        raise UserError(f"There is no schedule {name!r}; choose from {', '.join(SHAPES)}.")


@dataclass(frozen=True)
class Schedule:
    """How long training lasts and how its learning rate runs.

    Training ends after `num_steps` or after the time budget. The rate follows whichever of the two is further on, so
    that it decays to the end of either. If the embeddings are trained first, each phase has its own warm-up and decay.
    """

    num_steps: int
    peak_lr: float
    warmup_fraction: float  # share of the steps in which the rate rises
    final_lr_fraction: float  # share of the peak rate at which the decay ends
    time_budget_s: float | None = None
    embeddings_first: float = 0.0  # share of the steps, at the beginning, that trains the token embeddings alone
    embeddings_lr: float = 0.0  # peak rate of that phase
    shape: str = "cosine"  # how the rate runs after the warm-up: a name in `SHAPES`

    def _position(self, step: int, seconds: float) -> float:
        # Steps or, where that is more, the share of the time budget that is used up by then, in steps.
        return max(step, seconds / self.time_budget_s * self.num_steps if self.time_budget_s else 0.0)

    @property
    def _num_embedding_steps(self) -> int:
        return max(round(self.embeddings_first * self.num_steps), int(self.embeddings_first > 0))

    def trains_embeddings_only(self, step: int, seconds: float = 0.0) -> bool:
        """Whether step `step` (from 0) belongs to the first phase, which has at least one step where there is one."""
        return self._position(step, seconds) < self._num_embedding_steps

    def lr(self, step: int, seconds: float = 0.0, step_seconds: float = 0.0) -> float:
        """The learning rate of step `step` (from 0), which begins after `seconds` and takes about `step_seconds`.

        It is the rate at the step's end. So the first step of a phase already has a rate above 0, and the last step
        reaches the shape's end.
        """
        end, first = self._position(step + 1, seconds + step_seconds), self._num_embedding_steps
        if self.trains_embeddings_only(step, seconds):
            num_steps, peak = first, self.embeddings_lr
        else:
            end, num_steps, peak = end - first, self.num_steps - first, self.peak_lr
        warmup = min(max(1, round(self.warmup_fraction * num_steps)), num_steps)
        if end <= warmup:
            return peak * end / warmup
        done = (end - warmup) / max(1, num_steps - warmup)
        return peak * SHAPES[self.shape](min(1.0, done), self.final_lr_fraction)

    def is_over(self, step: int, seconds: float) -> bool:
        """Whether training ends after `step` steps and `seconds` of training."""
        return step >= self.num_steps or (self.time_budget_s is not None and seconds >= self.time_budget_s)
