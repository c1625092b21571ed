"""Documents as spans of one array of tokens, with the two ids that packing puts around each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of a packed stream: a split of a store, or documents that were just tokenized.

    Attributes:
        tokens: All text tokens, shape (num_tokens,), memory-mapped or not.
        start: Index of each document's first token, shape (num_documents,).
        num_tokens: Shape (num_documents,).
        prefix_id: Put before each document; never a target.
        end_id: Put after each document; always a target.
    """

    tokens: np.ndarray
    start: np.ndarray
    num_tokens: np.ndarray
    prefix_id: int
    end_id: int

    @classmethod
    def from_ids(cls, documents: Sequence[np.ndarray], prefix_id: int, end_id: int) -> PackedDocuments:
        """The token ids of each document, joined in the order given."""
        lengths = np.array([len(ids) for ids in documents], np.int64)
        tokens = np.concatenate([np.zeros(0, np.uint32), *documents])
        return cls(tokens, np.cumsum(lengths) - lengths, lengths, prefix_id, end_id)

    def __len__(self) -> int:
        return len(self.start)
