"""Two models on the same documents: the difference, how sure it is, and where it comes from.

Everything is paired: a document that is hard for one model is hard for the other, so differences of documents say
far more than two intervals side by side (Koehn 2004, W04-3250; Dror et al. 2018, "The Hitchhiker's Guide to Testing
Statistical Significance in Natural Language Processing", P18-1128, section 3.2). The models may have different
tokenizers: bits per byte divide by what both share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cartilha.evaluation.bootstrap import FEW_DOCUMENTS, Interval, bootstrap_interval
from cartilha.evaluation.documents import MAX_DOMAINS, by_domain

MAX_EXACT_DOCUMENTS = 16  # up to this many, all 65,536 sign patterns are counted
LEAST_LISTED_BYTES = 200  # a text of a few words swings by whole bits per byte, and says nothing
GROUP = 8  # documents whose signs one random byte holds
GROUPS_A_CHUNK = 256


@dataclass(frozen=True)
class DocumentChange:
    """A document under both models.

    Attributes:
        doc_id: Its name.
        num_bytes: UTF-8 bytes that were scored.
        bits_per_byte_first: Under the first model; bits_per_byte_second under the second.
    """

    doc_id: str
    num_bytes: int
    bits_per_byte_first: float
    bits_per_byte_second: float


@dataclass(frozen=True)
class DomainChange:
    """The documents of one domain under both models.

    Attributes:
        interval: Of the difference; None below 50 documents. Each stands alone: of many domains some will miss.
    """

    domain: str
    num_documents: int
    num_bytes: int
    bits_per_byte_first: float
    bits_per_byte_second: float
    interval: Interval | None
    share_improved: float


@dataclass(frozen=True)
class Comparison:
    """A second model against a first on the same documents; below zero the second is better.

    Attributes:
        bits_per_byte_first: Over the corpus, under the first model; bits_per_byte_second under the second.
        interval: Of bits_per_byte_difference, from the paired bootstrap.
        p_value: Two-sided, of the sign-flip test of no difference.
        share_improved: Documents that need fewer bits under the second model; ties count half.
        gained_most: Documents whose bits per byte fell most, the largest fall first; lost_most likewise that rose.
        domains: By name (`MAX_DOMAINS` at most, the largest).
    """

    bits_per_byte_first: float
    bits_per_byte_second: float
    bits_per_byte_difference: float
    interval: Interval
    p_value: float
    share_improved: float
    num_documents: int
    gained_most: tuple[DocumentChange, ...]
    lost_most: tuple[DocumentChange, ...]
    domains: tuple[DomainChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """The record that `compare --json` carries."""
        return {
            "bits_per_byte_first": self.bits_per_byte_first,
            "bits_per_byte_second": self.bits_per_byte_second,
            "bits_per_byte_difference": self.bits_per_byte_difference,
            "bits_per_byte_difference_interval": self.interval.bounds,
            "interval_level": self.interval.level,
            "p_value": self.p_value,
            "share_improved": self.share_improved,
            "num_documents": self.num_documents,
            "gained_most": [asdict(document) for document in self.gained_most],
            "lost_most": [asdict(document) for document in self.lost_most],
            "domains": {domain.domain: _domain_record(domain) for domain in self.domains},
        }


def _domain_record(domain: DomainChange) -> dict[str, Any]:
    return {
        "bits_per_byte_first": domain.bits_per_byte_first,
        "bits_per_byte_second": domain.bits_per_byte_second,
        "bits_per_byte_difference": domain.bits_per_byte_second - domain.bits_per_byte_first,
        "bits_per_byte_difference_interval": domain.interval.bounds if domain.interval else None,
        "share_improved": domain.share_improved,
        "num_documents": domain.num_documents,
        "num_bytes": domain.num_bytes,
    }


def compare_documents(
    nll_a: np.ndarray,
    nll_b: np.ndarray,
    num_bytes: np.ndarray,
    doc_ids: Sequence[str],
    *,
    domains: Sequence[str] | None = None,
    num_listed: int = 10,
    level: float = 0.95,
    num_resamples: int = 2000,
    num_flips: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two models on the same documents, in the same order.

    Args:
        nll_a: Nats of each document under the first model, shape (num_documents,).
        nll_b: Under the second.
        num_bytes: UTF-8 bytes of each; only documents whose bytes both tokenizers keep belong here.
        doc_ids: Their names.
        domains: Of each document; None for no figures by domain.
        num_listed: At most so many documents in each of the two lists. Those shorter than 200 bytes are not listed,
            or than half of the documents where that is less: a few words swing by whole bits per byte.
        level: Of the intervals.
        num_resamples: Of the bootstrap.
        num_flips: Of the sign-flip test.
        seed: Of both.

    Raises:
        ValueError: The arrays differ in length, hold numbers that are not finite, or there are no bytes.
    """
    first, second = np.asarray(nll_a, np.float64) / math.log(2), np.asarray(nll_b, np.float64) / math.log(2)
    sizes = np.asarray(num_bytes, np.int64)
    lengths = {len(first), len(second), len(sizes), len(doc_ids), *([] if domains is None else [len(domains)])}
    if len(lengths) > 1:
        raise ValueError(f"Two models are compared on the same documents, but there are {sorted(lengths)} of them.")
    difference = second - first
    interval = bootstrap_interval(difference, sizes, level=level, num_resamples=num_resamples, seed=seed)
    total = int(sizes.sum())
    gained, lost = _most_changed(first, second, sizes, doc_ids, num_listed)
    return Comparison(
        bits_per_byte_first=math.fsum(first) / total,
        bits_per_byte_second=math.fsum(second) / total,
        bits_per_byte_difference=math.fsum(difference) / total,
        interval=interval,
        p_value=sign_flip_p_value(difference, num_flips=num_flips, seed=seed),
        share_improved=_share_improved(difference),
        num_documents=len(sizes),
        gained_most=gained,
        lost_most=lost,
        domains=() if domains is None else _by_domain(first, second, sizes, domains, level, num_resamples, seed),
    )


