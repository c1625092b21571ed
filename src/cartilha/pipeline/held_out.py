"""The text that an evaluation scores, and the training text that stands beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from cartilha.config import CompareConfig, EvaluateConfig
from cartilha.corpus.document import Document
from cartilha.corpus.hints import log_hints
from cartilha.corpus.near_duplicates import has_near_duplicate
from cartilha.corpus.readers import read_documents
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.sources import Source, resolve_inputs
from cartilha.errors import UserError
from cartilha.evaluation.baselines import (
    MAX_PRIME_BYTES,
    token_counts,
    unigram_nll,
    xz_bits_per_byte,
    zstd_bits_per_byte,
)
from cartilha.evaluation.documents import ScoredDocuments
from cartilha.evaluation.measures import Sums
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer

log = logging.getLogger("cartilha")

# Compressors read at about 1 MB/s, twice each: beyond this the baseline would take longer than the model.
MAX_COMPRESSED_BYTES = 4 << 20


@dataclass(frozen=True)
class HeldOut:
    """What is scored; `documents` may be called once a model.

    Attributes:
        config: What was asked for.
        store: The store named, whose training side is the reference, or None.
        split: The side of the store that is scored; None where the text comes from `--input`.
        sources: What `--input` names.
    """

    config: EvaluateConfig | CompareConfig
    store: TokenStore | None
    split: Literal["validation", "train"] | None
    sources: tuple[Source, ...] = ()

    def documents(self) -> Iterator[Document]:
        """The documents, in order, streamed."""
        config = self.config
        if self.split is None:
            return read_documents(self.sources, ReadSettings.of(config), limit_documents=config.limit_documents)
        assert self.store is not None
        return islice(self.store.read_documents(self.split), config.limit_documents)

    def num_tokens(self, tokenizer: TextTokenizer) -> float | None:
        """Tokens to score where that is known beforehand, for the progress bar."""
        config = self.config
        whole = config.limit_documents is None and config.protocol == "full"
        if self.store is None or self.split is None or not whole or tokenizer.fingerprint() != self.store.fingerprint:
            return None
        return float(self.store.counts[self.split].num_tokens)

    def share_in_training(self, text_hashes: list[str]) -> float | None:
        """Share of the documents whose exact text is in the store's training side; None without a store."""
        if self.store is None:
            return None
        known = set(self.store.labels("train")["text_hash"])
        return sum(text_hash in known for text_hash in text_hashes) / len(text_hashes)

    def share_near_training(self) -> float | None:
        """Share of the documents with a near-duplicate in the store's training side; None without a store."""
        if self.store is None:
            return None
        texts = [document.text for document in self.documents()]
        known = (document.text for document in self.store.read_documents("train"))
        return float(has_near_duplicate(texts, known).mean())


def held_out(config: EvaluateConfig | CompareConfig) -> HeldOut:
    """What the configuration says to score.

    Raises:
        UserError: Neither a store nor text is named, or the limit makes no sense.
    """
    store = TokenStore(config.store) if config.store else None
    if config.input:
        sources = tuple(resolve_inputs(config.input))
        log_hints(sources, ReadSettings.of(config))
        return HeldOut(config, store, None, sources)
    return HeldOut(config, store, config.split if isinstance(config, EvaluateConfig) else "validation")


def model_tokenizer(ref: str, store: TokenStore | None) -> TextTokenizer:
    """The model's own tokenizer; random: models without one take the store's."""
    if ref.startswith("random:") and not ref.startswith("random:tiny"):
        if store is None:
            raise UserError(f"{ref} has no tokenizer of its own; evaluate it on a store.")
        return store.tokenizer()
    tokenizer = load_tokenizer(ref)
    if store is not None and tokenizer.fingerprint() != store.fingerprint:
        log.warning("%s has another tokenizer than the store: the text is tokenized anew with the model's own.", ref)
    return tokenizer


class BaselineCollector:
    """Gathers, while the documents stream by, what unigram and compressors need; see `evaluation.baselines`.

    Args:
        store: Its training side is what unigram is fitted on and what compressors are primed with; may be None.
        tokenizer: The model's; unigram needs the store to have the same.
        num_rows: Rows of the model's head.
    """

    def __init__(self, store: TokenStore | None, tokenizer: TextTokenizer, num_rows: int) -> None:
        self._store, self._tokenizer = store, tokenizer
        fits = store is not None and tokenizer.fingerprint() == store.fingerprint
        self._counts = token_counts(store.tokens("train"), num_rows) if store is not None and fits else None
        self._unigram = Sums(0.0, 0, 0, 0, 0, 0)
        self._text: list[str] = []
        self._num_chars = 0
        self.was_cut = False

    def observe(self, documents: list[Document], scored: ScoredDocuments) -> None:
        """Take a shard of documents."""
        if self._counts is not None:
            kept = scored.round_trips
            nll = unigram_nll(self._counts, scored.ids)[kept]
            old = self._unigram
            self._unigram = Sums(
                old.nll + float(nll.sum()),
                old.num_tokens + int(scored.num_tokens[kept].sum()),
                old.num_bytes + int(scored.num_bytes[kept].sum()),
                0,
                0,
                old.num_documents + int(kept.sum()),
            )
        for document in documents:
            if self._num_chars >= MAX_COMPRESSED_BYTES:
                self.was_cut = True
                break
            self._text.append(document.text)
            self._num_chars += len(document.text)

    def finish(self) -> dict[str, dict[str, float | None]]:
        """The baselines by name: `unigram` where it can be fitted, `xz` and `zstd`, and both primed."""
        found: dict[str, dict[str, float | None]] = {}
        if self._counts is not None and self._unigram.num_tokens:
            found["unigram"] = {
                "perplexity": self._unigram.perplexity,
                "bits_per_byte": self._unigram.bits_per_byte,
            }
        text = "\n".join(self._text).encode("utf-8")
        if not text:
            return found
        prime = self._training_text()
        for name, measure in (("xz", xz_bits_per_byte), ("zstd", zstd_bits_per_byte)):
            found[name] = {"bits_per_byte": measure(text), "num_bytes": len(text)}
            if prime:
                found[f"{name}_primed"] = {"bits_per_byte": measure(text, prime), "num_bytes": len(text)}
        return found

    def _training_text(self) -> bytes:
        """The end of the store's training text, decoded from its tokens."""
        if self._store is None or self._store.counts["train"].num_tokens == 0:
            return b""
        documents = self._store.documents("train")
        sizes = np.cumsum(documents.num_bytes[::-1] + 1)[::-1]
        first = int(np.searchsorted(-sizes, -MAX_PRIME_BYTES))
        texts = [document.text for document in self._store.read_documents("train", first=first)]
        return "\n".join(texts).encode("utf-8")
