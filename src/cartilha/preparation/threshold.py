"""What a document must weigh to be among the best of a first sample: tells a reader when it has read enough."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from cartilha.corpus.signatures import ODD, mixed
from cartilha.tokens import ngrams


@dataclass(frozen=True)
class Threshold:
    """The lowest key of the documents that a selection of the sample takes, and what keys are made of.

    Attributes:
        ratios: The log ratio of each n-gram bucket (`ngrams.log_ratios`), int32; zeros without a target.
        average: N-grams in a document of average length.
        strength: How much the weights count against the draw.
        seed: Of the draw.
        lowest: The key from which on a document counts.
    """

    ratios: np.ndarray
    average: float
    strength: float
    seed: int
    lowest: float

    @property
    def fingerprint(self) -> str:
        """A hash of all of it."""
        rest = repr((self.average, self.strength, self.seed, self.lowest))
        return hashlib.sha256(self.ratios.tobytes() + rest.encode("ascii")).hexdigest()

    def tokens_above(self, ids: np.ndarray, num_tokens: np.ndarray, hashes: np.ndarray) -> int:
        """The tokens of those documents that reach the threshold; `hashes` as in `DocumentIndex`."""
        keys = gumbel(hashes, self.seed)
        if self.strength:
            sums = ngrams.log_likelihood_ratios(ids, num_tokens, self.ratios[None])[0]
            keys += self.strength * log_weights(sums, num_tokens, self.average)
        return int(num_tokens[keys >= self.lowest].sum())

    def save(self, path: Path) -> None:
        """Write it to a `.npz` file."""
        np.savez(path, ratios=self.ratios, numbers=[self.average, self.strength, self.lowest], seed=self.seed)

    @classmethod
    def load(cls, path: Path) -> Threshold:
        """Read what `save` wrote."""
        with np.load(path) as saved:
            average, strength, lowest = saved["numbers"].tolist()
            return cls(saved["ratios"], average, strength, int(saved["seed"]), lowest)


def log_weights(sums: np.ndarray, num_tokens: ArrayLike, average: float) -> np.ndarray:
    """Log weights, in nats of a document with the pool's average number of n-grams, from log likelihood ratios.

    The sum of a document's log ratios grows with its length and would rank by it; their mean varies most in short
    documents, which chance would put first. The sum over the root of the number of n-grams does neither.
    """
    return np.asarray(sums / ngrams.FIXED_POINT * np.sqrt(average / np.maximum(1, 2 * np.asarray(num_tokens) - 1)))


def gumbel(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A standard Gumbel variable for each document, which follows from its hash and the seed: float64."""
    bits = mixed(hashes[:, 1] ^ np.uint64(seed * int(ODD) % 2**64)) * np.uint64(0x94D049BB133111EB)
    uniform = (((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) + 0.5) / 2.0**53
    return np.asarray(-np.log(-np.log(uniform)))
