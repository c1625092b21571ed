"""A mixture of inputs: the share of the training tokens that each gets, and how often its documents are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cartilha.config import PrepareConfig
from cartilha.corpus.sources import Source
from cartilha.errors import UserError, counted


@dataclass(frozen=True)
class InputShares:
    """Shares of the tokens of each input, which sum to 1, and how many times a document is taken at most to reach them.

    `inputs` has the number of each source's input, shape (num_sources,).
    """

    inputs: np.ndarray
    shares: np.ndarray
    max_repeats: int

    @classmethod
    def of(cls, config: PrepareConfig, inputs: Sequence[Sequence[Source]], sources: Sequence[Source]) -> InputShares:
        """The mixture of these inputs (the sources of each) that `--weights` asks for; a UserError if that is wrong."""
        given = " ".join(config.weights)
        if config.validation_input:
            raise UserError("--weights and --validation_input do not go together; hold out a fraction instead.")
        if len(config.weights) != len(inputs):
            raise UserError(
                f"--weights has {counted(len(config.weights), 'weight')} for {counted(len(inputs), 'input')}; "
                "give one per --input."
            )
        if config.max_repeats < 1:
            raise UserError(f"--max_repeats is {config.max_repeats}; give 1, which repeats nothing, or more.")
        try:
            values = np.array([float(value) for value in config.weights])
        except ValueError:
            raise UserError(f"Weights are numbers, such as 0.95 0.05, not {given}.") from None
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise UserError(f"Weights must be above 0, not {given}; leave an input out to have none of it.")
        # A source that is in several inputs belongs to the first of them.
        owners = {source: number for number, found in reversed([*enumerate(inputs)]) for source in found}
        return cls(np.array([owners[source] for source in sources]), values / values.sum(), config.max_repeats)

    def rates(self, num_tokens: np.ndarray) -> np.ndarray:
        """How often each input is taken: 0.5 is half of its documents, 1.5 is all of them and half of them again.

        An input that is too small is repeated. Documents of the others are left out only if it would have to be
        repeated more than `max_repeats` times. A UserError says that an input has no tokens.
        """
        if not num_tokens.all():
            raise UserError(
                "One of the weighted inputs gave no text; leave it out, with its weight, or, where --limit_documents"
                " ends before it, add --shuffle or give a larger limit."
            )
        totals = num_tokens / self.shares  # of a mixture that takes this input once
        return np.asarray(min(totals.max(), self.max_repeats * totals.min()) * self.shares / num_tokens)


def copies(rates: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """How many times each document is taken, int64, by the rate of its input and its hash, shape (num_documents, 2).

    The hash decides whether a fraction of the rate counts, by another draw than that of the split, so that few
    documents change when others are added.
    """
    draw = (hashes[:, 1] >> np.uint64(11)) / 2.0**53
    whole = np.floor(rates)
    return np.asarray(whole + (draw < rates - whole), np.int64)