def sign_flip_p_value(differences: np.ndarray, *, num_flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation (sign-flip) test that two models do equally well.

    Were the models exchangeable, each document's difference could as well have the other sign; the p-value is the share
    of sign patterns whose corpus difference is at least as large as the observed one. The statistic is the sum of the
    differences, which over the bytes, the same under every pattern, is the difference in bits per byte. (Fisher 1935,
    "The Design of Experiments", section 21; in language processing Dror et al. 2018, P18-1128, section 3.2.)

    Up to 16 documents that differ, all patterns are counted. Above that `num_flips` are drawn, and the observed one is
    counted among them, (1 + k) / (1 + num_flips): never zero, and never too small (Phipson and Smyth 2010,
    arXiv:1603.05766).

    Args:
        differences: One a document, float64; zeros change nothing.
        num_flips: Random patterns.
        seed: Of the patterns.
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


def _share_improved(difference: np.ndarray) -> float:
    return float(np.mean(difference < 0) + np.mean(difference == 0) / 2)


def _most_changed(
    first: np.ndarray, second: np.ndarray, sizes: np.ndarray, doc_ids: Sequence[str], num_listed: int
) -> tuple[tuple[DocumentChange, ...], tuple[DocumentChange, ...]]:
    """The documents whose bits per byte fell most, and those whose rose most."""
    listed = np.flatnonzero(sizes >= max(1, min(LEAST_LISTED_BYTES, float(np.median(sizes)))))
    change = (second - first)[listed] / sizes[listed]
    order = np.argsort(change, kind="stable")

    def records(places: np.ndarray) -> tuple[DocumentChange, ...]:
        return tuple(
            DocumentChange(doc_ids[i], int(sizes[i]), float(first[i] / sizes[i]), float(second[i] / sizes[i]))
            for i in listed[places].tolist()
        )

    fell, rose = order[change[order] < 0], order[change[order] > 0]
    return records(fell[:num_listed]), records(rose[::-1][:num_listed])


def _by_domain(
    first: np.ndarray,
    second: np.ndarray,
    sizes: np.ndarray,
    domains: Sequence[str],
    level: float,
    num_resamples: int,
    seed: int,
) -> tuple[DomainChange, ...]:
    """Figures of the largest domains that have bytes, by name."""
    members = by_domain(domains)
    largest = set(sorted(members, key=lambda name: -int(sizes[members[name]].sum()))[:MAX_DOMAINS])
    changes = []
    for domain, documents in members.items():
        if domain not in largest:
            continue
        a, b, size = first[documents], second[documents], sizes[documents]
        total = int(size.sum())
        if not total:
            continue
        interval = None
        if len(documents) >= FEW_DOCUMENTS:
            interval = bootstrap_interval(b - a, size, level=level, num_resamples=num_resamples, seed=seed)
        in_first, in_second = math.fsum(a) / total, math.fsum(b) / total
        changes.append(
            DomainChange(domain, len(documents), total, in_first, in_second, interval, _share_improved(b - a))
        )
    return tuple(changes)
