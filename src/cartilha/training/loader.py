"""Blocks prepared in a thread, a step ahead, so that the device never waits for them.

Cutting blocks out of the memory-mapped store is numpy's work and the disk's; neither needs the device. The copy to the
device itself goes through pinned buffers (`model/forward.py`).
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from cartilha.blocks.packing import Block
from cartilha.blocks.sampler import BlockSampler


@dataclass(frozen=True)
class StepBlocks:
    """What one step trains on.

    Attributes:
        blocks: This rank's share.
        num_targets: Of the whole step, all ranks together.
    """

    blocks: list[Block]
    num_targets: int


class StepLoader:
    """Gives each step's blocks; while a step runs, the next one's are prepared.

    Args:
        sampler: Says which blocks a step has.
        rank: Which share of them is wanted.
        num_ranks: How many processes share them.
    """

    def __init__(self, sampler: BlockSampler, rank: int = 0, num_ranks: int = 1) -> None:
        self._sampler = sampler
        self._share = rank, num_ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cartilha-loader")
        self._next: tuple[int, Future[StepBlocks]] | None = None

    def take(self, step: int) -> StepBlocks:
        """The blocks of `step` (counted from 0); those of the step after it are begun."""
        expected = self._next
        found = expected[1] if expected is not None and expected[0] == step else self._begin(step)
        result = found.result()
        self._next = step + 1, self._begin(step + 1)
        return result

    def _begin(self, step: int) -> Future[StepBlocks]:
        return self._thread.submit(self._prepare, step)

    def _prepare(self, step: int) -> StepBlocks:
        return StepBlocks(self._sampler.blocks(step, *self._share), self._sampler.num_targets(step))

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
