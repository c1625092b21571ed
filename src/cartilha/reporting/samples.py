"""Texts that a run wrote from its prompts, over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cartilha.reporting.results import Sample

MAX_SAMPLE_CHARS = 8000


@dataclass(frozen=True)
class ShownSample:
    """A generated text, its prompt apart."""

    step: int | None
    prompt: str
    rest: str


@dataclass(frozen=True)
class SampleSeries:
    """What the model wrote for one prompt in one mode before training, last, and at every step in between."""

    prompt: str
    mode: str | None
    before: ShownSample | None
    after: ShownSample | None
    texts: tuple[ShownSample, ...]


def sample_series(samples: Sequence[Sample]) -> list[SampleSeries]:
    """The texts of each prompt and mode, in the order in which the prompts appear.

    Only a text of step 0 counts as one from before training.
    """
    grouped: dict[tuple[str, str | None], list[Sample]] = {}
    for sample in samples:
        grouped.setdefault((sample.prompt or "", sample.mode), []).append(sample)
    series = []
    for (prompt, mode), texts in grouped.items():
        shown = sorted((_shown(sample) for sample in texts), key=lambda sample: sample.step or 0)
        before = next((sample for sample in shown if not sample.step), None)
        after = next((sample for sample in reversed(shown) if sample.step), None)
        series.append(SampleSeries(prompt, mode, before, after, tuple(shown)))
    return series


def steps_of(series: Sequence[SampleSeries]) -> list[int]:
    """The steps at which texts were written."""
    return sorted({text.step or 0 for one in series for text in one.texts})


def _shown(sample: Sample) -> ShownSample:
    text = sample.text or ""
    prompt = (sample.prompt or "").rstrip()  # generation drops a prompt's last spaces
    if not text.startswith(prompt):
        prompt = ""
    rest = text[len(prompt) :]
    if len(rest) > MAX_SAMPLE_CHARS:
        rest = rest[:MAX_SAMPLE_CHARS] + " […]"
    return ShownSample(sample.step, prompt, rest)
