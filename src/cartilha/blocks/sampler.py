"""The blocks of each training step: a pure function of seed and step, so that a resumed run needs no data state."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from cartilha.blocks.packing import Block, PackedStream
from cartilha.tokens.packed import PackedDocuments


def epoch_order(num_documents: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the documents in an epoch (from 0): a permutation that depends on seed and epoch alone."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)))
    return generator.permutation(num_documents)


class StepPosition(NamedTuple):
    """A step's epoch (from 0), its first block in that epoch, and its number of blocks."""

    epoch: int
    first_block: int
    num_blocks: int


class BlockSampler:
    """The blocks of each step. No step crosses the end of an epoch, so an epoch's last step may have fewer blocks."""

    def __init__(self, documents: PackedDocuments, *, block_size: int, blocks_per_step: int, seed: int) -> None:
        self._documents = documents
        self.block_size = block_size
        self.blocks_per_step = blocks_per_step
        self.tokens_per_step = blocks_per_step * block_size
        self.seed = seed
        self._stream: tuple[int, PackedStream] | None = None
        first = self.stream(0)
        self.blocks_per_epoch = len(first)
        self.steps_per_epoch = -(-self.blocks_per_epoch // blocks_per_step)
        self.padding_share = first.padding_share

    @cached_property
    def targets_per_epoch(self) -> int:
        """Scored targets of an epoch."""
        return self.stream(0).num_targets

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of the documents in the order of an epoch's stream."""
        return epoch_order(len(self._documents), self.seed, epoch)

    def stream(self, epoch: int) -> PackedStream:
        """The packed stream of an epoch; the one used last is kept."""
        kept = self._stream  # read once: another thread may be preparing the next epoch
        if kept is None or kept[0] != epoch:
            self._stream = kept = (epoch, PackedStream(self._documents, self.block_size, self.order(epoch)))
        return kept[1]

    def position(self, step: int) -> StepPosition:
        """The position of a step (from 0)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.blocks_per_step
        return StepPosition(epoch, first, min(self.blocks_per_step, self.blocks_per_epoch - first))

    def _stream_of(self, step: int) -> PackedStream:
        return self.stream(self.position(step).epoch)

    def num_targets(self, step: int) -> int:
        """Scored targets of a step, summed over all ranks."""
        _, first, num_blocks = self.position(step)
        return self._stream_of(step).targets_in(first, num_blocks)

    def blocks(self, step: int, rank: int = 0, num_ranks: int = 1) -> list[Block]:
        """One rank's share of the step's blocks; the shares in the order of the ranks are the whole step."""
        _, first, num_blocks = self.position(step)
        stream = self._stream_of(step)
        begin, past = (first + r * num_blocks // num_ranks for r in (rank, rank + 1))
        return [stream.block(index) for index in range(begin, past)]
