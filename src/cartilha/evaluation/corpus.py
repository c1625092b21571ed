"""A whole corpus under a model: documents streamed in shards, so that memory does not grow with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from cartilha.corpus.document import Document
from cartilha.errors import UserError
from cartilha.evaluation.documents import ScoredDocuments, encode_documents, join
from cartilha.evaluation.nll import DocumentScores, TokenRows, score_documents
from cartilha.evaluation.windows import Protocol
from cartilha.machine.processes import gather_objects, world
from cartilha.tokens.store import batches
from cartilha.tokens.tokenizer import TextTokenizer

SHARD_CHARS = 8_000_000  # enough windows of each length to fill rows; a few hundred MB with everything that hangs on it

Observer = Callable[[ScoredDocuments], None]


@dataclass(frozen=True)
class ScoredCorpus:
    """Documents and what a model says of them, in the order of the corpus; the token ids are let go."""

    documents: ScoredDocuments
    scores: DocumentScores


def score_corpus(
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
    documents: Iterable[Document],
    protocol: Protocol,
    dtype: torch.dtype,
    *,
    unused_ids: torch.Tensor | None = None,
    advance: Callable[[float], None] = lambda amount: None,
    take_rows: Callable[[TokenRows], None] | None = None,
    observe: Observer = lambda scored: None,
) -> ScoredCorpus:
    """Score every document once. Under torchrun each rank takes every n-th document and all ranks get the whole.

    Args:
        model: With attention within documents.
        tokenizer: Its own.
        documents: Read once, in order.
        protocol: How to score.
        dtype: Compute dtype.
        unused_ids: Rows of the head that no token uses.
        advance: Told the number of tokens scored.
        take_rows: Given each token's scores, with the documents numbered over the whole corpus.
        observe: Given each shard of documents as they are scored (for baselines).

    Raises:
        UserError: There is no text at all, or a token's nll is not finite.
    """
    rank, num_ranks = world()
    corpus = hashlib.sha256()
    parts: list[tuple[np.ndarray, ScoredDocuments, DocumentScores]] = []
    num_seen = 0
    for shard in batches(_hashed(documents, corpus), max_chars=SHARD_CHARS):
        numbers = np.arange(num_seen, num_seen + len(shard))
        num_seen += len(shard)
        mine = [document for number, document in zip(numbers, shard, strict=True) if number % num_ranks == rank]
        scored = encode_documents(mine, tokenizer, protocol.first_tokens, allow_empty=True)
        kept = numbers[numbers % num_ranks == rank][scored.kept]
        take = None if take_rows is None else _renumbered(take_rows, kept)
        found = score_documents(model, scored, protocol, dtype, unused_ids=unused_ids, advance=advance, take_rows=take)
        observe(scored)
        parts.append((kept, scored.without_ids(), found))
    gathered = [part for share in gather_objects(parts) for part in share]
    if not any(len(kept) for kept, _, _ in gathered):
        raise UserError(
            "There are no documents to score; give --input with text, or a store with validation documents."
        )
    joined = join([scored for _, scored, _ in gathered], corpus.hexdigest())
    order = np.argsort(np.concatenate([kept for kept, _, _ in gathered]), kind="stable")
    nll = np.concatenate([found.nll for _, _, found in gathered])[order]
    scores = DocumentScores(
        nll,
        sum(found.unused_mass for _, _, found in gathered),
        np.sum([found.position_nll for _, _, found in gathered], axis=0),
        np.sum([found.position_tokens for _, _, found in gathered], axis=0),
    )
    return ScoredCorpus(joined.taken(order), scores)


def score_in_shares(
    model: PreTrainedModel,
    documents: ScoredDocuments,
    protocol: Protocol,
    dtype: torch.dtype,
    *,
    advance: Callable[[float], None] = lambda amount: None,
) -> DocumentScores:
    """`score_documents`; under torchrun each rank takes every n-th document and all ranks get the whole."""
    rank, num_ranks = world()
    if num_ranks == 1:
        return score_documents(model, documents, protocol, dtype, advance=advance)
    places = [np.arange(r, len(documents.ids), num_ranks) for r in range(num_ranks)]
    mine = replace(documents.taken(places[rank]), ids=[documents.ids[i] for i in places[rank]])
    shares = gather_objects(score_documents(model, mine, protocol, dtype, advance=advance))
    nll = np.zeros(len(documents.ids))
    for place, share in zip(places, shares, strict=True):
        nll[place] = share.nll
    return DocumentScores(
        nll,
        sum(share.unused_mass for share in shares),
        np.sum([share.position_nll for share in shares], axis=0),
        np.sum([share.position_tokens for share in shares], axis=0),
    )


def _hashed(documents: Iterable[Document], corpus: hashlib._Hash) -> Iterator[Document]:
    for document in documents:
        corpus.update(document.text_hash.encode("ascii"))
        yield document


def _renumbered(take_rows: Callable[[TokenRows], None], numbers: np.ndarray) -> Callable[[TokenRows], None]:
    return lambda rows: take_rows(replace(rows, document=numbers[rows.document]))
