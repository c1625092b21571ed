"""The text that an evaluation scores, and the training text that it is set against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np

from cartilha.config import CompareConfig, EvaluateConfig
from cartilha.corpus.document import Document
from cartilha.corpus.hints import log_hints
from cartilha.corpus.hub import opened
from cartilha.corpus.near_duplicates import has_near_duplicate
from cartilha.corpus.questions import Question, QuestionRuns
from cartilha.corpus.readers import first_documents, read_documents
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.sources import HubSource, Source, resolve_inputs
from cartilha.evaluation.baselines import UnigramCollector
from cartilha.evaluation.compressed import MAX_PRIME_BYTES, CompressedText
from cartilha.evaluation.questions import questions_in
from cartilha.evaluation.scorer import Scorer
from cartilha.preparation.made_from import describe_source
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import TextTokenizer

# Compressors read at about 1 MB/s, twice each: with more text, the baseline would take longer than the model.
MAX_COMPRESSED_BYTES = 4 << 20


@dataclass(frozen=True)
class HeldOut:
    """What is scored: a side of the store, or (if `split` is None) the sources that `--input` names.

    The store's training side is the reference for baselines and contamination in both cases.
    """

    config: EvaluateConfig | CompareConfig
    store: TokenStore | None
    split: Literal["validation", "train"] | None
    sources: tuple[Source, ...] = ()

    def documents(self) -> Iterator[Document]:
        """The documents, in order, streamed."""
        if self.split is None:
            documents = read_documents(self.sources, ReadSettings.of(self.config))
        else:
            assert self.store is not None
            documents = self.store.read_documents(self.split)
        return islice(documents, self.config.limit_documents)

    def datasets(self) -> list[dict[str, Any]]:
        """The datasets of the hub among the sources, each with the commit that was read."""
        return [describe_source(source, {}) for source in self.sources if isinstance(source, HubSource)]

    @cached_property
    def beginning(self) -> tuple[list[Document], bool]:
        """The first documents, of about `MAX_COMPRESSED_BYTES` in all, and whether there are more."""
        documents = self.documents()
        return list(first_documents(documents, MAX_COMPRESSED_BYTES)), next(documents, None) is not None

    def first_characters(self, num_chars: int) -> list[Document]:
        """The first documents, the last one cut, of `num_chars` characters in all (at most those of `beginning`)."""
        *whole, last = first_documents(self.beginning[0], num_chars)
        left = num_chars - sum(len(document.text) for document in whole)
        return [*whole, replace(last, text=last.text[:left])]

    def compressed(self) -> CompressedText:
        """What compressors make of the beginning, alone and after the end of the store's training text."""
        text = "\n".join(document.text for document in self.beginning[0]).encode("utf-8")
        store = self.store
        if store is None or (first := _first_of_the_end(store)) is None:
            return CompressedText(text, None, bytes)
        key = f"{store.fingerprint} {store.counts['train'].corpus_hash}"
        return CompressedText(text, key, lambda: "\n".join(store.texts("train", first)).encode("utf-8"))

    def num_tokens(self, tokenizer: TextTokenizer) -> float | None:
        """Tokens to score if that is known beforehand, for the progress bar."""
        whole = self.config.limit_documents is None and self.config.protocol == "full"
        if self.store is None or self.split is None or not whole or tokenizer.fingerprint != self.store.fingerprint:
            return None
        return float(self.store.counts[self.split].num_tokens)

    def unigram(self, scorer: Scorer) -> UnigramCollector | None:
        """A collector for the unigram baseline, if the model's tokenizer is that of the store."""
        if self.store is None or scorer.tokenizer.fingerprint != self.store.fingerprint:
            return None
        return UnigramCollector(self.store.tokens("train"), scorer.vocabulary_size)

    def share_in_training(self, text_hashes: list[str]) -> float | None:
        """Share of the documents whose exact text is in the store's training side; None without a store."""
        if self.store is None:
            return None
        known = set(self.store.labels("train", ("text_hash",))["text_hash"])
        return sum(text_hash in known for text_hash in text_hashes) / len(text_hashes)

    def share_near_training(self) -> float | None:
        """Share of the documents with a near-duplicate in the store's training side; None without a store."""
        if self.store is None:
            return None
        texts = [document.text for document in self.documents()]
        known = (document.text for document in self.store.read_documents("train"))
        return float(has_near_duplicate(texts, known).mean())

    def questions_in_training(self, questions: Iterable[Question]) -> dict[str, Any] | None:
        """How many of each benchmark's questions the store's training side holds; None without a store.

        The search ends after a minute; `num_searched` says how many documents it has seen.
        """
        if self.store is None:
            return None
        return questions_in(self.store, QuestionRuns.of(questions))


def held_out(config: EvaluateConfig | CompareConfig) -> HeldOut:
    """What the configuration says to score; a UserError says that there is no such store or text."""
    store = TokenStore(config.store) if config.store else None
    if config.input:
        sources = tuple(opened(resolve_inputs(config.input)))
        log_hints(sources, ReadSettings.of(config))
        return HeldOut(config, store, None, sources)
    return HeldOut(config, store, config.split if isinstance(config, EvaluateConfig) else "validation")


def _first_of_the_end(store: TokenStore) -> int | None:
    """The number of the first of the last training documents, `MAX_PRIME_BYTES` together; None without documents."""
    sizes = np.cumsum(store.documents("train").num_bytes[::-1] + 1)[::-1]
    first = int(np.searchsorted(-sizes, -MAX_PRIME_BYTES))
    return first if first < len(sizes) else None
