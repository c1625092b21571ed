"""Sums over documents, and the measures that divide them once (docs/measures.md).

A property of `Sums` with an entry in `MEASURES` is in every record and in the table that `cartilha evaluate` prints.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass


def perplexity(loss: float) -> float:
    """exp(loss) of a loss in nats per token; infinite where a diverged model's is beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Sums:
    """Sums over documents: nats, tokens, and their text in UTF-8 bytes, code points and words (by white space)."""

    nll: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0
    num_chars: int = 0
    num_words: int = 0
    num_documents: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def loss(self) -> float:
        """S / N: nats per token."""
        return self.nll / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(S / N): the token perplexity."""
        return perplexity(self.loss) if self.num_tokens else math.nan

    @property
    def word_perplexity(self) -> float:
        """exp(S / W)."""
        return perplexity(self.nll / self.num_words) if self.num_words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """S / (B ln 2)."""
        return self.nll / (self.num_bytes * math.log(2)) if self.num_bytes else math.nan

    @property
    def bits_per_char(self) -> float:
        """S / (C ln 2)."""
        return self.nll / (self.num_chars * math.log(2)) if self.num_chars else math.nan


@dataclass(frozen=True)
class Measure:
    """A property of `Sums` that records carry.

    `title` and `decimals` are those of the table that `cartilha evaluate` prints. A measure `of_text` divides by the
    text, and not by tokens: documents that do not survive tokenization are left out, and there is no figure where
    these are many.
    """

    key: str
    title: str
    decimals: int
    of_text: bool = True


MEASURES = [
    Measure("perplexity", "perplexity", 2, of_text=False),
    Measure("bits_per_byte", "bits per byte", 4),
    Measure("bits_per_char", "bits per character", 4),
    Measure("word_perplexity", "word perplexity", 1),
]
