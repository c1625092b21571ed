"""The measures: sums and counts, divided once, at the end. Formulas and worked examples in docs/measures.md."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cartilha.evaluation.documents import ScoredDocuments
from cartilha.evaluation.windows import Protocol

MAX_LOST_BYTES = 0.01  # above this share of bytes that do not round-trip, byte figures would not mean the corpus


@dataclass(frozen=True)
class Sums:
    """Sums over documents.

    Attributes:
        nll: Nats.
        num_tokens: Tokens scored; bytes (UTF-8), chars (code points) and words (split at white space) of their text.
    """

    nll: float
    num_tokens: int
    num_bytes: int
    num_chars: int
    num_words: int
    num_documents: int

    @property
    def perplexity(self) -> float:
        """exp(S / N): the token perplexity."""
        return _exp(self.nll / self.num_tokens) if self.num_tokens else math.nan

    @property
    def word_perplexity(self) -> float:
        """exp(S / W)."""
        return _exp(self.nll / self.num_words) if self.num_words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """S / (B ln 2)."""
        return self.nll / (self.num_bytes * math.log(2)) if self.num_bytes else math.nan

    @property
    def bits_per_char(self) -> float:
        """S / (C ln 2)."""
        return self.nll / (self.num_chars * math.log(2)) if self.num_chars else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def sum_documents(documents: ScoredDocuments, nll: np.ndarray, chosen: np.ndarray) -> Sums:
    """Sums over the chosen documents (a boolean mask)."""
    return Sums(
        nll=math.fsum(nll[chosen]),
        num_tokens=int(documents.num_tokens[chosen].sum()),
        num_bytes=int(documents.num_bytes[chosen].sum()),
        num_chars=int(documents.num_chars[chosen].sum()),
        num_words=int(documents.num_words[chosen].sum()),
        num_documents=int(chosen.sum()),
    )


@dataclass(frozen=True)
class Evaluation:
    """What one model scores on one corpus under one protocol.

    Attributes:
        model: The MODEL argument.
        protocol: With its hash; figures of other hashes are not comparable.
        corpus_hash: Over the documents' text hashes.
        total: Over all documents.
        byte_total: Over the documents that survive decode(encode(text)); byte, character and word figures use these.
        num_lost: Documents that do not, by name in `lost`.
        num_empty: Documents without a token, skipped.
        vocabulary_size: Rows of the head: the perplexity of the uniform model.
        seconds: Wall time of the scoring.
        notes: What a reader must know to trust the figures.
    """

    model: str
    protocol: Protocol
    corpus_hash: str
    total: Sums
    byte_total: Sums
    num_lost: int
    lost: tuple[str, ...]
    num_empty: int
    vocabulary_size: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

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
        shown = self.byte_total if self.bytes_are_meant else None
        return {
            "model": self.model,
            "protocol": {**asdict(self.protocol), "hash": self.protocol.hash},
            "corpus_hash": self.corpus_hash,
            "perplexity": self.perplexity,
            "loss": self.total.nll / self.total.num_tokens,
            "word_perplexity": shown.word_perplexity if shown else None,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_char": shown.bits_per_char if shown else None,
            "num_tokens": self.total.num_tokens,
            "num_bytes": self.total.num_bytes,
            "num_chars": self.total.num_chars,
            "num_words": self.total.num_words,
            "num_documents": self.total.num_documents,
            "num_documents_lost": self.num_lost,
            "documents_lost": list(self.lost),
            "num_documents_empty": self.num_empty,
            "baselines": {"uniform": self._uniform()},
            "notes": list(self.notes),
            "seconds": self.seconds,
            "tokens_per_second": self.total.num_tokens / self.seconds if self.seconds else None,
        }

    def _uniform(self) -> dict[str, float | None]:
        """The model that gives every row of the vocabulary the same probability."""
        nats = math.log(self.vocabulary_size)
        sums = self.byte_total
        bits = sums.num_tokens * nats / (sums.num_bytes * math.log(2)) if self.bytes_are_meant else None
        return {"perplexity": float(self.vocabulary_size), "bits_per_byte": bits}


def make_evaluation(
    model: str,
    protocol: Protocol,
    documents: ScoredDocuments,
    nll: np.ndarray,
    *,
    vocabulary_size: int,
    seconds: float,
) -> Evaluation:
    """The figures of one model from its documents' nll."""
    everything = np.ones(len(nll), bool)
    total = sum_documents(documents, nll, everything)
    byte_total = sum_documents(documents, nll, documents.round_trips)
    lost = [documents.doc_ids[i] for i in np.flatnonzero(~documents.round_trips)]
    evaluation = Evaluation(
        model,
        protocol,
        documents.corpus_hash,
        total,
        byte_total,
        len(lost),
        tuple(lost[:20]),
        documents.num_empty,
        vocabulary_size,
        seconds,
    )
    return Evaluation(**{**evaluation.__dict__, "notes": tuple(_notes(evaluation))})


def _notes(evaluation: Evaluation) -> list[str]:
    notes = []
    if evaluation.num_lost:
        names = ", ".join(evaluation.lost[:3]) + (", ..." if evaluation.num_lost > 3 else "")
        share = 1 - evaluation.byte_total.num_bytes / max(1, evaluation.total.num_bytes)
        outcome = (
            "left out of the byte figures"
            if evaluation.bytes_are_meant
            else "more than 1 %, so there are no byte figures"
        )
        notes.append(
            f"{evaluation.num_lost} documents ({share:.2%} of the bytes) do not survive this tokenizer's "
            f"decode(encode(text)): {outcome} ({names})."
        )
    if evaluation.perplexity > 2 * evaluation.vocabulary_size:
        notes.append(
            f"A perplexity of {evaluation.perplexity:,.0f} is above twice the vocabulary size of "
            f"{evaluation.vocabulary_size:,}: worse than guessing, so the set-up is faulty (tokenizer or weights?)."
        )
    return notes
