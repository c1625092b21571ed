"""A whole corpus under a model: documents streamed in shards, so that memory does not grow with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from cartilha.corpus.document import Document
from cartilha.errors import UserError
from cartilha.evaluation.documents import NOTHING_TO_SCORE, ScoredDocuments, encode_documents, join
from cartilha.evaluation.nll import DocumentScores, TokenRows, join_scores, score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.machine.processes import gather_objects, world
from cartilha.tokens.store import batches

SHARD_CHARS = 8_000_000  # enough windows of each length to fill rows; a few hundred MB with everything that hangs on it


def score_corpus(
    scorer: Scorer,
    documents: Iterable[Document],
    *,
    advance: Callable[[float], None] = lambda amount: None,
    take_rows: Callable[[TokenRows], None] | None = None,
    observe: Callable[[ScoredDocuments], None] = lambda scored: None,
) -> tuple[ScoredDocuments, DocumentScores]:
    """Score every document once. Under torchrun each rank takes every n-th document and all ranks get the whole.

    The documents are read once, in order, and come back without their token ids. `advance` is told the number of tokens
    scored; `take_rows` is given each token's scores, with the documents numbered over the whole corpus; `observe` is
    given each shard (for baselines). A UserError says that there is no text at all.
    """
    rank, num_ranks = world()
    corpus = hashlib.sha256()
    parts: list[tuple[np.ndarray, ScoredDocuments, DocumentScores]] = []
    num_seen = 0
    for shard in batches(documents, max_chars=SHARD_CHARS):
        corpus.update("".join(document.text_hash for document in shard).encode("ascii"))
        mine = range((rank - num_seen) % num_ranks, len(shard), num_ranks)
        own = [shard[i] for i in mine]
        scored = encode_documents(own, scorer.tokenizer, scorer.protocol.first_tokens, allow_empty=True)
        kept = num_seen + np.array(mine, np.int64)[scored.kept]
        num_seen += len(shard)
        take = None if take_rows is None else _renumbered(take_rows, kept)
        found = score_documents(scorer, scored, advance=advance, take_rows=take, measure_unused=True)
        observe(scored)
        parts.append((kept, replace(scored, ids=[]), found))
    gathered = [part for share in gather_objects(parts) for part in share]
    if not any(len(kept) for kept, _, _ in gathered):
        raise UserError(NOTHING_TO_SCORE)
    numbers, shards, scores = zip(*gathered, strict=True)
    order = np.argsort(np.concatenate(numbers), kind="stable")
    return join(shards, corpus.hexdigest()).taken(order), join_scores(scores, order)


def score_in_shares(
    scorer: Scorer, documents: ScoredDocuments, advance: Callable[[float], None] = lambda amount: None
) -> DocumentScores:
    """`score_documents`; under torchrun each rank takes every n-th document and all ranks get the whole."""
    rank, num_ranks = world()
    places = [np.arange(r, len(documents.ids), num_ranks) for r in range(num_ranks)]
    shares = gather_objects(score_documents(scorer, documents.taken(places[rank]), advance=advance))
    return join_scores(shares, np.argsort(np.concatenate(places)))


def _renumbered(take_rows: Callable[[TokenRows], None], numbers: np.ndarray) -> Callable[[TokenRows], None]:
    return lambda rows: take_rows(replace(rows, document=numbers[rows.document]))
