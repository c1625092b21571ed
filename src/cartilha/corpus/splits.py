"""Which documents are held out: decided by hashes, so that adding documents moves none or few.

A document's position is a number in [0, 1) that follows from the hash of its text and the seed; where near-duplicates
are clustered, from the smallest hash in its cluster, so that a cluster is on one side as a whole. The lowest positions
are held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cartilha.errors import UserError, counted

if TYPE_CHECKING:
    import numpy as np

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
    return _nearest([split_position(text_hash, seed) for text_hash in set(text_hashes)], validation_fraction)


def _nearest(positions: Sequence[float] | np.ndarray, fraction: float) -> float:
    import numpy as np

    assert len(positions) >= 2, "one document cannot be split"
    ordered = np.sort(positions)
    return float(min(max(fraction, (ordered[0] + ordered[1]) / 2), (ordered[-2] + ordered[-1]) / 2))


@dataclass(frozen=True)
class SplitRule:
    """How many documents are held out, and which; `documents` or `first` count instead of the fraction.

    Attributes:
        fraction: Share of the documents.
        documents: Number of documents.
        first: The first so many in the input's order, as `split="train[:1000]"` of `datasets` takes them.
        seed: Draws which ones; `first` needs none.

    Raises:
        UserError: Both are given, or a number makes no sense.
    """

    fraction: float = 0.2
    documents: int | None = None
    first: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"The validation fraction must lie between 0 and 1, not {self.fraction}.")
        if self.documents is not None and self.first is not None:
            raise UserError("Hold out either a number of documents or the first ones, not both.")
        for number in (self.documents, self.first):
            if number is not None and number < 1:
                raise UserError(f"At least 1 document must be held out, not {number}.")


@dataclass(frozen=True)
class SplitResult:
    """A split.

    Attributes:
        validation: Whether each document is held out: bool, shape (num_documents,).
        left_out: Whether it is on neither side, since it is a near-duplicate of one that had to be held out (`first`
            and given files): bool, shape (num_documents,).
        fraction_used: Where the fraction decided, the one that was used.
        notes: What happened otherwise than asked, a sentence each.
        leak_rate: Share of the held-out documents with a near-duplicate in training.
        plain_leak_rate: The same for the same rule if it looked at each document alone, as a random split does.
    """

    validation: np.ndarray
    left_out: np.ndarray
    fraction_used: float | None
    notes: tuple[str, ...]
    leak_rate: float
    plain_leak_rate: float


def leak_rate(clusters: np.ndarray, validation: np.ndarray, train: np.ndarray | None = None) -> float:
    """Share of the held-out documents that have a near-duplicate in training.

    Args:
        clusters: A number for each document that its near-duplicates share: int64, shape (num_documents,).
        validation: Whether each is held out: bool, the same shape.
        train: Whether each is trained on: bool, the same shape; None for all others.
    """
    import numpy as np

    if not validation.any():
        return 0.0
    trained = ~validation if train is None else train
    return float(np.isin(clusters[validation], clusters[trained]).mean())


def split_documents(
    text_hashes: Sequence[str] | np.ndarray,
    rule: SplitRule,
    clusters: np.ndarray | None = None,
    given: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> SplitResult:
    """Decide which documents are held out.

    Args:
        text_hashes: In the input's order, without exact duplicates; at least two.
        rule: How many and which.
        clusters: A number for each document that its near-duplicates share; None where they were not looked for.
        given: Whether each comes from the files that are to be held out, whatever the rule: bool, shape
            (num_documents,); None where there are none.
        own: The position of each where it is known: float64, shape (num_documents,).

    Raises:
        UserError: No document is left to train on.
    """
    import numpy as np

    num_documents = len(text_hashes)
    assert num_documents >= 2, "one document cannot be split"
    groups = np.arange(num_documents) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    if given is None and rule.first is not None:
        given = np.arange(num_documents) < rule.first
    if given is not None:
        return _fixed(groups, given)
    if rule.documents is not None and rule.documents >= num_documents:
        raise UserError(
            f"{rule.documents:,} of {counted(num_documents, 'document')} cannot be held out; leave some to train on."
        )
    if own is None:
        own = np.array([split_position(str(text_hash), rule.seed) for text_hash in text_hashes])
    sizes = np.bincount(groups)
    notes: list[str] = []
    if len(sizes) == 1:
        notes.append(
            f"All {num_documents} documents are near-duplicates of one another, so that no split keeps them apart: they"
            " are split one by one."
        )
        groups, sizes = np.arange(num_documents), np.ones(num_documents, np.int64)
    positions = np.empty(len(sizes))
    positions[groups] = own
    if len(sizes) < num_documents:  # a cluster stands where its document of the smallest hash does
        order = np.lexsort((np.asarray(text_hashes), groups))
        positions = own[order[np.searchsorted(groups[order], np.arange(len(sizes)))]]
    if rule.documents is None:
        chosen, fraction = _below(positions, sizes, rule.fraction, notes)
        plain = own < _nearest(own, rule.fraction)
    else:
        chosen, fraction = _so_many(positions, sizes, rule.documents, notes), None
        plain = np.isin(np.arange(num_documents), np.argsort(own)[: rule.documents])
    validation = chosen[groups]
    ids = groups if clusters is None else clusters
    return SplitResult(
        validation,
        np.zeros(num_documents, bool),
        fraction,
        tuple(notes),
        leak_rate(ids, validation),
        leak_rate(ids, plain),
    )


def _fixed(groups: np.ndarray, given: np.ndarray) -> SplitResult:
    """What is held out is fixed; near-duplicates of it are left out of training."""
    import numpy as np

    left_out = np.isin(groups, groups[given]) & ~given
    if not given.any() or (given | left_out).all():
        side = "train on" if given.any() else "hold out"
        raise UserError(f"No document is left to {side}; change what is held out, or give more text.")
    return SplitResult(given, left_out, None, (), 0.0, leak_rate(groups, given))


def _below(positions: np.ndarray, sizes: np.ndarray, fraction: float, notes: list[str]) -> tuple[np.ndarray, float]:
    """Clusters below the fraction, but for those that are larger than the side held out; and the fraction used."""
    import numpy as np

    wanted = fraction * sizes.sum()
    eligible = (sizes == 1) | (sizes <= wanted)
    if not eligible.all():
        notes.append(
            f"{counted((~eligible).sum(), 'cluster')} of near-duplicates (the largest of {sizes.max():,} documents)"
            f" cannot be held out, for a cluster may have {counted(round(wanted), 'document')} at most."
        )
    if not eligible.any():
        notes.append("Every cluster is larger than that: the smallest is held out nevertheless.")
        return np.arange(len(sizes)) == np.lexsort((positions, sizes))[0], fraction
    used = fraction
    if eligible.all():
        used = _nearest(positions, fraction)
    elif not (eligible & (positions < fraction)).any():
        used = float(np.nextafter(positions[eligible].min(), 1))
    if used != fraction:
        notes.append(
            f"A fraction of {fraction:g} holds out none or all of so few documents: {used:.3g} is used instead."
        )
    return eligible & (positions < used), used


def _so_many(positions: np.ndarray, sizes: np.ndarray, wanted: int, notes: list[str]) -> np.ndarray:
    """Clusters by position, as long as they fit into the number wanted."""
    import numpy as np

    chosen = np.zeros(len(sizes), bool)
    left = wanted
    for number in np.argsort(positions).tolist():
        if left == 0:
            break
        if sizes[number] <= left:
            chosen[number] = True
            left -= int(sizes[number])
    if not chosen.any():
        chosen[np.lexsort((positions, sizes))[0]] = True
    held_out = int(sizes[chosen].sum())
    if held_out != wanted:
        notes.append(
            f"{counted(held_out, 'document', 'is', 'are')} held out instead of {wanted:,}: clusters of near-duplicates"
            " are not cut."
        )
    return chosen
