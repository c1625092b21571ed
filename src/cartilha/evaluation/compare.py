"""Two models, whose tokenizers may differ, on the same documents: the difference, how sure it is, and where it lies.

A document that is hard for one model is hard for the other, so differences of documents say far more than two intervals
side by side (Koehn 2004, W04-3250; Dror et al. 2018, P18-1128, section 3.2). Bits per byte divide by what both share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from cartilha.errors import UserError
from cartilha.evaluation.bootstrap import FEW_DOCUMENTS, LEVEL, bootstrap_interval
from cartilha.evaluation.documents import MAX_DOMAINS, by_domain
from cartilha.evaluation.saved import SavedEvaluation

MAX_EXACT_DOCUMENTS = 16  # up to this many, all 65,536 sign patterns are counted
LEAST_LISTED_BYTES = 200  # a text of a few words swings by whole bits per byte, which says nothing
GROUP = 8  # documents whose signs one random byte holds
GROUPS_A_CHUNK = 256


@dataclass(frozen=True)
class DocumentChange:
    """A document under both models; bits per byte under the first and under the second."""

    doc_id: str
    num_bytes: int
    bits_per_byte_first: float
    bits_per_byte_second: float


@dataclass(frozen=True)
class DomainChange:
    """The documents of one domain under both models.

    The interval is None below 50 documents. Each is a 95 % interval of its own, so that among many domains some miss
    the truth.
    """

    bits_per_byte_first: float
    bits_per_byte_second: float
    bits_per_byte_difference: float
    bits_per_byte_difference_interval: list[float] | None
    share_improved: float
    num_documents: int
    num_bytes: int


@dataclass(frozen=True)
class Comparison:
    """A second model against a first on the same documents; below zero the second is better.

    Attributes:
        p_value: Two-sided, of the sign-flip test of no difference.
        share_improved: Documents that need fewer bits under the second model; ties count half.
        gained_most: Documents whose bits per byte fell most, the largest fall first; in `lost_most` they rose.
        domains: The largest ones, in the order of their names.
        bits_per_byte_difference_interval: Low and high, from the paired bootstrap; None for fewer than two documents.
    """

    bits_per_byte_first: float
    bits_per_byte_second: float
    bits_per_byte_difference: float
    p_value: float
    share_improved: float
    num_documents: int
    gained_most: list[DocumentChange]
    lost_most: list[DocumentChange]
    domains: dict[str, DomainChange]
    bits_per_byte_difference_interval: list[float] | None
    interval_level: float = LEVEL


@dataclass(frozen=True)
class _Pairs:
    """Bits of documents under both models, and their UTF-8 bytes; one entry per document."""

    first: np.ndarray
    second: np.ndarray
    num_bytes: np.ndarray

    @cached_property
    def difference(self) -> np.ndarray:
        difference: np.ndarray = self.second - self.first
        return difference

    @property
    def share_improved(self) -> float:
        return float(np.mean(self.difference < 0) + np.mean(self.difference == 0) / 2)

    def bits_per_byte(self, bits: np.ndarray) -> float:
        return math.fsum(bits) / int(self.num_bytes.sum())

    def interval(self) -> list[float] | None:
        found = bootstrap_interval(self.difference, self.num_bytes)
        return None if found is None else list(found)


def shared_documents(first: SavedEvaluation, second: SavedEvaluation) -> np.ndarray:
    """Indices of the documents that have bytes, and that both tokenizers keep whole.

    A UserError says that the evaluations are of different documents.
    """
    if first.text_hashes != second.text_hashes:
        raise UserError("The two evaluations are of different documents; score the same text with both models.")
    return np.flatnonzero(first.round_trips & second.round_trips & (first.num_bytes > 0))


def compare_documents(
    first: SavedEvaluation, second: SavedEvaluation, chosen: np.ndarray, num_listed: int = 10
) -> Comparison:
    """Compare two models on the chosen ones (at least one) of their `shared_documents`.

    Each of the two lists holds at most `num_listed` documents, none of less than 200 bytes (or than the median, where
    that is smaller). An nll that is not finite is a ValueError.
    """
    bits_first, bits_second = (one.nll[chosen] / math.log(2) for one in (first, second))
    pairs = _Pairs(bits_first, bits_second, first.num_bytes[chosen].astype(np.int64))
    gained, lost = _most_changed(pairs, [first.doc_ids[i] for i in chosen], num_listed)
    return Comparison(
        bits_per_byte_first=pairs.bits_per_byte(pairs.first),
        bits_per_byte_second=pairs.bits_per_byte(pairs.second),
        bits_per_byte_difference=pairs.bits_per_byte(pairs.difference),
        p_value=sign_flip_p_value(pairs.difference),
        share_improved=pairs.share_improved,
        num_documents=len(chosen),
        gained_most=gained,
        lost_most=lost,
        domains=_domain_changes(pairs, [first.domains[i] for i in chosen]),
        bits_per_byte_difference_interval=pairs.interval(),
    )


def sign_flip_p_value(differences: np.ndarray, *, num_flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation (sign-flip) test that two models do equally well.

    If the models were exchangeable, each document's difference could as well have the other sign. The p-value is the
    share of sign patterns whose corpus difference is at least as large as the observed one. The statistic is the sum of
    the differences; divided by the bytes, which no pattern changes, it is the difference in bits per byte (Fisher 1935,
    "The Design of Experiments", section 21).

    Up to 16 documents that differ, all patterns are counted. Above that `num_flips` of them are drawn, and the observed
    one is counted among them: (1 + k) / (1 + num_flips) is never zero, and never too small (Phipson and Smyth 2010,
    arXiv:1603.05766). Documents without a difference change nothing.
    """
    values = np.asarray(differences, np.float64)
    values = values[values != 0]
    if not len(values):
        return 1.0
    # Patterns with the same sum must count as equal although they are added in another order.
    reached = abs(math.fsum(values)) - 1e-12 * float(np.abs(values).sum())
    if len(values) <= MAX_EXACT_DOCUMENTS:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= reached))
    sums = _flipped_sums(values, num_flips, np.random.default_rng(seed))
    return (1 + int(np.count_nonzero(np.abs(sums) >= reached))) / (1 + num_flips)


