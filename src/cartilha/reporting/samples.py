"""Texts that a run wrote from its prompts, over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cartilha.reporting.lenient import Record
from cartilha.reporting.results import grouped

MAX_SAMPLE_CHARS = 8000


@dataclass(frozen=True)
class ShownSample:
    """A generated text, its prompt apart."""

    step: int | None
    prompt: str
    rest: str


@dataclass(frozen=True)
class SampleSeries:
    """What the model wrote for one prompt in one mode, in order of step."""

    prompt: str
    mode: str | None
    texts: list[ShownSample]

    @property
    def before(self) -> ShownSample | None:
        """The text from before training: only one of step 0 counts."""
        return next((text for text in self.texts if not text.step), None)

    @property
    def after(self) -> ShownSample | None:
        """The last text, if it is not from before training."""
        return self.texts[-1] if self.texts[-1].step else None


def sample_series(samples: Sequence[Record]) -> list[SampleSeries]:
    """The texts of each prompt and mode, in the order in which the prompts appear."""
    by_prompt = grouped(samples, lambda sample: (sample.prompt or "", sample.mode))
    ordered = [sorted(group, key=lambda sample: sample.step or 0) for group in by_prompt]
    return [SampleSeries(group[0].prompt or "", group[0].mode, list(map(_shown, group))) for group in ordered]


def steps_of(series: Sequence[SampleSeries]) -> list[int]:
    """The steps at which texts were written."""
    return sorted({text.step or 0 for one in series for text in one.texts})


def _shown(sample: Record) -> ShownSample:
    text = sample.text or ""
    prompt = (sample.prompt or "").rstrip()  # generation drops a prompt's last spaces
    if not text.startswith(prompt):
        prompt = ""
    rest = text.removeprefix(prompt)
    if len(rest) > MAX_SAMPLE_CHARS:
        rest = rest[:MAX_SAMPLE_CHARS] + " […]"
    return ShownSample(sample.step, prompt, rest)
