"""Blocks prepared in a thread, one step ahead, so that the device never waits for them.

Cutting blocks out of the memory-mapped store is work for numpy and the disk; neither needs the device. The copy to the
device itself goes through pinned buffers (`model/forward.py`).
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from cartilha.blocks.packing import Block
from cartilha.blocks.sampler import BlockSampler


@dataclass(frozen=True)
class StepBlocks:
    """What one step trains on."""

    blocks: list[Block]  # this rank's share
    num_targets: int  # of the whole step, all ranks together


class StepLoader:
    """Gives each step's blocks; while a step runs, a thread prepares the next one's."""

    def __init__(self, sampler: BlockSampler, rank: int = 0, num_ranks: int = 1) -> None:
        self._sampler = sampler
        self._share = rank, num_ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cartilha-loader")
        self._next: tuple[int, Future[StepBlocks]] | None = None

    def take(self, step: int) -> StepBlocks:
        """The blocks of `step` (counted from 0); those of the next step are begun."""
        begun = self._next
        result = (begun[1] if begun is not None and begun[0] == step else self._begin(step)).result()
        self._next = step + 1, self._begin(step + 1)
        return result

    def _begin(self, step: int) -> Future[StepBlocks]:
        return self._thread.submit(
            lambda: StepBlocks(self._sampler.blocks(step, *self._share), self._sampler.num_targets(step))
        )

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