def _flipped_sums(values: np.ndarray, num_flips: int, generator: np.random.Generator) -> np.ndarray:
    """Sums under random signs, shape (num_flips,).

    Eight documents share a table of their 256 signed sums, and a random byte chooses from it: each document's sign is
    still drawn alone, at an eighth of the work.
    """
    signs = 1.0 - 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).T  # (8, 256)
    padded = np.concatenate([values, np.zeros(-len(values) % GROUP)]).reshape(-1, GROUP)
    sums = np.zeros(num_flips)
    for begin in range(0, len(padded), GROUPS_A_CHUNK):
        tables = padded[begin : begin + GROUPS_A_CHUNK] @ signs
        patterns = generator.integers(0, 256, (len(tables), num_flips), np.uint8)
        for table, pattern in zip(tables, patterns, strict=True):
            sums += table[pattern]
    return sums


def _most_changed(pairs: _Pairs, doc_ids: list[str], num_listed: int) -> list[list[DocumentChange]]:
    num_bytes = pairs.num_bytes
    listed = np.flatnonzero(num_bytes >= min(LEAST_LISTED_BYTES, float(np.median(num_bytes))))
    first, second = pairs.first / num_bytes, pairs.second / num_bytes
    change = pairs.difference[listed] / num_bytes[listed]
    order = np.argsort(change, kind="stable")

    def records(places: np.ndarray) -> list[DocumentChange]:
        return [
            DocumentChange(doc_ids[i], int(num_bytes[i]), float(first[i]), float(second[i]))
            for i in listed[places].tolist()
        ]

    fell, rose = order[change[order] < 0], order[change[order] > 0]
    return [records(fell[:num_listed]), records(rose[::-1][:num_listed])]


def _domain_changes(pairs: _Pairs, domains: list[str]) -> dict[str, DomainChange]:
    changes = {}
    for domain, members in sorted(islice(by_domain(domains, pairs.num_bytes).items(), MAX_DOMAINS)):
        own = _Pairs(pairs.first[members], pairs.second[members], pairs.num_bytes[members])
        first, second = own.bits_per_byte(own.first), own.bits_per_byte(own.second)
        changes[domain] = DomainChange(
            bits_per_byte_first=first,
            bits_per_byte_second=second,
            bits_per_byte_difference=second - first,
            bits_per_byte_difference_interval=own.interval() if len(members) >= FEW_DOCUMENTS else None,
            share_improved=own.share_improved,
            num_documents=len(members),
            num_bytes=int(own.num_bytes.sum()),
        )
    return changes
