"""A store in numbers: how long its documents are, what they are about, and what truncating them would throw away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartilha.corpus.splits import SPLITS
from cartilha.tokens.store import TokenStore

TRUNCATED_AT = (256, 512, 1024)
COLUMNS = ("num_tokens", "num_bytes", "num_words")


@dataclass(frozen=True)
class Summary:
    """Numbers of both sides together, unless it says otherwise.

    Attributes:
        lengths: Documents and tokens by length: `from_tokens` to `to_tokens` (included), a doubling each.
        domains: Sums by domain, the largest first.
        kept_by_truncation: For each length the share of the tokens that would be left if each document were cut there.
        tokens_per_word: All tokens over all words; likewise bytes over tokens.
        clusters: Clusters of more than one document, the documents in them, and the size of the largest.
    """

    lengths: list[dict[str, int]]
    domains: list[dict[str, Any]]
    kept_by_truncation: dict[str, float]
    tokens_per_word: float
    bytes_per_token: float
    clusters: dict[str, int]


def summarize(store: TokenStore) -> Summary:
    """Read the tables of documents, a group of rows at a time, and add them up."""
    lengths: dict[int, list[int]] = {}
    domains: dict[str, dict[str, int]] = {}
    kept = dict.fromkeys(TRUNCATED_AT, 0)
    sizes: list[np.ndarray] = []
    for split in SPLITS:
        file = pq.ParquetFile(store.path / f"{split}.documents.parquet")
        for batch in file.iter_batches(50_000, columns=["domain", "cluster", *COLUMNS]):
            numbers = {name: batch[name].to_numpy() for name in COLUMNS}
            _add_lengths(lengths, numbers["num_tokens"])
            _add_domains(domains, batch["domain"].to_pylist(), numbers, split)
            for length in kept:
                kept[length] += int(np.minimum(numbers["num_tokens"], length).sum())
            sizes.append(batch["cluster"].to_numpy())
    counts = store.counts.values()
    tokens, words, num_bytes = (
        sum(getattr(c, name) for c in counts) for name in ("num_tokens", "num_words", "num_bytes")
    )
    if "mixture" in store.info:  # a document that was repeated is no near-duplicate of itself
        sizes = [_distinct_clusters(store)]
    cluster_sizes = np.unique(np.concatenate([np.zeros(0, np.int64), *sizes]), return_counts=True)[1]
    many = cluster_sizes[cluster_sizes > 1]
    return Summary(
        lengths=[
            {"from_tokens": 1 << k >> 1, "to_tokens": (1 << k) - 1, "documents": found[0], "tokens": found[1]}
            for k, found in sorted(lengths.items())
        ],
        domains=[{"domain": name, **sums} for name, sums in sorted(domains.items(), key=lambda d: -d[1]["num_tokens"])],
        kept_by_truncation={str(length): sum_ / max(1, tokens) for length, sum_ in kept.items()},
        tokens_per_word=tokens / max(1, words),
        bytes_per_token=num_bytes / max(1, tokens),
        clusters={"clusters": len(many), "documents": int(many.sum()), "largest": int(many.max(initial=0))},
    )


def _distinct_clusters(store: TokenStore) -> np.ndarray:
    """The cluster of each document, taken once however often it is repeated: int64."""
    columns = ["cluster", "text_hash"]
    tables = [pq.read_table(store.path / f"{split}.documents.parquet", columns=columns) for split in SPLITS]
    return np.asarray(pa.concat_tables(tables).group_by(columns).aggregate([])["cluster"])


def _add_lengths(lengths: dict[int, list[int]], num_tokens: np.ndarray) -> None:
    """Length n goes to the number of its binary digits: 0, 1, 2 to 3, 4 to 7, ..."""
    digits = np.frexp(num_tokens.astype(np.float64))[1]
    for k in np.unique(digits).tolist():
        found = lengths.setdefault(k, [0, 0])
        found[0] += int((digits == k).sum())
        found[1] += int(num_tokens[digits == k].sum())


def _add_domains(
    domains: dict[str, dict[str, int]], names: list[str], numbers: Mapping[str, np.ndarray], split: str
) -> None:
    columns = [numbers[column].tolist() for column in COLUMNS]
    for name, *values in zip(names, *columns, strict=True):
        zero = {"num_documents": 0, "num_validation_documents": 0, **dict.fromkeys(COLUMNS, 0)}
        sums = domains.setdefault(name, zero)
        sums["num_documents"] += 1
        sums["num_validation_documents"] += split == "validation"
        for column, value in zip(COLUMNS, values, strict=True):
            sums[column] += value
