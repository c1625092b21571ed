"""Cleaning: named steps that mend a document or reject it with a reason; nothing is done that was not asked for.

Steps run in the order of `STEPS`, whatever the order in which they are named: what mends comes before what judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cartilha.corpus.document import Document
from cartilha.errors import UserError

WEB_STEPS: tuple[str, ...] = ()
STEPS: tuple[str, ...] = ()


@dataclass(frozen=True)
class CleaningSettings:
    """What the steps may be told.

    Attributes:
        language: ISO 639-1 code of the language that the step `language` keeps.
    """

    language: str = "pt"


@dataclass(frozen=True)
class Rejected:
    """A document that a step left out.

    Attributes:
        document: As it was read.
        reason: The name under which it is counted: a step's name, with detail after a colon (`language:es`).
    """

    document: Document
    reason: str


class Cleaner:
    """Applies steps to documents; pickled by its settings, so that each process makes its own."""

    def __init__(self, steps: Sequence[str], settings: CleaningSettings) -> None:
        unknown = [step for step in steps if step not in STEPS]
        if unknown:
            raise UserError(f"There is no cleaning step {unknown[0]!r}; choose from {', '.join(STEPS)}.")
        self.steps = tuple(step for step in STEPS if step in steps)
        self.settings = settings

    def __reduce__(self) -> tuple[type[Cleaner], tuple[tuple[str, ...], CleaningSettings]]:
        return Cleaner, (self.steps, self.settings)

    def __call__(self, document: Document) -> Document | Rejected:
        """The document, mended or as it was (the same object), or the reason why it is left out."""
        return document


def make_cleaner(steps: Sequence[str], settings: CleaningSettings | None = None) -> Cleaner:
    """A cleaner of these steps (`STEPS`; `WEB_STEPS` for text of the web).

    Raises:
        UserError: There is no such step, or one needs an extra that is not installed.
    """
    return Cleaner(steps, settings or CleaningSettings())
