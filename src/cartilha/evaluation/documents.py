"""The held-out documents as a model sees them: ids, and the counts that its nll is divided by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cartilha.corpus.document import Document
from cartilha.corpus.splits import split_position
from cartilha.errors import UserError
from cartilha.tokens.byte_level import token_bytes
from cartilha.tokens.tokenizer import TextTokenizer

SUBSET_SEED = 20_01  # of the hash order in which validation subsets are chosen; never changed
MAX_DOMAINS = 200  # figures are given for the largest; a column with a value for each document is no domain
MAX_DOMAIN_CHARS = 100
NOTHING_TO_SCORE = "There are no documents to score; give --input with text, or a store with validation documents."


@dataclass(frozen=True)
class ScoredDocuments:
    """Documents ready to be scored under a protocol; arrays have one entry a document.

    Attributes:
        ids: Token ids of each, cut to the protocol's first tokens.
        num_bytes: UTF-8 bytes of the scored tokens, int64.
        num_chars: Characters that the scored tokens hold or begin, int64; likewise num_words.
        round_trips: Whether decode(encode(text)) = text; the others are left out of byte, character and word figures.
        doc_ids: Names for messages and tables.
        domains: Of each document.
        text_hashes: Of the whole texts.
        num_empty: Documents without any token, skipped.
        corpus_hash: Over the text hashes in order: the same corpus under any tokenizer.
        token_counts: Set by `without_ids`, when the ids themselves have been let go.
        kept: Indices of these documents among those that were given (the others were empty).
    """

    ids: list[np.ndarray]
    num_bytes: np.ndarray
    num_chars: np.ndarray
    num_words: np.ndarray
    round_trips: np.ndarray
    doc_ids: list[str]
    domains: list[str]
    text_hashes: list[str]
    num_empty: int
    corpus_hash: str
    token_counts: np.ndarray | None = None
    kept: np.ndarray | None = None

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens to score of each document, int64."""
        if self.token_counts is not None:
            return self.token_counts
        return np.array([len(ids) for ids in self.ids], np.int64)

    def without_ids(self) -> ScoredDocuments:
        """The same with the counts alone: what is kept of documents that have been scored."""
        return replace(self, ids=[], token_counts=self.num_tokens)

    def taken(self, order: np.ndarray) -> ScoredDocuments:
        """The documents in another order (without their ids)."""
        return replace(
            self,
            ids=[],
            num_bytes=self.num_bytes[order],
            num_chars=self.num_chars[order],
            num_words=self.num_words[order],
            round_trips=self.round_trips[order],
            doc_ids=[self.doc_ids[i] for i in order],
            domains=[self.domains[i] for i in order],
            text_hashes=[self.text_hashes[i] for i in order],
            token_counts=self.num_tokens[order],
            kept=None,
        )


def join(parts: Sequence[ScoredDocuments], corpus_hash: str) -> ScoredDocuments:
    """Documents scored part by part as one corpus, without their ids."""
    return ScoredDocuments(
        ids=[],
        num_bytes=np.concatenate([part.num_bytes for part in parts]),
        num_chars=np.concatenate([part.num_chars for part in parts]),
        num_words=np.concatenate([part.num_words for part in parts]),
        round_trips=np.concatenate([part.round_trips for part in parts]),
        doc_ids=[name for part in parts for name in part.doc_ids],
        domains=[domain for part in parts for domain in part.domains],
        text_hashes=[text_hash for part in parts for text_hash in part.text_hashes],
        num_empty=sum(part.num_empty for part in parts),
        corpus_hash=corpus_hash,
        token_counts=np.concatenate([part.num_tokens for part in parts]),
    )


def encode_documents(
    documents: Sequence[Document],
    tokenizer: TextTokenizer,
    first_tokens: int | None = None,
    *,
    allow_empty: bool = False,
) -> ScoredDocuments:
    """Tokenize documents for scoring.

    Args:
        documents: At least one with a token, unless `allow_empty`.
        tokenizer: The model's.
        first_tokens: Keep only so many tokens of each. Bytes are then those of the kept tokens; a character or word of
            which they hold a part counts whole.
        allow_empty: Give back no documents where there is nothing to score (a shard of a corpus).

    Raises:
        UserError: There is nothing to score.
    """
    hashes = [document.text_hash for document in documents]
    encoded = tokenizer.encode([document.text for document in documents])
    decoded = tokenizer.decode_batch(encoded)
    # A text of which the tokenizer keeps nothing is not empty: it is lost, and counted among those.
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

    A part of a character is decoded as U+FFFD, which a text may hold of its own: tokens that end so are counted by
    their spelling.
    """
    past, num_bytes = len(ids), 0
    while (text := tokenizer.decode(ids[:past])).endswith("\ufffd"):
        past -= 1
        spelling = str(tokenizer.backend.id_to_token(int(ids[past])))
        num_bytes += len(token_bytes(spelling) or spelling.encode("utf-8"))
    return len(text.encode("utf-8")) + num_bytes


def _begun_text(text: bytes, num_bytes: int) -> str:
    """The first bytes of a text, and the rest of the character that they end in."""
    while num_bytes < len(text) and text[num_bytes] & 0xC0 == 0x80:
        num_bytes += 1
    return text[:num_bytes].decode("utf-8")


def by_domain(domains: Sequence[str]) -> dict[str, list[int]]:
    """The numbers of each domain's documents, by the domain's name; of a long name its beginning counts."""
    numbers: dict[str, list[int]] = {}
    for number, domain in enumerate(domains):
        numbers.setdefault(domain[:MAX_DOMAIN_CHARS], []).append(number)
    return dict(sorted(numbers.items()))


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
