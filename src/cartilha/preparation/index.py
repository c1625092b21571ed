"""All documents of finished shards: what is known of each is in files, and looked at piece by piece.

A hundred gigabytes of text have some thirty million documents. Arrays over all of them are files of the work directory
where they are large: the system keeps their pages in memory as long as there is room, and drops them when there is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from cartilha.corpus.pieces import each, large_array, pieces
from cartilha.corpus.sources import Source
from cartilha.preparation.shard_work import DOCUMENTS_SCHEMA, ShardTask
from cartilha.tokens.store_checks import map_ids

SORTED_DOCUMENTS = 1 << 20  # compared with one another at a time
COPY_TOKENS = 4 << 20  # tokens copied at a time
MASKED_TOKENS = 100  # documents shorter than this are picked by a mask


@dataclass(frozen=True)
class DocumentIndex:
    """The numbers of all documents of all finished shards, in the order of the input; arrays may be mapped files.

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

    def shards(self) -> Iterator[tuple[ShardTask, int, int]]:
        """Each shard, with the number of its first document and one past that of its last."""
        return ((task, begin, end) for task, (begin, end) in zip(self.tasks, pairwise(self.starts), strict=True))

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
    starts = np.cumsum([0, *(len(read_documents(task)) for task in tasks)])
    dtypes = {"hashes": np.uint64, "positions": np.float64, "num_tokens": np.int64, "sources": np.int32}
    shape = (int(starts[-1]),)
    arrays = {name: large_array((*shape, 2) if name == "hashes" else shape, dtype) for name, dtype in dtypes.items()}
    for task, (begin, end) in zip(tasks, pairwise(starts.tolist()), strict=True):
        table = read_documents(task)
        of_pieces = np.array([source_numbers[part.source] for part in task.shard.parts], np.int32)
        first = begin
        for chunk in table["text_hash"].chunks:
            found = np.frombuffer(chunk.buffers()[1], ">u8", 2 * len(chunk), 16 * chunk.offset)
            arrays["hashes"][first : first + len(chunk)] = found.reshape(-1, 2)
            first += len(chunk)
        position, num_tokens, piece = (table[name].to_numpy() for name in ("position", "num_tokens", "piece"))
        arrays["positions"][begin:end], arrays["num_tokens"][begin:end] = position, num_tokens
        arrays["sources"][begin:end] = of_pieces[piece]
    return DocumentIndex(tasks, starts, **arrays)


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Whether each document is the first with its hash: bool, shape (num_documents,)."""
    again = large_array((len(hashes),), bool)
    num_parts = 1 + len(hashes) // SORTED_DOCUMENTS
    for part in range(num_parts):  # equal hashes are in the same part
        rows = []
        for piece in pieces(len(hashes)):
            of_part = ((hashes[piece, 0] >> np.uint64(32)) * np.uint64(num_parts)) >> np.uint64(32) == part
            rows.append(piece.start + np.flatnonzero(of_part))
        numbers = np.concatenate([np.zeros(0, np.int64), *rows])
        own = hashes[numbers]
        order = np.lexsort((own[:, 1], own[:, 0]))  # stable
        ordered = own[order]
        again[numbers[order[1:][(ordered[1:] == ordered[:-1]).all(axis=1)]]] = True
    return each(np.logical_not, again)


def chosen_ids(task: ShardTask, num_tokens: np.ndarray, own: np.ndarray) -> Iterator[np.ndarray]:
    """The ids of some documents of a shard, a few million at a time."""
    ids = shard_ids(task)
    for documents, place in spans(num_tokens, COPY_TOKENS):
        part, chosen, lengths = ids[place], own[documents], num_tokens[documents]
        if chosen.all():
            yield from np.array_split(part, max(1, len(part) // COPY_TOKENS))
        elif len(part) > MASKED_TOKENS * len(chosen):  # long documents are copied, run by run
            edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
            bounds = np.concatenate(([0], np.cumsum(lengths)))[edges].tolist()
            yield np.concatenate([part[:0], *(part[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True))])
        else:
            yield part[np.repeat(chosen, lengths)]


def spans(num_tokens: np.ndarray, most: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive documents with so many tokens at most, or a single one, and the place of their ids among all."""
    ends, first = np.cumsum(num_tokens), 0
    while first < len(num_tokens):
        begin = int(ends[first] - num_tokens[first])
        last = max(first + 1, int(np.searchsorted(ends, begin + most, side="right")))
        yield slice(first, last), slice(begin, int(ends[last - 1]))
        first = last


def first_ids(index: DocumentIndex, numbers: Iterable[int], num_tokens: int) -> Iterator[np.ndarray]:
    """The first ids of each of some documents; a file is opened once for documents of one shard in a row."""
    opened, ids = -1, np.zeros(0, np.uint32)
    for number in numbers:
        shard = index.shard_of(number)
        if shard != opened:
            opened, ids = shard, shard_ids(index.tasks[shard])
        begin = int(index.num_tokens[index.starts[shard] : number].sum())
        # A copy: the pages that a mapping has touched stay in memory as long as a view of it.
        yield np.array(ids[begin : begin + min(num_tokens, int(index.num_tokens[number]))])


def shard_ids(task: ShardTask) -> np.ndarray:
    """The ids of all documents of a shard, memory-mapped."""
    return map_ids(task.directory / "tokens.bin", np.dtype(task.settings.dtype))


def read_documents(task: ShardTask) -> pa.Table:
    """The columns of all documents of a shard (`DOCUMENTS_SCHEMA`), memory-mapped."""
    with pa.memory_map(str(task.directory / "documents.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.schema == DOCUMENTS_SCHEMA
    return table
