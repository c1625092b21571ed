"""After which steps a run is validated: at each epoch's end, and on request between the ends."""

from __future__ import annotations

from dataclasses import dataclass

from cartilha.errors import counted
from cartilha.training.state import StepRecord
from cartilha.units import parse_amount


@dataclass(frozen=True)
class ValidationTimes:
    """`every` is how many tokens of an epoch lie between two validations; None leaves the epochs' ends alone."""

    tokens_per_epoch: int
    every: int | None

    @classmethod
    def of(cls, validate_every: str | None, tokens_per_epoch: int) -> ValidationTimes:
        """From `--validate_every`, a number of tokens or a share of an epoch's."""
        if validate_every is None:
            return cls(tokens_per_epoch, None)
        amount = parse_amount(validate_every, "--validate_every")
        return cls(tokens_per_epoch, amount if isinstance(amount, int) else max(1, int(amount * tokens_per_epoch)))

    def is_due(self, step: StepRecord) -> bool:
        """Whether a validation follows this step.

        A multiple of `every` that is nearer to the epoch's end than half of `every` is left out.
        """
        if step.ends_epoch or self.every is None:
            return step.ends_epoch
        done = step.tokens - (step.epoch - 1) * self.tokens_per_epoch
        is_passed = done // self.every > (done - step.num_targets) // self.every
        return is_passed and self.tokens_per_epoch - done >= self.every / 2

    @property
    def per_epoch(self) -> int:
        """Validations in an epoch, at most: steps may have more tokens than `every`."""
        return 1 + (max(0, int(self.tokens_per_epoch / self.every - 0.5)) if self.every else 0)

    def too_short(self, num_epochs: float) -> str | None:
        """What has too few tokens for a validation between epochs' ends; None where there is one, or none was asked."""
        if self.every is None:
            return None
        if self.per_epoch == 1:
            return f"an epoch has {counted(self.tokens_per_epoch, 'token')}"
        tokens = int(num_epochs * self.tokens_per_epoch)
        return f"this training has {counted(tokens, 'token')}" if tokens < self.every else None
