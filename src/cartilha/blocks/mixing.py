"""A mixture: one stream of documents from several sources, in which each has its share wherever the stream is cut.

The order follows from shares and seed alone. It imitates a fluid in which every source flows at its rate all the time:
of the documents that have begun to flow, the one that is the first to have flowed whole comes next (WF2Q, Bennett and
Zhang 1996). No source is ever ahead of its share by more than a document of its own, nor behind by more than one
document. A source that is used up begins again, in another order.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import count
from threading import Lock

import numpy as np

from cartilha.blocks.packing import PackedStream
from cartilha.blocks.sampler import BlockSampler, StepPosition, epoch_order
from cartilha.tokens.packed import PackedDocuments

NEVER = sys.maxsize
CHUNK = 65_536  # documents whose lengths are taken from an array at a time


@dataclass(frozen=True)
class Rate:
    """The share of the stream that is one source's: `first` before the position `turn`, `last` from there on."""

    first: Fraction
    last: Fraction
    turn: int = NEVER

    def due(self, position: int) -> Fraction:
        """How much of the source belongs into the stream up to a position."""
        return self.first * min(position, self.turn) + self.last * max(0, position - self.turn)

    def reached(self, amount: int) -> float:
        """The position of the stream at which `amount` of the source is due, infinite where it never is."""
        (a, b), (c, d) = self.first.as_integer_ratio(), self.last.as_integer_ratio()
        if a and amount * b <= a * self.turn:
            return amount * b / a
        return self.turn + (amount * b - a * self.turn) * d / (b * c) if c else math.inf


@dataclass(frozen=True)
class MixedDocuments:
    """Documents of several sources, and the rate of each source.

    Attributes:
        documents: All of them.
        members: The indices of each source's documents; no source is without.
        rates: Of each source, in tokens, among which a document's prefix and end count; they add up to 1.
        num_counted: Reading the first so many sources once, as far as they have a share at first, makes an epoch.
    """

    documents: PackedDocuments
    members: tuple[np.ndarray, ...]
    rates: tuple[Rate, ...]
    num_counted: int = 1

    @property
    def sizes(self) -> list[int]:
        """The tokens of each source in the stream: those of its documents, with prefixes and ends."""
        return [int(self.documents.num_tokens[members].sum()) + 2 * len(members) for members in self.members]

    @property
    def epoch_size(self) -> int:
        """Length of the stream in which the sources that are counted are read once, by the shares of the beginning."""
        sizes = [size for size, rate in zip(self.sizes, self.rates[: self.num_counted], strict=False) if rate.first]
        return math.ceil(sum(sizes) / sum((rate.first for rate in self.rates[: self.num_counted]), Fraction(0)))

    def order(self, seed: int) -> Iterator[tuple[int, int, int]]:
        """The stream without end: each document's index, its source's number and its length in the stream."""
        documents = [self._documents(source, seed) for source in range(len(self.members))]
        heads = [next(one) for one in documents]
        taken = [0] * len(heads)
        position = 0
        begins = [rate.reached(0) if rate.first else float(rate.turn) for rate in self.rates]
        ends = [rate.reached(length) for rate, (_, length) in zip(self.rates, heads, strict=True)]
        while True:
            # One has always begun: together, the sources have had as much as is due to them.
            source = min((s for s, begin in enumerate(begins) if begin <= position), key=ends.__getitem__)
            document, length = heads[source]
            yield document, source, length
            position += length
            taken[source] += length
            heads[source] = next(documents[source])
            begins[source] = ends[source]
            ends[source] = self.rates[source].reached(taken[source] + heads[source][1])

    def _documents(self, source: int, seed: int) -> Iterator[tuple[int, int]]:
        """A source's documents with their lengths in the stream, in a new order each time that it begins again."""
        members, num_tokens = self.members[source], self.documents.num_tokens
        for number in count():
            order = members[epoch_order(len(members), seed, (source << 32) + number)]
            for begin in range(0, len(order), CHUNK):
                chunk = order[begin : begin + CHUNK]
                yield from zip(chunk.tolist(), (num_tokens[chunk] + 2).tolist(), strict=True)


class MixtureSampler(BlockSampler):
    """The blocks of each step of a mixture, cut from one stream without padding, which goes on through all epochs."""

    def __init__(self, mixed: MixedDocuments, *, block_size: int, blocks_per_step: int, seed: int) -> None:
        self._documents = mixed.documents
        self.block_size = block_size
        self.blocks_per_step = blocks_per_step
        self.tokens_per_step = blocks_per_step * block_size
        self.seed = seed
        self.steps_per_epoch = -(-mixed.epoch_size // self.tokens_per_step)
        self.blocks_per_epoch = self.steps_per_epoch * blocks_per_step
        self.padding_share = 0.0
        self._num_sources = len(mixed.members)
        self._order = mixed.order(seed)
        self._placed, self._sources = array("q"), array("q")  # of what is in the stream so far
        self._so_far = PackedStream(mixed.documents, block_size, np.zeros(0, np.int64))
        self._lock = Lock()  # another thread may be preparing the next step

    def position(self, step: int) -> StepPosition:
        """The position of a step (from 0); its first block is counted from the beginning of the stream."""
        return StepPosition(step // self.steps_per_epoch, step * self.blocks_per_step, self.blocks_per_step)

    def stream(self, epoch: int) -> PackedStream:
        """The stream from its beginning to the end of an epoch, or beyond it."""
        return self._stream_of((epoch + 1) * self.steps_per_epoch - 1)

    @cached_property
    def targets_per_epoch(self) -> int:
        """Scored targets of the first epoch; the others have other documents."""
        return self.stream(0).targets_in(0, self.blocks_per_epoch)

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of the documents in the order of the stream, to the end of an epoch or beyond it, int64."""
        self.stream(epoch)
        return np.array(self._placed, np.int64)

    def _stream_of(self, step: int) -> PackedStream:
        needed = (step + 1) * self.tokens_per_step
        with self._lock:
            length = int(self._so_far.offsets[-1])
            if length <= needed:  # the last end token is no input
                while length <= needed + needed // 4:  # some more, so that not every step makes the stream anew
                    document, source, size = next(self._order)
                    self._placed.append(document)
                    self._sources.append(source)
                    length += size
                self._so_far = PackedStream(self._documents, self.block_size, np.array(self._placed, np.int64))
            return self._so_far

    def read_until(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents begun and tokens read of each source in the first `step` steps: int64, shapes (num_sources,)."""
        past = step * self.tokens_per_step
        offsets = self._stream_of(step).offsets
        num_begun = int(np.searchsorted(offsets, past))
        lengths = np.minimum(offsets[1 : num_begun + 1], past) - offsets[:num_begun]
        sources = np.array(self._sources[:num_begun], np.int64)
        documents = np.bincount(sources, minlength=self._num_sources)
        return documents, np.bincount(sources, lengths, self._num_sources).astype(np.int64)
