"""A store in numbers: how long its documents are, what they are about, and what truncation would discard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartilha.corpus.splits import SPLITS
from cartilha.tokens.store import TokenStore

TRUNCATED_AT = (256, 512, 1024)
COLUMNS = ("num_tokens", "num_bytes", "num_words")
SUMS = ("num_documents", "num_validation_documents", *COLUMNS)


@dataclass(frozen=True)
class Summary:
    """Numbers of both sides together.

    Attributes:
        lengths: Documents and tokens by length, from `from_tokens` to `to_tokens` (included), a doubling per row.
        domains: Sums by domain, the largest first.
        kept_by_truncation: For each length the share of the tokens that is left if each document is cut there.
        clusters: Clusters of more than one document, the documents in them, and the size of the largest.
    """

    lengths: list[dict[str, int]]
    domains: list[dict[str, Any]]
    kept_by_truncation: dict[str, float]
    tokens_per_word: float
    bytes_per_token: float
    clusters: dict[str, int]


def summarize(store: TokenStore) -> Summary:
    """Add up the tables of documents."""
    is_mixture = "mixture" in store.info
    documents = _documents(store, ["domain", "cluster", *COLUMNS, *(["text_hash"] if is_mixture else [])])
    num_tokens, num_bytes, num_words = (documents[name].to_numpy() for name in COLUMNS)
    tokens = int(num_tokens.sum())
    digits = np.frexp(num_tokens.astype(np.float64))[1]  # binary digits of the length: 0, 1, 2 to 3, 4 to 7, ...
    documents_by_length, tokens_by_length = np.bincount(digits), np.bincount(digits, num_tokens)
    found = np.flatnonzero(documents_by_length)
    lengths = {
        "from_tokens": 1 << found >> 1,
        "to_tokens": (1 << found) - 1,
        "documents": documents_by_length[found],
        "tokens": tokens_by_length[found].astype(np.int64),
    }
    by_domain = documents.group_by("domain", use_threads=False).aggregate([(name, "sum") for name in SUMS])
    by_domain = by_domain.select(["domain", *(f"{name}_sum" for name in SUMS)]).rename_columns(["domain", *SUMS])
    if is_mixture:  # a repeated document is not a near-duplicate of itself
        documents = documents.group_by(["cluster", "text_hash"]).aggregate([])
    cluster_sizes = np.unique(documents["cluster"].to_numpy(), return_counts=True)[1]
    many = cluster_sizes[cluster_sizes > 1]
    return Summary(
        lengths=pa.table(lengths).to_pylist(),
        domains=sorted(by_domain.to_pylist(), key=lambda sums: -sums["num_tokens"]),
        kept_by_truncation={
            str(length): int(np.minimum(num_tokens, length).sum()) / max(1, tokens) for length in TRUNCATED_AT
        },
        tokens_per_word=tokens / max(1, int(num_words.sum())),
        bytes_per_token=int(num_bytes.sum()) / max(1, tokens),
        clusters={"clusters": len(many), "documents": int(many.sum()), "largest": int(many.max(initial=0))},
    )


def _documents(store: TokenStore, columns: list[str]) -> pa.Table:
    """The documents of both sides, with a column of ones and a column that is one for those held out."""
    sides = []
    for split in SPLITS:
        table = pq.read_table(store.path / f"{split}.documents.parquet", columns=columns)
        ones = np.ones(len(table), np.int64)
        held_out = ones if split == "validation" else 0 * ones
        sides.append(table.append_column(SUMS[0], pa.array(ones)).append_column(SUMS[1], pa.array(held_out)))
    return pa.concat_tables(sides)
