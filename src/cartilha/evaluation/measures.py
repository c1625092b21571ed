"""What one model scores on one corpus: every measure of it, and what stands beside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from cartilha.errors import counted
from cartilha.evaluation.baselines import uniform
from cartilha.evaluation.bootstrap import FEW_DOCUMENTS, Interval, bootstrap_interval
from cartilha.evaluation.documents import MAX_DOMAINS, ScoredDocuments, by_domain
from cartilha.evaluation.nll import POSITION_EDGES, DocumentScores
from cartilha.evaluation.scorer import Scorer
from cartilha.evaluation.sums import MEASURES, Measure, Sums, perplexity
from cartilha.evaluation.windows import Protocol

MAX_LOST_BYTES = 0.01  # above this share of bytes that do not round-trip, byte figures would not mean the corpus
DOMAIN_FIGURES = ("perplexity", "bits_per_byte", "num_tokens", "num_bytes", "num_documents")

Figures = Mapping[str, float | None]


def sum_documents(documents: ScoredDocuments, nll: np.ndarray, chosen: np.ndarray) -> Sums:
    """Sums over the chosen documents (their indices)."""
    counted_of_each = ("num_tokens", "num_bytes", "num_chars", "num_words")
    counts = {name: int(getattr(documents, name)[chosen].sum()) for name in counted_of_each}
    return Sums(nll=math.fsum(nll[chosen]), **counts, num_documents=len(chosen))


@dataclass(frozen=True)
class Evaluation:
    """What one model scores on one corpus under one protocol.

    Attributes:
        byte_total: Over the documents that survive decode(encode(text)); byte, character and word figures use these.
        macro: Means over documents, each counting alike: what the typical document costs, short ones included.
        interval: 95 % bootstrap interval of the bits per byte; None for fewer than two documents.
        domains: Sums over the documents of each domain, largest first; `MAX_DOMAINS` of `num_domains` at most.
        positions: Mean loss by the token's position in its document.
        unused_rows_mass: Mean probability that rows which no token uses get together; None if it was not measured.
        baselines: At least the uniform model.
        lost: Names of the documents that do not round-trip.
        notes: What a reader must know to trust the figures.
    """

    model: str
    protocol: Protocol
    corpus_hash: str
    total: Sums
    byte_total: Sums
    macro: Figures
    interval: Interval | None
    domains: Mapping[str, Sums]
    num_domains: int
    positions: tuple[dict[str, float], ...]
    unused_rows_mass: float | None
    baselines: Mapping[str, Figures]
    lost: tuple[str, ...]
    num_empty: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def bytes_are_meant(self) -> bool:
        """Whether so much of the text survives tokenization that byte figures stand for the corpus."""
        total = self.total.num_bytes
        return total > 0 and (total - self.byte_total.num_bytes) <= MAX_LOST_BYTES * total

    @property
    def perplexity(self) -> float:
        """Token perplexity over all documents."""
        return self.total.perplexity

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte, or None where byte figures are refused."""
        return self.byte_total.bits_per_byte if self.bytes_are_meant else None

    def to_dict(self) -> dict[str, Any]:
        """The record that `evaluate --json`, results.json and the report carry."""
        return {
            "model": self.model,
            "protocol": {**asdict(self.protocol), "hash": self.protocol.hash},
            "corpus_hash": self.corpus_hash,
            "loss": self.total.loss,
            **{measure.key: self._measured(measure) for measure in MEASURES},
            "bits_per_byte_interval": list(self.interval) if self.interval and self.bytes_are_meant else None,
            **{name: number for name, number in asdict(self.total).items() if name != "nll"},
            "num_documents_lost": len(self.lost),
            "documents_lost": list(self.lost[:20]),
            "num_documents_empty": self.num_empty,
            "macro": self._shown(self.macro),
            "unused_rows_mass": self.unused_rows_mass,
            "baselines": {name: self._shown(figures) for name, figures in self.baselines.items()},
            "domains": {
                domain: self._shown({name: getattr(sums, name) for name in DOMAIN_FIGURES})
                for domain, sums in self.domains.items()
            },
            "num_domains": self.num_domains,
            "positions": list(self.positions),
            "notes": list(self.notes),
            "seconds": self.seconds,
            "tokens_per_second": self.total.num_tokens / self.seconds if self.seconds else None,
        }

    def _measured(self, measure: Measure) -> float | None:
        if not measure.of_text:
            return float(getattr(self.total, measure.key))
        return float(getattr(self.byte_total, measure.key)) if self.bytes_are_meant else None

    def _shown(self, figures: Figures) -> dict[str, float | None]:
        return {**figures, "bits_per_byte": figures["bits_per_byte"] if self.bytes_are_meant else None}


