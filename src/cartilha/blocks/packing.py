"""Packing: `[prefix] tokens [end]` of every document in one stream, cut into blocks without truncation.

Targets are the stream shifted by one, here and nowhere else: every text token and every end token is a target once per
epoch, a prefix never. A document that does not fit into a block continues in the next, with positions from 0 again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cartilha.tokens.packed import PackedDocuments

IGNORE_INDEX = -100  # the target that is not scored, as in PyTorch and transformers


@dataclass(frozen=True)
class Block:
    """One row of a batch; its arrays are int64, of shape (block_size,) but for the last, of shape (num_segments,)."""

    input_ids: np.ndarray  # padding is filled with the end token
    targets: np.ndarray  # the token to predict at each position, or `IGNORE_INDEX`
    position_ids: np.ndarray  # from 0 in each segment
    segment_lengths: np.ndarray  # of parts of documents, then padding; attention must not look from one into another


@dataclass(frozen=True)
class PackedSegment:
    """The part of one document, or the padding, that lies in a block from position `begin` up to `end`."""

    document: int | None  # its index in the order of the stream; None for padding
    begin: int
    end: int
    begins: bool = False  # whether it begins with the document's prefix
    ends: bool = False  # whether the next block holds no more inputs of the document
    has_end_token: bool = False  # whether its last input is the end token; the stream's last one is only a target


class Batch(Block):
    """Blocks stacked: arrays of shape (num_blocks, block_size); `segment_lengths` row by row."""

    @classmethod
    def unscored(cls, input_ids: np.ndarray) -> Batch:
        """One row of a single segment, without targets."""
        length = len(input_ids)
        targets = np.full((1, length), IGNORE_INDEX, np.int64)
        return cls(input_ids[None], targets, np.arange(length)[None], np.array([length], np.int64))

    @property
    def num_targets(self) -> int:
        """How many targets are scored."""
        return int((self.targets != IGNORE_INDEX).sum())


def empty_block(block_size: int) -> Block:
    """A block without targets, for a process that has nothing to compute while others compute a block."""
    positions = np.arange(block_size)
    return Block(np.zeros_like(positions), np.full_like(positions, IGNORE_INDEX), positions, np.array([block_size]))


def stack(blocks: Sequence[Block]) -> Batch:
    """Blocks as the rows of a batch."""
    names = ("input_ids", "targets", "position_ids")
    input_ids, targets, position_ids = (np.stack([getattr(block, name) for block in blocks]) for name in names)
    return Batch(input_ids, targets, position_ids, np.concatenate([block.segment_lengths for block in blocks]))


class PackedStream:
    """The stream of documents in some order, and its blocks; a block's tokens are copied only when it is asked for.

    `order` holds indices into the documents; None takes all as they come.
    """

    def __init__(self, documents: PackedDocuments, block_size: int, order: np.ndarray | None = None) -> None:
        assert block_size >= 1
        self.documents = documents
        self.start = documents.start if order is None else documents.start[order]
        self.num_tokens = documents.num_tokens if order is None else documents.num_tokens[order]
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
        first_end, past_end = np.searchsorted(self.offsets[1:] - 1, (begin, end))
        return end - begin - int(past_end - first_end)

    @property
    def padding_share(self) -> float:
        """Share of the blocks' positions that hold padding."""
        positions = len(self) * self.block_size
        return (positions - self.num_inputs) / positions if positions else 0.0

    def block(self, index: int) -> Block:
        """The block with this index, 0 <= index < len(self)."""
        input_ids = np.full(self.block_size, self.documents.end_id, np.int64)
        targets = np.full(self.block_size, IGNORE_INDEX, np.int64)
        position_ids = np.empty(self.block_size, np.int64)
        segments = self.segments(index)
        for segment in segments:
            length = segment.end - segment.begin
            position_ids[segment.begin : segment.end] = np.arange(length)
            if segment.document is None:
                continue
            first = index * self.block_size + segment.begin - int(self.offsets[segment.document])
            # One id more than there are inputs, unless the document ends: targets are the inputs shifted by one.
            ids = self._ids(segment.document, first, first + length + (not segment.has_end_token))
            input_ids[segment.begin : segment.end] = ids[:length]
            targets[segment.begin : segment.begin + len(ids) - 1] = ids[1:]
        lengths = np.array([segment.end - segment.begin for segment in segments], np.int64)
        return Block(input_ids, targets, position_ids, lengths)

    def segments(self, index: int) -> list[PackedSegment]:
        """The segments of a block, in order: parts of documents, then the padding."""
        begin, found = index * self.block_size, []
        end = min(begin + self.block_size, self.num_inputs)
        document, position = int(np.searchsorted(self.offsets, begin, side="right")) - 1, begin
        while position < end:
            first, past = int(self.offsets[document]), int(self.offsets[document + 1])
            stop = min(past, end)
            ends = stop >= min(past, self.num_inputs)
            found.append(PackedSegment(document, position - begin, stop - begin, position == first, ends, stop == past))
            document, position = document + 1, stop
        if end - begin < self.block_size:
            found.append(PackedSegment(None, end - begin, self.block_size))
        return found

    def _ids(self, document: int, first: int, past: int) -> np.ndarray:
        """Positions first to past - 1 of a document's `[prefix] tokens [end]`: int64."""
        length, start = int(self.num_tokens[document]), int(self.start[document])
        text = self.documents.tokens[start + max(0, first - 1) : start + min(length, past - 1)].astype(np.int64)
        head = [self.documents.prefix_id] if first == 0 else []
        tail = [self.documents.end_id] if past == length + 2 else []
        return np.concatenate([np.array(head, np.int64), text, np.array(tail, np.int64)])
