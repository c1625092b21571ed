"""Which documents are held out: decided by each document's own hash, so that adding documents moves none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")


def split_position(text_hash: str, seed: int) -> float:
    """A number in [0, 1), uniform over documents, the same for the same text and seed wherever it stands."""
    digest = hashlib.sha256(f"{seed}:{text_hash}".encode("ascii")).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def choose_split(text_hash: str, validation_fraction: float, seed: int) -> Split:
    """The side of a document: validation where its position lies below the fraction.

    Equal texts have equal hashes, so no text is on both sides. The share held out is the fraction up to sampling noise
    (in 1,000 documents, 0.2 gives 175 to 225).
    """
    return "validation" if split_position(text_hash, seed) < validation_fraction else "train"


def nearest_fraction(text_hashes: Iterable[str], validation_fraction: float, seed: int) -> float:
    """A fraction near the wanted one that leaves neither side empty, for corpora of a handful of documents.

    Args:
        text_hashes: At least two different hashes.
        validation_fraction: The wanted share, strictly between 0 and 1.
        seed: The split's seed.
    """
    positions = sorted({split_position(text_hash, seed) for text_hash in text_hashes})
    assert len(positions) >= 2, "one document cannot be split"
    return min(max(validation_fraction, (positions[0] + positions[1]) / 2), (positions[-2] + positions[-1]) / 2)
