"""Packing: `[prefix] tokens [end]` of every document in one stream, cut into blocks; nothing truncated, nothing padded.

Targets are the stream shifted by one, which happens here and nowhere else. Every text token and every end token is a
target exactly once an epoch; a prefix never is. A document that a block's end cuts goes on in the next block, its
positions counted from 0 again. Only the last block is padded. The attention must not look across documents:
`segment_lengths` says where they begin and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cartilha.tokens.packed import PackedDocuments

IGNORE_INDEX = -100  # the target that is not scored, as in PyTorch and transformers


@dataclass(frozen=True)
class Block:
    """One row of a batch.

    Attributes:
        input_ids: Shape (block_size,), int64; positions past the last document hold the end token.
        targets: Shape (block_size,), int64; the token to predict at each position, `IGNORE_INDEX` where none is.
        position_ids: Shape (block_size,), int64; from 0 at the start of each segment.
        segment_lengths: Lengths of the pieces of documents (padding last), shape (num_segments,); sum block_size.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray
    segment_lengths: np.ndarray


@dataclass(frozen=True)
class Piece:
    """The inputs of one document, or the padding, in a block.

    Attributes:
        document: Its place in the order of the stream; None for padding.
        begin: Its first position in the block; `end` is one past the last.
        begins: Whether it begins with the document's prefix.
        ends: Whether none of the document's inputs follow in the next block.
        has_end_token: Whether it ends with the end token. That of the stream's last document is a target only.
    """

    document: int | None
    begin: int
    end: int
    begins: bool = False
    ends: bool = False
    has_end_token: bool = False


@dataclass(frozen=True)
class Batch:
    """Blocks stacked: `input_ids`, `targets`, `position_ids` of shape (num_blocks, block_size).

    Attributes:
        input_ids: Token ids, int64.
        targets: Shifted token ids, int64, `IGNORE_INDEX` where nothing is scored.
        position_ids: Positions within each segment, int64.
        segment_lengths: Lengths of all segments in row-major order, shape (num_segments,).
    """

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray
    segment_lengths: np.ndarray

    @property
    def num_targets(self) -> int:
        """How many targets are scored."""
        return int((self.targets != IGNORE_INDEX).sum())


def stack(blocks: Sequence[Block]) -> Batch:
    """Blocks as the rows of a batch."""
    return Batch(
        np.stack([block.input_ids for block in blocks]),
        np.stack([block.targets for block in blocks]),
        np.stack([block.position_ids for block in blocks]),
        np.concatenate([block.segment_lengths for block in blocks]),
    )


class PackedStream:
    """The stream of an order of documents, and its blocks; nothing is copied until a block is asked for.

    Args:
        documents: The documents' tokens, and what is put around each.
        block_size: Inputs per block.
        order: Which documents, in which order: indices into `documents`; None takes all, as they come.
    """

    def __init__(self, documents: PackedDocuments, block_size: int, order: np.ndarray | None = None) -> None:
        assert block_size >= 1
        order = np.arange(len(documents)) if order is None else order
        self.documents = documents
        self.start = documents.start[order]
        self.num_tokens = documents.num_tokens[order]
        self.block_size = block_size
        # Document i occupies stream positions offsets[i] (its prefix) to offsets[i + 1] - 1 (its end token).
        self.offsets = np.concatenate([[0], np.cumsum(self.num_tokens + 2)])

    @property
    def num_inputs(self) -> int:
        """Stream positions that are inputs: all but the very last end token, which has nothing to predict."""
        return max(0, int(self.offsets[-1]) - 1)

    @property
    def num_targets(self) -> int:
        """Scored targets of the whole stream: every text token and every end token."""
        return int(self.num_tokens.sum()) + len(self.num_tokens)

    def __len__(self) -> int:
        return -(-self.num_inputs // self.block_size)

    def targets_in(self, first_block: int, num_blocks: int) -> int:
        """Scored targets of these blocks, counted without making them: every input but end tokens has one."""
        begin, end = first_block * self.block_size, min((first_block + num_blocks) * self.block_size, self.num_inputs)
        ends = self.offsets[1:] - 1
        return (end - begin) - int(np.searchsorted(ends, end) - np.searchsorted(ends, begin))

    @property
    def padding_share(self) -> float:
        """Share of the blocks' positions that hold padding."""
        positions = len(self) * self.block_size
        return (positions - self.num_inputs) / positions if positions else 0.0

    def block(self, index: int) -> Block:
        """The block with this index, 0 <= index < len(self)."""
        begin = index * self.block_size
        end = min(begin + self.block_size, self.num_inputs)
        input_ids = np.full(self.block_size, self.documents.end_id, np.int64)
        targets = np.full(self.block_size, IGNORE_INDEX, np.int64)
        position_ids = np.zeros(self.block_size, np.int64)
        segments: list[int] = []
        document = int(np.searchsorted(self.offsets, begin, side="right")) - 1
        position = begin
        while position < end:
            first, past = int(self.offsets[document]), int(self.offsets[document + 1])
            stop = min(past, end)
            # One token more than the inputs, where the document has it: the targets are the inputs shifted by one.
            piece = self._piece(document, position - first, min(past, stop + 1) - first)
            length = stop - position
            row = slice(position - begin, stop - begin)
            input_ids[row] = piece[:length]
            targets[row.start : row.start + len(piece) - 1] = piece[1:]
            position_ids[row] = np.arange(length)
            segments.append(length)
            position = stop
            document += 1
        padding = self.block_size - (end - begin)
        if padding:
            position_ids[-padding:] = np.arange(padding)
            segments.append(padding)
        return Block(input_ids, targets, position_ids, np.array(segments, np.int64))

    def pieces(self, index: int) -> list[Piece]:
        """What the segments of a block are, in order: pieces of documents, and the padding."""
        begin, found = index * self.block_size, []
        past = np.cumsum(self.block(index).segment_lengths).tolist()
        for first, end in zip([0, *past], past, strict=False):
            if begin + first >= self.num_inputs:
                found.append(Piece(None, first, end))
                continue
            document = int(np.searchsorted(self.offsets, begin + first, side="right")) - 1
            last = int(self.offsets[document + 1])
            ends, begins = begin + end >= min(last, self.num_inputs), begin + first == int(self.offsets[document])
            found.append(Piece(document, first, end, begins, ends, begin + end == last))
        return found

    def _piece(self, document: int, first: int, past: int) -> np.ndarray:
        """Positions first to past - 1 of `[prefix] tokens [end]` of a document, int64."""
        length = int(self.num_tokens[document])
        start = int(self.start[document])
        text = self.documents.tokens[start + max(0, first - 1) : start + min(length, past - 1)].astype(np.int64)
        head = [self.documents.prefix_id] if first == 0 else []
        tail = [self.documents.end_id] if past == length + 2 else []
        return np.concatenate([np.array(head, np.int64), text, np.array(tail, np.int64)])
