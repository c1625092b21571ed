"""All documents of finished shards: their numbers in memory, their ids and columns on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cartilha.corpus.sources import Source
from cartilha.preparation.shard_work import DOCUMENTS_SCHEMA, ShardTask
from cartilha.tokens.store_checks import map_ids

COPY_TOKENS = 4 << 20  # tokens copied at a time
MASKED_TOKENS = 100  # documents shorter than this are picked by a mask


@dataclass(frozen=True)
class DocumentIndex:
    """The numbers of all documents of all finished shards, in the order of the input.

    Attributes:
        starts: Index of each shard's first document, and the number of documents at the end, int64.
        hashes: The first 16 bytes of the SHA-256 of each text as two numbers, uint64, shape (num_documents, 2).
        positions: `split_position` of each document, float64.
        sources: Number of the source of each document, int32.
    """

    tasks: Sequence[ShardTask]
    starts: np.ndarray
    hashes: np.ndarray
    positions: np.ndarray
    num_tokens: np.ndarray
    sources: np.ndarray

    def shard_of(self, number: int) -> int:
        """The number of the shard that a document is in."""
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def label(self, number: int, name: str) -> str:
        """A document's `doc_id`, `source` or `domain`."""
        shard = self.shard_of(number)
        return str(read_documents(self.tasks[shard])[name][number - int(self.starts[shard])].as_py())

    def hex_hashes(self, which: np.ndarray) -> np.ndarray:
        """The hashes of some documents in hexadecimal, as arrays of 32 bytes."""
        digits = self.hashes[which].astype(">u8").tobytes().hex().encode("ascii")
        return np.frombuffer(digits, "S32")


def load_index(tasks: Sequence[ShardTask], sources: Sequence[Source]) -> DocumentIndex:
    """Read the numbers of all documents of finished shards, given in order."""
    source_numbers = {source: number for number, source in enumerate(sources)}
    no_hash = np.zeros((0, 2), np.uint64)
    columns = [(no_hash, np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int32))]  # of each shard
    for task in tasks:
        table = read_documents(task)
        of_pieces = np.array([source_numbers[part.source] for part in task.shard.parts], np.int32)
        hashes = [no_hash]
        for chunk in table["text_hash"].chunks:
            found = np.frombuffer(chunk.buffers()[1], ">u8", 2 * len(chunk), 16 * chunk.offset)
            hashes.append(found.reshape(-1, 2).astype(np.uint64))
        position, num_tokens, piece = (table[name].to_numpy() for name in ("position", "num_tokens", "piece"))
        columns.append((np.concatenate(hashes), position, num_tokens, of_pieces[piece]))
    starts = np.cumsum([len(positions) for _, positions, *_ in columns])
    return DocumentIndex(tasks, starts, *map(np.concatenate, zip(*columns, strict=True)))


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Whether each document is the first with its hash: bool, shape (num_documents,)."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable
    ordered = hashes[order]
    result = np.ones(len(hashes), bool)
    result[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return result


def chosen_ids(task: ShardTask, num_tokens: np.ndarray, own: np.ndarray) -> Iterator[np.ndarray]:
    """The ids of some documents of a shard, a few million at a time."""
    ids = shard_ids(task)
    ends = np.cumsum(num_tokens)
    first = 0
    while first < len(num_tokens):
        begin = int(ends[first] - num_tokens[first])
        last = max(first + 1, int(np.searchsorted(ends, begin + COPY_TOKENS, side="right")))
        part = ids[begin : ends[last - 1]]
        chosen = own[first:last]
        if chosen.all():
            yield from np.array_split(part, max(1, len(part) // COPY_TOKENS))
        elif len(part) > MASKED_TOKENS * len(chosen):  # long documents are copied, run by run
            edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
            bounds = np.concatenate(([0], ends[first:last] - begin))[edges].tolist()
            yield np.concatenate([part[:0], *(part[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True))])
        else:
            yield part[np.repeat(chosen, num_tokens[first:last])]
        first = last


def first_ids(index: DocumentIndex, number: int, num_tokens: int) -> np.ndarray:
    """The first ids of a document."""
    shard = index.shard_of(number)
    begin = int(index.num_tokens[index.starts[shard] : number].sum())
    # A copy: the pages that a mapping has touched stay in memory as long as a view of it.
    return np.array(shard_ids(index.tasks[shard])[begin : begin + min(num_tokens, int(index.num_tokens[number]))])


def shard_ids(task: ShardTask) -> np.ndarray:
    """The ids of all documents of a shard, memory-mapped."""
    return map_ids(task.directory / "tokens.bin", np.dtype(task.settings.dtype))


def read_documents(task: ShardTask) -> pa.Table:
    """The columns of all documents of a shard (`DOCUMENTS_SCHEMA`), memory-mapped."""
    with pa.memory_map(str(task.directory / "documents.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.schema == DOCUMENTS_SCHEMA
    return table
