"""The held-out documents as a model sees them: ids, and the counts that its nll is divided by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cartilha.corpus.document import Document
from cartilha.corpus.splits import split_position
from cartilha.errors import UserError
from cartilha.tokens.byte_level import token_bytes
from cartilha.tokens.tokenizer import TextTokenizer

SUBSET_SEED = 20_01  # decides the hash order in which validation subsets are chosen; never changed
MAX_DOMAINS = 200  # figures are given for the largest ones, since a column may have a value for each document
MAX_DOMAIN_CHARS = 100
NOTHING_TO_SCORE = "There are no documents to score; give --input with text, or a store with validation documents."


@dataclass(frozen=True)
class ScoredDocuments:
    """Documents ready to be scored under a protocol; arrays and lists have one entry per document.

    Attributes:
        ids: Token ids, cut to the protocol's first tokens; empty once the documents have been scored.
        num_tokens: Tokens to score, int64.
        num_bytes: UTF-8 bytes of the scored tokens, int64.
        num_chars: Characters that the scored tokens hold or begin, int64; `num_words` counts words in the same way.
        round_trips: Whether decode(encode(text)) = text; the others are left out of byte, character and word figures.
        num_empty: Documents without any token, skipped.
        corpus_hash: Over the text hashes in order: the same corpus under any tokenizer.
        kept: Indices of these documents among those that were given (the others were empty).
    """

    ids: list[np.ndarray]
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    num_chars: np.ndarray
    num_words: np.ndarray
    round_trips: np.ndarray
    doc_ids: list[str]
    domains: list[str]
    text_hashes: list[str]
    num_empty: int = 0
    corpus_hash: str = ""
    kept: np.ndarray | None = None

    @classmethod
    def of_ids(cls, ids: Sequence[np.ndarray]) -> ScoredDocuments:
        """Documents of which nothing but the ids is known: good for their nll, and for no other figure."""
        nothing = np.zeros(len(ids), np.int64)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        names = [f"number {number + 1}" for number in range(len(ids))]
        none = [""] * len(ids)
        return cls(list(ids), lengths, nothing, nothing, nothing, nothing > 0, names, none, none)

    def with_ids(self, ids: list[np.ndarray]) -> ScoredDocuments:
        """The same documents with fewer of their tokens."""
        return replace(self, ids=ids, num_tokens=np.array([len(own) for own in ids], np.int64))

    def taken(self, order: np.ndarray) -> ScoredDocuments:
        """Some of the documents, or all in another order."""
        arrays: dict[str, Any] = {name: getattr(self, name)[order] for name in ARRAYS}
        lists: dict[str, Any] = {name: [getattr(self, name)[i] for i in order] for name in LISTS}
        return replace(self, ids=[self.ids[i] for i in order] if self.ids else [], **arrays, **lists, kept=None)


ARRAYS = ("num_tokens", "num_bytes", "num_chars", "num_words", "round_trips")
LISTS = ("doc_ids", "domains", "text_hashes")


def join(parts: Sequence[ScoredDocuments], corpus_hash: str) -> ScoredDocuments:
    """Documents scored part by part as one corpus, without their ids."""
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    lists: dict[str, Any] = {name: [one for part in parts for one in getattr(part, name)] for name in LISTS}
    num_empty = sum(part.num_empty for part in parts)
    return ScoredDocuments(ids=[], **arrays, **lists, num_empty=num_empty, corpus_hash=corpus_hash)


def encode_documents(
    documents: Sequence[Document],
    tokenizer: TextTokenizer,
    first_tokens: int | None = None,
    *,
    allow_empty: bool = False,
) -> ScoredDocuments:
    """Tokenize documents for scoring.

    `first_tokens` is how many tokens of each are kept. Bytes are then those of the kept tokens, and a character or
    word of which they hold a part counts whole. `allow_empty` (for a shard of a corpus) gives back no documents where
    there is nothing to score, instead of a UserError.
    """
    hashes = [document.text_hash for document in documents]
    encoded = tokenizer.encode([document.text for document in documents])
    decoded = tokenizer.decode_batch(encoded)
    # A text of which the tokenizer keeps nothing is not empty but lost, and is counted as such.
    kept = [i for i, ids in enumerate(encoded) if len(ids) or documents[i].text]
    if not any(len(ids) for ids in encoded) and not allow_empty:
        raise UserError(NOTHING_TO_SCORE)
    ids: list[np.ndarray] = []
    texts: list[str] = []
    num_bytes: list[int] = []
    for i in kept:
        cut = first_tokens is not None and len(encoded[i]) > first_tokens
        ids.append(encoded[i][:first_tokens] if cut else encoded[i])
        whole = documents[i].text.encode("utf-8")
        num_bytes.append(min(len(whole), _num_bytes(tokenizer, ids[-1])) if cut else len(whole))
        texts.append(_begun_text(decoded[i].encode("utf-8"), num_bytes[-1]) if cut else documents[i].text)
    return ScoredDocuments(
        ids=ids,
        num_tokens=np.array([len(own) for own in ids], np.int64),
        num_bytes=np.array(num_bytes, np.int64),
        num_chars=np.array([len(text) for text in texts], np.int64),
        num_words=np.array([len(text.split()) for text in texts], np.int64),
        round_trips=np.array([decoded[i] == documents[i].text for i in kept], bool),
        doc_ids=[documents[i].id for i in kept],
        domains=[documents[i].domain for i in kept],
        text_hashes=[hashes[i] for i in kept],
        num_empty=len(documents) - len(kept),
        corpus_hash=hashlib.sha256("".join(hashes).encode("ascii")).hexdigest(),
        kept=np.array(kept, np.int64),
    )


def _num_bytes(tokenizer: TextTokenizer, ids: np.ndarray) -> int:
    """UTF-8 bytes that the first tokens of a text stand for, those of an incomplete character at the end included.

    A part of a character is decoded as U+FFFD, which the text itself may hold, too: tokens that end so are counted by
    their spelling.
    """
    past, num_bytes = len(ids), 0
    while (text := tokenizer.decode(ids[:past])).endswith("\ufffd"):
        past -= 1
        spelling = str(tokenizer.backend.id_to_token(int(ids[past])))
        num_bytes += len(token_bytes(spelling) or spelling.encode("utf-8"))
    return len(text.encode("utf-8")) + num_bytes


def _begun_text(text: bytes, num_bytes: int) -> str:
    """The first bytes of a text, with the rest of the character that they end in."""
    while num_bytes < len(text) and text[num_bytes] & 0xC0 == 0x80:
        num_bytes += 1
    return text[:num_bytes].decode("utf-8")


def by_domain(domains: Sequence[str], num_bytes: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the documents of each domain, the domain with the most bytes first; long names are cut."""
    numbers: dict[str, list[int]] = {}
    for number, domain in enumerate(domains):
        numbers.setdefault(domain[:MAX_DOMAIN_CHARS], []).append(number)
    largest_first = sorted(sorted(numbers), key=lambda domain: -int(num_bytes[numbers[domain]].sum()))
    return {domain: np.array(numbers[domain], np.int64) for domain in largest_first}


def validation_subset(documents: Sequence[Document], num_tokens: Sequence[int], max_tokens: int) -> list[Document]:
    """A fixed part of the documents with about `max_tokens` tokens, chosen by hash; all of them where they are fewer.

    The choice depends on the texts alone, so that every run over the same store validates on the same documents.
    """
    if sum(num_tokens) <= max_tokens:
        return list(documents)
    order = sorted(range(len(documents)), key=lambda i: split_position(documents[i].text_hash, SUBSET_SEED))
    chosen: list[int] = []
    total = 0
    for i in order:
        if chosen and total + num_tokens[i] > max_tokens:
            break
        chosen.append(i)
        total += num_tokens[i]
    return [documents[i] for i in sorted(chosen)]
