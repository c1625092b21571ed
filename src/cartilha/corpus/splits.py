"""Which documents are held out: those with the lowest positions, so that adding documents moves none or few.

A document's position follows from the hash of its text and the seed, that of a cluster of near-duplicates from its
smallest hash, so that a whole cluster is on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cartilha.corpus.pieces import extremes, nth_true
from cartilha.errors import UserError, counted

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")


def split_position(text_hash: str, seed: int) -> float:
    """A number in [0, 1), uniform over documents; equal texts with equal seeds have equal positions."""
    digest = hashlib.sha256(f"{seed}:{text_hash}".encode("ascii")).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def choose_split(text_hash: str, validation_fraction: float, seed: int) -> Split:
    """The side of a document: validation if its position is below the fraction, so that no text is on both sides."""
    return "validation" if split_position(text_hash, seed) < validation_fraction else "train"


@dataclass(frozen=True)
class SplitRule:
    """How many documents are held out: a fraction, or that number of documents, or the first ones of the input.

    The seed decides the positions. A UserError says that both numbers are given, or that a value is out of range.
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
    """Which documents are held out, and which are on neither side (`left_out`): bool, shape (num_documents,).

    Left out are near-duplicates of given documents, or of the `first`. `notes` say in a sentence each what was done
    differently from what was asked. `plain_leak_rate` is the rate if each document were split alone, as at random.
    """

    validation: np.ndarray
    left_out: np.ndarray
    fraction_used: float | None
    notes: tuple[str, ...]
    leak_rate: float
    plain_leak_rate: float


def leak_rate(clusters: np.ndarray, validation: np.ndarray) -> float:
    """Share of the held-out documents that have a near-duplicate, which has the same cluster, among the others."""
    return float(np.isin(clusters[validation], clusters[~validation]).mean()) if validation.any() else 0.0


def split_documents(
    text_hashes: Sequence[str] | np.ndarray,
    rule: SplitRule,
    clusters: np.ndarray | None = None,
    given: np.ndarray | None = None,
    own: np.ndarray | None = None,
) -> SplitResult:
    """Decide which documents are held out; a UserError if none is left on one of the sides.

    There are at least two hashes, in the order of the input and without exact duplicates. Arrays have the shape
    (num_documents,): the number that near-duplicates share (int64), whether a document is held out whatever the rule
    says (bool), and its `own` position, if that is known (float64).
    """
    num_documents = len(text_hashes)
    assert num_documents >= 2, "one document cannot be split"
    groups = np.arange(num_documents) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    if given is None and rule.first is not None:
        given = np.arange(num_documents) < rule.first
    if given is not None:
        return _fixed(groups, given)
    if rule.documents is not None and rule.documents >= num_documents:
        raise _too_many(rule.documents, num_documents)
    if own is None:
        own = np.array([split_position(str(text_hash), rule.seed) for text_hash in text_hashes])
    notes: list[str] = []
    ids = groups
    if not groups.any():
        notes.append(f"All {num_documents} documents are near-duplicates of one another: they are split one by one.")
        groups = np.arange(num_documents)
    positions = own if clusters is None else _cluster_positions(text_hashes, groups, own)
    sizes = np.bincount(groups)
    fraction = None
    if rule.documents is None:
        chosen, fraction = _below(positions, sizes, rule.fraction, notes)
        plain = own < _nearest(own, rule.fraction)
    else:
        chosen = _so_many(positions, sizes, rule.documents, notes)
        plain = np.isin(np.arange(num_documents), np.argsort(own)[: rule.documents])
    validation = chosen[groups]
    rates = leak_rate(ids, validation), leak_rate(ids, plain)
    return SplitResult(validation, np.zeros_like(validation), fraction, tuple(notes), *rates)


