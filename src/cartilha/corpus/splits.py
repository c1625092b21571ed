"""Which documents are held out: those with the lowest positions, so that adding documents moves none or few.

A document's position follows from the hash of its text and the seed, that of a cluster of near-duplicates from its
smallest hash, so that a whole cluster is on one side.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from cartilha.corpus.pieces import each, extremes, in_order, large_array, nth_true, pieces, total, without
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


@dataclass(frozen=True)
class Clusters:
    """Near-duplicates, which go to one side together; arrays have a row for each document, and may be mapped files.

    Attributes:
        firsts: The number of the first document of each one's cluster, int64.
        hashes: The first 16 bytes of the SHA-256 of each text as two numbers, uint64, shape (num_documents, 2).
    """

    firsts: np.ndarray
    hashes: np.ndarray

    def array(self, dtype: DTypeLike) -> np.ndarray:
        """Zeros for what is known of each cluster, in the row of its first document."""
        return large_array(self.firsts.shape, dtype)

    def of(self, documents: np.ndarray) -> np.ndarray:
        """Which clusters have one of these documents: bool."""
        result = self.array(bool)
        for piece in pieces(len(documents)):
            result[self.firsts[piece][documents[piece]]] = True
        return result

    def members(self, clusters: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Which of these documents are in those clusters: bool."""
        return each(lambda own, firsts: own & clusters[firsts], documents, self.firsts)

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """How many of these documents each cluster has: int32."""
        result = self.array(np.int32)
        for piece in pieces(len(documents)):
            np.add.at(result, self.firsts[piece][documents[piece]], 1)
        return result

    def positions(self, own: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """The position of each cluster: that of the one of these documents that has the smallest hash; float64."""
        smallest = self.array(np.int64)  # one more than a document's number; 0 while none is known
        result = self.array(np.float64)
        for piece in pieces(len(documents)):
            numbers = piece.start + np.flatnonzero(documents[piece])
            firsts, hashes = self.firsts[numbers], self.hashes[numbers]
            order = np.lexsort((hashes[:, 1], hashes[:, 0], firsts))
            order = order[np.flatnonzero(np.diff(firsts[order], prepend=-1))]  # the smallest of each cluster
            numbers, firsts, hashes = numbers[order], firsts[order], hashes[order]
            before = smallest[firsts]
            known = self.hashes[before - 1]
            is_smaller = (hashes[:, 0] < known[:, 0]) | ((hashes[:, 0] == known[:, 0]) & (hashes[:, 1] < known[:, 1]))
            better = (before == 0) | is_smaller
            smallest[firsts[better]] = numbers[better] + 1
            result[firsts[better]] = own[numbers[better]]
        return result


def leak_rate(clusters: Clusters, validation: np.ndarray, others: np.ndarray) -> float:
    """Share of the held-out documents that have a near-duplicate, which has the same cluster, among the others."""
    held_out = int(np.count_nonzero(validation))
    return int(np.count_nonzero(clusters.members(clusters.of(others), validation))) / held_out if held_out else 0.0


def split_documents(
    positions: np.ndarray,
    stays: np.ndarray,
    rule: SplitRule,
    given: np.ndarray | None = None,
    clusters: Clusters | None = None,
) -> SplitResult:
    """Decide which documents are held out; a UserError if none is left on one of the sides.

    Arrays have the shape (num_documents,) and are in the order of the input: the documents' positions (float64),
    whether each is to be split at all (at least two are, without exact duplicates), and whether it is held out whatever
    the rule says.
    """
    num_documents = int(np.count_nonzero(stays))
    assert num_documents >= 2, "one document cannot be split"
    if given is None and rule.first is not None:
        given, others = each(np.copy, stays), nth_true(stays, np.array([rule.first]))
        given[others[0] if len(others) else len(stays) :] = False
    if given is not None:
        return _fixed(each(np.logical_and, given, stays), stays, clusters)
    if rule.documents is not None and rule.documents >= num_documents:
        raise _too_many(rule.documents, num_documents)
    plain, fraction, notes = _singly(positions, stays, rule)
    nothing = large_array(stays.shape, bool)
    if clusters is None:
        return SplitResult(plain, nothing, fraction, tuple(notes), 0.0, 0.0)
    plain_rate = leak_rate(clusters, plain, without(stays, plain))
    sizes = clusters.sizes(stays)
    if np.count_nonzero(sizes) == 1:
        alike = f"All {num_documents} documents are near-duplicates of one another: they are split one by one."
        return SplitResult(plain, nothing, fraction, (alike, *notes), plain_rate, plain_rate)
    of_clusters, notes = clusters.positions(positions, stays), []
    if rule.documents is None:
        chosen, fraction = _below(of_clusters, sizes, rule.fraction, notes)
    else:
        chosen = _so_many(of_clusters, sizes, rule.documents, notes)
    validation = clusters.members(chosen, stays)
    rate = leak_rate(clusters, validation, without(stays, validation))
    return SplitResult(validation, nothing, fraction, tuple(notes), rate, plain_rate)


def _singly(positions: np.ndarray, stays: np.ndarray, rule: SplitRule) -> tuple[np.ndarray, float | None, list[str]]:
    """Which documents are held out if each is looked at alone, the fraction used, and notes."""
    if rule.documents is not None:
        bound = float(np.nextafter(extremes(positions, stays, rule.documents)[0][-1], 1))
        return _up_to(stays, positions, bound), None, []
    used = _nearest(positions, stays, rule.fraction)
    notes = [] if used == rule.fraction else [_other_fraction(rule.fraction, used)]
    return _up_to(stays, positions, used), used, notes


def _up_to(mask: np.ndarray, positions: np.ndarray, bound: float) -> np.ndarray:
    """What is under the mask and below the bound: bool."""
    return each(lambda own, position: own & (position < bound), mask, positions)


def _too_many(documents: int, num_documents: int) -> UserError:
    there = counted(num_documents, "document")
    return UserError(f"{documents:,} of {there} cannot be held out; leave some to train on.")


def _nothing_left(given: np.ndarray) -> UserError:
    side = "train on" if given.any() else "hold out"
    return UserError(f"No document is left to {side}; change what is held out, or give more text.")


def _other_fraction(asked: float, used: float) -> str:
    return f"A fraction of {asked:g} holds out none or all documents: {used:.3g} is used instead."


def _nearest(positions: np.ndarray, mask: np.ndarray, fraction: float) -> float:
    """The nearest fraction that leaves neither side empty of what is under the mask."""
    few = int(np.count_nonzero(mask)) < 4
    ordered = np.sort(positions[mask] if few else np.concatenate(extremes(positions, mask, 2)))
    return float(min(max(fraction, (ordered[0] + ordered[1]) / 2), (ordered[-2] + ordered[-1]) / 2))


def _fixed(given: np.ndarray, stays: np.ndarray, clusters: Clusters | None) -> SplitResult:
    """Hold out exactly the given documents; their near-duplicates are left out of training."""
    left_out, rate, others = large_array(stays.shape, bool), 0.0, without(stays, given)
    if clusters is not None:
        left_out = clusters.members(clusters.of(given), others)
        rate = leak_rate(clusters, given, others)
    if not given.any() or not without(others, left_out).any():
        raise _nothing_left(given)
    return SplitResult(given, left_out, None, (), 0.0, rate)


def _below(positions: np.ndarray, sizes: np.ndarray, fraction: float, notes: list[str]) -> tuple[np.ndarray, float]:
    """Clusters below the fraction, except those larger than the side held out; and the fraction used."""
    there = each(lambda size: size > 0, sizes)
    wanted = fraction * int(sizes.sum())
    eligible = each(lambda size: (size == 1) | ((size > 0) & (size <= wanted)), sizes)
    too_large = int(np.count_nonzero(there)) - int(np.count_nonzero(eligible))
    if too_large:
        notes.append(
            f"{counted(too_large, 'cluster')} of near-duplicates (the largest of {sizes.max():,} documents)"
            f" cannot be held out, for a cluster may have {counted(round(wanted), 'document')} at most."
        )
    if not eligible.any():
        notes.append("Every cluster is larger than that: the smallest is held out anyway.")
        return _smallest(positions, sizes), fraction
    used = fraction
    if not too_large:
        used = _nearest(positions, there, fraction)
    elif not _up_to(eligible, positions, fraction).any():
        used = float(np.nextafter(extremes(positions, eligible, 1)[0][0], 1))
    if used != fraction:
        notes.append(_other_fraction(fraction, used))
    return _up_to(eligible, positions, used), used


def _smallest(positions: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The cluster of the fewest documents, and of several the one with the lowest position: bool."""
    smallest = extremes(sizes, each(lambda size: size > 0, sizes), 1)[0][0]
    mask = each(lambda size: size == smallest, sizes)
    lowest = extremes(positions, mask, 1)[0][0]
    return each(lambda own, position: own & (position == lowest), mask, positions)


def _so_many(positions: np.ndarray, sizes: np.ndarray, wanted: int, notes: list[str]) -> np.ndarray:
    """Clusters in the order of their positions, each that still fits into the number wanted."""
    chosen = large_array(sizes.shape, bool)
    left = wanted
    for order in in_order(positions, each(lambda size: size > 0, sizes)):
        for number, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
            if size <= left:
                chosen[number] = True
                left -= size
                if left == 0:
                    break
        if left == 0:
            break
    if not chosen.any():
        chosen = _smallest(positions, sizes)
    held_out = total(sizes, chosen)
    if held_out != wanted:
        held = counted(held_out, "document", "is", "are")
        notes.append(f"{held} held out instead of {wanted:,}: clusters of near-duplicates are not cut.")
    return chosen
