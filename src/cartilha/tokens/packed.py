"""Documents as spans of one array of tokens, with the two ids that packing puts around each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def joined(ids: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts in a row, uint32, and the number of ids of each, int64."""
    return np.concatenate([np.zeros(0, np.uint32), *ids]), np.fromiter(map(len, ids), np.int64, len(ids))


class JoinedTokens:
    """Arrays of tokens, such as the memory-mapped ones of several stores, read as if they were one.

    A slice must lie within one of them, as every document does.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = tuple(arrays)
        self.starts = np.cumsum([0, *map(len, arrays)])[:-1]  # of each array

    def __getitem__(self, span: slice) -> np.ndarray:
        number = int(np.searchsorted(self.starts, span.start, side="right")) - 1
        start = int(self.starts[number])
        return self._arrays[number][span.start - start : span.stop - start]


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of a packed stream: a split of a store, or documents that were just tokenized.

    `start` is the index of each document's first token in `tokens`, which may be memory-mapped. The prefix before a
    document is never a target, and the end after it always is.
    """

    tokens: np.ndarray | JoinedTokens
    start: np.ndarray
    num_tokens: np.ndarray
    prefix_id: int
    end_id: int

    @classmethod
    def from_ids(cls, documents: Sequence[np.ndarray], prefix_id: int, end_id: int) -> PackedDocuments:
        """The token ids of each document, joined in the order given."""
        tokens, lengths = joined(documents)
        return cls(tokens, np.cumsum(lengths) - lengths, lengths, prefix_id, end_id)

    @classmethod
    def joined(cls, parts: Sequence[PackedDocuments]) -> PackedDocuments:
        """The documents of all parts, one part after another; the parts have the same prefix and end ids."""
        tokens = JoinedTokens([np.asarray(part.tokens) for part in parts])
        starts = [part.start + start for part, start in zip(parts, tokens.starts, strict=True)]
        lengths = np.concatenate([part.num_tokens for part in parts])
        return cls(tokens, np.concatenate(starts), lengths, parts[0].prefix_id, parts[0].end_id)

    def ids(self, number: int, most: int | None = None) -> np.ndarray:
        """The tokens of a document, or so many of its first."""
        start, length = int(self.start[number]), int(self.num_tokens[number])
        return self.tokens[start : start + (length if most is None else min(most, length))]

    def __len__(self) -> int:
        return len(self.start)