def split_singly(positions: np.ndarray, stays: np.ndarray, rule: SplitRule, given: np.ndarray | None) -> SplitResult:
    """What `split_documents` decides where no document has a near-duplicate, piece by piece over many documents.

    Arrays have the shape (num_documents,): the documents' positions, whether each is to be split at all (at least two
    are), and whether it is held out whatever the rule says.
    """
    num_documents, nothing = int(np.count_nonzero(stays)), np.zeros(len(stays), bool)
    if given is None and rule.first is not None:
        given, others = stays.copy(), nth_true(stays, np.array([rule.first]))
        given[others[0] if len(others) else len(stays) :] = False
    if given is not None:
        validation = given & stays
        if not validation.any() or int(np.count_nonzero(validation)) == num_documents:
            raise _nothing_left(validation)
        return SplitResult(validation, nothing, None, (), 0.0, 0.0)
    if rule.documents is not None:
        if rule.documents >= num_documents:
            raise _too_many(rule.documents, num_documents)
        bound, fraction = float(np.nextafter(extremes(positions, stays, rule.documents)[0][-1], 1)), None
    else:
        ends = positions[stays] if num_documents < 4 else np.concatenate(extremes(positions, stays, 2))
        bound = fraction = _nearest(ends, rule.fraction)
    notes = () if fraction in (None, rule.fraction) else (_other_fraction(rule.fraction, bound),)
    return SplitResult(stays & (positions < bound), nothing, fraction, notes, 0.0, 0.0)


def _too_many(documents: int, num_documents: int) -> UserError:
    there = counted(num_documents, "document")
    return UserError(f"{documents:,} of {there} cannot be held out; leave some to train on.")


def _nothing_left(given: np.ndarray) -> UserError:
    side = "train on" if given.any() else "hold out"
    return UserError(f"No document is left to {side}; change what is held out, or give more text.")


def _other_fraction(asked: float, used: float) -> str:
    return f"A fraction of {asked:g} holds out none or all documents: {used:.3g} is used instead."


def _cluster_positions(text_hashes: Sequence[str] | np.ndarray, groups: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The position of each cluster: that of its document with the smallest hash."""
    order = np.lexsort((np.asarray(text_hashes), groups))
    return np.asarray(own[order[np.searchsorted(groups[order], np.arange(groups.max() + 1))]])


def _nearest(positions: np.ndarray, fraction: float) -> float:
    """The nearest fraction that leaves neither side empty."""
    ordered = np.sort(positions)
    return float(min(max(fraction, (ordered[0] + ordered[1]) / 2), (ordered[-2] + ordered[-1]) / 2))


def _fixed(groups: np.ndarray, given: np.ndarray) -> SplitResult:
    """Hold out exactly the given documents; their near-duplicates are left out of training."""
    left_out = np.isin(groups, groups[given]) & ~given
    if not given.any() or (given | left_out).all():
        raise _nothing_left(given)
    return SplitResult(given, left_out, None, (), 0.0, leak_rate(groups, given))


def _below(positions: np.ndarray, sizes: np.ndarray, fraction: float, notes: list[str]) -> tuple[np.ndarray, float]:
    """Clusters below the fraction, except those larger than the side held out; and the fraction used."""
    wanted = fraction * sizes.sum()
    eligible = (sizes == 1) | (sizes <= wanted)
    if not eligible.all():
        notes.append(
            f"{counted((~eligible).sum(), 'cluster')} of near-duplicates (the largest of {sizes.max():,} documents)"
            f" cannot be held out, for a cluster may have {counted(round(wanted), 'document')} at most."
        )
    if not eligible.any():
        notes.append("Every cluster is larger than that: the smallest is held out anyway.")
        return np.arange(len(sizes)) == np.lexsort((positions, sizes))[0], fraction
    used = fraction
    if eligible.all():
        used = _nearest(positions, fraction)
    elif not (eligible & (positions < fraction)).any():
        used = float(np.nextafter(positions[eligible].min(), 1))
    if used != fraction:
        notes.append(_other_fraction(fraction, used))
    return eligible & (positions < used), used


def _so_many(positions: np.ndarray, sizes: np.ndarray, wanted: int, notes: list[str]) -> np.ndarray:
    """Clusters in the order of their positions, each that still fits into the number wanted."""
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
        held = counted(held_out, "document", "is", "are")
        notes.append(f"{held} held out instead of {wanted:,}: clusters of near-duplicates are not cut.")
    return chosen