def make_evaluation(
    scorer: Scorer,
    documents: ScoredDocuments,
    scores: DocumentScores,
    seconds: float,
    baselines: Mapping[str, Figures] | None = None,
) -> Evaluation:
    """The figures of one model; `baselines` are those beside the uniform model, which is always there."""
    nll = scores.nll
    kept = documents.round_trips & (documents.num_bytes > 0)
    byte_total = sum_documents(documents, nll, np.flatnonzero(kept))
    domains = by_domain(documents.domains, documents.num_bytes * kept)
    evaluation = Evaluation(
        model=scorer.loaded.reference,
        protocol=scorer.protocol,
        corpus_hash=documents.corpus_hash,
        total=sum_documents(documents, nll, np.arange(len(nll))),
        byte_total=byte_total,
        macro=_macro(documents, nll, kept),
        interval=_interval(nll[kept] / math.log(2), documents.num_bytes[kept]),
        domains={
            name: sum_documents(documents, nll, members[kept[members]])
            for name, members in islice(domains.items(), MAX_DOMAINS)
        },
        num_domains=len(domains),
        positions=_positions(scores),
        unused_rows_mass=None if scores.unused_mass is None else scores.unused_mass / int(documents.num_tokens.sum()),
        baselines={"uniform": uniform(scorer.vocabulary_size, byte_total), **(baselines or {})},
        lost=tuple(documents.doc_ids[i] for i in np.flatnonzero(~documents.round_trips)),
        num_empty=documents.num_empty,
        seconds=seconds,
    )
    return replace(evaluation, notes=tuple(_notes(evaluation, scorer.vocabulary_size)))


def _macro(documents: ScoredDocuments, nll: np.ndarray, kept: np.ndarray) -> Figures:
    """The perplexity is the exponential of the mean loss, taken once: perplexities of documents are never averaged."""
    scored = documents.num_tokens > 0
    loss = float(np.mean(nll[scored] / documents.num_tokens[scored]))
    bits = nll[kept] / (documents.num_bytes[kept] * math.log(2))
    bits_per_byte = float(np.mean(bits)) if len(bits) else math.nan
    return {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits_per_byte}


def _interval(bits: np.ndarray, num_bytes: np.ndarray) -> Interval | None:
    return bootstrap_interval(bits, num_bytes) if len(bits) else None


def _positions(scores: DocumentScores) -> tuple[dict[str, float], ...]:
    """Mean loss by position, for the bins that hold tokens."""
    rows = zip(POSITION_EDGES, scores.position_nll, scores.position_tokens, strict=True)
    return tuple({"from": edge, "loss": float(n / k), "num_tokens": int(k)} for edge, n, k in rows if k)


def _notes(evaluation: Evaluation, vocabulary_size: int) -> list[str]:
    notes = []
    num_lost, num_documents = len(evaluation.lost), evaluation.total.num_documents
    if num_lost:
        names = ", ".join(evaluation.lost[:3]) + (", ..." if num_lost > 3 else "")
        share = 1 - evaluation.byte_total.num_bytes / max(1, evaluation.total.num_bytes)
        outcome = "left out of the byte figures"
        if not evaluation.bytes_are_meant:
            outcome = "more than 1 %, so there are no byte figures"
        notes.append(
            f"{counted(num_lost, 'document')} ({share:.2%} of the bytes) {'does' if num_lost == 1 else 'do'} not "
            f"survive this tokenizer's decode(encode(text)): {outcome} ({names})."
        )
    if evaluation.interval is None and evaluation.bytes_are_meant:
        notes.append("There is no interval: it takes at least two documents with bytes that are scored.")
    elif num_documents < FEW_DOCUMENTS:
        documents = counted(num_documents, "document")
        notes.append(f"The interval rests on {documents}; below {FEW_DOCUMENTS} it is rough.")
    if evaluation.perplexity > 2 * vocabulary_size:
        notes.append(
            f"A perplexity of {evaluation.perplexity:,.0f} is above twice the vocabulary size of "
            f"{vocabulary_size:,}: worse than guessing, so the set-up is faulty (tokenizer or weights?)."
        )
    return notes
