"""A whole corpus under a model: documents streamed in shards, so that memory does not grow with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cartilha.corpus.document import Document
from cartilha.errors import UserError
from cartilha.evaluation.documents import NOTHING_TO_SCORE, ScoredDocuments, encode_documents, join
from cartilha.evaluation.nll import DocumentScores, TokenRows, join_scores, score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.machine.processes import gather_objects, world
from cartilha.tokens.store import batches

SHARD_CHARS = 8_000_000  # enough windows of each length to fill rows; a few hundred MB with everything that hangs on it


@dataclass(frozen=True)
class ScoredCorpus:
    """Documents and what a model says of them, in the order of the corpus; the token ids are let go."""

    documents: ScoredDocuments
    scores: DocumentScores


def score_corpus(
    scorer: Scorer,
    documents: Iterable[Document],
    *,
    advance: Callable[[float], None] = lambda amount: None,
    take_rows: Callable[[TokenRows], None] | None = None,
    observe: Callable[[ScoredDocuments], None] = lambda scored: None,
) -> ScoredCorpus:
    """Score every document once. Under torchrun each rank takes every n-th document and all ranks get the whole.

    Args:
        scorer: Its model computes attention within documents.
        documents: Read once, in order.
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
        scored = encode_documents(mine, scorer.tokenizer, scorer.protocol.first_tokens, allow_empty=True)
        kept = numbers[numbers % num_ranks == rank][scored.kept]
        take = None if take_rows is None else _renumbered(take_rows, kept)
        found = score_documents(scorer, scored, advance=advance, take_rows=take, measure_unused=True)
        observe(scored)
        parts.append((kept, replace(scored, ids=[]), found))
    gathered = [part for share in gather_objects(parts) for part in share]
    if not any(len(kept) for kept, _, _ in gathered):
        raise UserError(NOTHING_TO_SCORE)
    order = np.argsort(np.concatenate([kept for kept, _, _ in gathered]), kind="stable")
    joined = join([scored for _, scored, _ in gathered], corpus.hexdigest())
    return ScoredCorpus(joined.taken(order), join_scores([found for _, _, found in gathered], order))


def score_in_shares(
    scorer: Scorer, documents: ScoredDocuments, advance: Callable[[float], None] = lambda amount: None
) -> DocumentScores:
    """`score_documents`; under torchrun each rank takes every n-th document and all ranks get the whole."""
    rank, num_ranks = world()
    places = [np.arange(r, len(documents.ids), num_ranks) for r in range(num_ranks)]
    shares = gather_objects(score_documents(scorer, documents.taken(places[rank]), advance=advance))
    return join_scores(shares, np.argsort(np.concatenate(places)))


def _hashed(documents: Iterable[Document], corpus: hashlib._Hash) -> Iterator[Document]:
    for document in documents:
        corpus.update(document.text_hash.encode("ascii"))
        yield document


def _renumbered(take_rows: Callable[[TokenRows], None], numbers: np.ndarray) -> Callable[[TokenRows], None]:
    return lambda rows: take_rows(replace(rows, document=numbers[rows.document]))
