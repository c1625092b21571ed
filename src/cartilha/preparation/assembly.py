"""Shards to a store: which documents stay and on which side, and one pass that writes them in the order of the input.

Nothing depends on how the input was cut or on which executor did the work: the same documents give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cartilha.corpus.near_duplicates import cluster
from cartilha.corpus.sources import Source
from cartilha.corpus.splits import SPLITS, Split, SplitResult, split_documents
from cartilha.errors import UserError
from cartilha.preparation.mixture import Mixture, copies
from cartilha.preparation.request import PrepareRequest
from cartilha.preparation.shard_work import DOCUMENTS_SCHEMA, TEXTS_SCHEMA, ShardTask
from cartilha.storage import new_file
from cartilha.tokens.store_checks import map_ids
from cartilha.tokens.store_writer import ROW_SCHEMA, SplitWriter, StoreWriter

COPY_TOKENS = 4 << 20  # tokens copied at a time
MASKED_TOKENS = 100  # documents shorter than this are picked by a mask
CLUSTER_MEMORY_BYTES = 512 << 20


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

    def hex_hashes(self, which: np.ndarray) -> np.ndarray:
        """The hashes of some documents in hexadecimal, as arrays of 32 bytes."""
        digits = self.hashes[which].astype(">u8").tobytes().hex().encode("ascii")
        return np.frombuffer(digits, "S32")


@dataclass(frozen=True)
class Sides:
    """What becomes of each document.

    Attributes:
        validation: Whether it is held out, bool, shape (num_documents,).
        train: How many times it is on the training side, int64; a document that is left out is on neither side.
        clusters: The number, among the documents kept, of the first one in its cluster of near-duplicates, int64.
        dropped: Documents left out, by reason.
        mixture: The figures of each input, if there are weights.
    """

    validation: np.ndarray
    train: np.ndarray
    clusters: np.ndarray
    dropped: dict[str, int]
    split: SplitResult
    mixture: tuple[dict[str, Any], ...]


def load_index(tasks: Sequence[ShardTask], sources: Sequence[Source]) -> DocumentIndex:
    """Read the numbers of all documents of finished shards, given in order."""
    source_numbers = {source: number for number, source in enumerate(sources)}
    no_hash = np.zeros((0, 2), np.uint64)
    columns = [(no_hash, np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int32))]  # of each shard
    for task in tasks:
        table = _documents(task)
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


def decide(index: DocumentIndex, asked: PrepareRequest, *, near_duplicates: bool) -> Sides:
    """Which documents stay and on which side, with clusters of near-duplicates kept together if that is asked for.

    A UserError says that there is nothing to split.
    """
    num_documents = len(index.hashes)
    stays = first_of_each(index.hashes)
    dropped = {"exact_duplicates": int((~stays).sum())}
    all_clusters = None
    if near_duplicates:
        files = [task.directory / "signatures.npy" for task in index.tasks]
        all_clusters = cluster(files, memory_bytes=CLUSTER_MEMORY_BYTES, scratch=index.tasks[0].work)
    times, mixed = np.ones(num_documents, np.int64), tuple[dict[str, Any], ...]()
    if asked.mixture is not None:
        times, mixed = _mix(index, stays, asked.mixture)
        dropped["weights"] = int((stays & (times == 0)).sum())
        stays &= times > 0
    kept = np.flatnonzero(stays)
    if len(kept) == 1:
        raise UserError("A single document cannot be split into training and validation; add more.")
    own_clusters = None if all_clusters is None else all_clusters[kept]
    given = index.sources[kept] < asked.num_held_out if asked.num_held_out else None
    result = split_documents(index.hex_hashes(kept), asked.rule, own_clusters, given, index.positions[kept])
    if result.left_out.any():
        dropped["near_duplicates_of_validation"] = int(result.left_out.sum())
    validation, train = np.zeros(num_documents, bool), np.zeros(num_documents, bool)
    validation[kept] = result.validation
    train[kept] = ~result.validation & ~result.left_out
    numbers = np.arange(len(kept))
    groups = numbers if own_clusters is None else own_clusters
    firsts, clusters = np.full(num_documents, num_documents), np.arange(num_documents)
    np.minimum.at(firsts, groups, numbers)
    clusters[kept] = firsts[groups]
    return Sides(validation, np.where(train, times, 0), clusters, dropped, result, mixed)


def _mix(index: DocumentIndex, stays: np.ndarray, mixture: Mixture) -> tuple[np.ndarray, tuple[dict[str, Any], ...]]:
    """How many times each document is taken, and the figures of each input."""
    of_document = mixture.inputs[index.sources]
    num_inputs = len(mixture.shares)
    tokens = np.bincount(of_document[stays], index.num_tokens[stays], num_inputs)
    rates = mixture.rates(tokens)
    times = copies(rates[of_document], index.hashes)
    columns = {
        "share": mixture.shares,
        "num_documents": np.bincount(of_document[stays], minlength=num_inputs),
        "num_tokens": tokens.astype(np.int64),
        "times": rates,
        "num_left_out": np.bincount(of_document[stays & (times == 0)], minlength=num_inputs),
    }
    return times, tuple(pa.table(columns).to_pylist())


def write_sides(writer: StoreWriter, index: DocumentIndex, sides: Sides) -> None:
    """Write both sides, each in its own thread; documents taken several times come again after all others."""
    passes = [sides.train > times for times in range(int(sides.train.max(initial=1)))]

    def write(split: Split, masks: list[np.ndarray]) -> None:
        for mask in masks:
            _write_side(writer.splits[split], index, sides, mask)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, SPLITS, (passes, [sides.validation])))


def _write_side(writer: SplitWriter, index: DocumentIndex, sides: Sides, mask: np.ndarray) -> None:
    for task, (begin, end) in zip(index.tasks, pairwise(index.starts), strict=True):
        own = mask[begin:end]
        if not own.any():
            continue
        table = _documents(task).filter(pa.array(own))
        hashes = index.hex_hashes(begin + np.flatnonzero(own)).astype("U32").tolist()
        columns = [table[name] for name in ROW_SCHEMA.names[:-2]]
        columns += [pa.array(hashes, pa.string()), pa.array(sides.clusters[begin:end][own], pa.int64())]
        writer.add_rows(pa.Table.from_arrays(columns, schema=ROW_SCHEMA))
        for ids in _tokens(task, index.num_tokens[begin:end], own):
            writer.add_tokens(ids)
        if mask is sides.validation:
            for text_hash, text in zip(hashes, _texts(task, own), strict=True):
                writer.add_text(text_hash, text)


def _tokens(task: ShardTask, num_tokens: np.ndarray, own: np.ndarray) -> Iterator[np.ndarray]:
    """The ids of some documents of a shard, a few million at a time."""
    ids = map_ids(task.directory / "tokens.bin", np.dtype(task.settings.dtype))
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


def _texts(task: ShardTask, own: np.ndarray) -> Iterator[bytes]:
    """The texts of some documents of a shard, in order.

    The last text may be that of an earlier row, the one of the lowest position; if it is wanted, no other is.
    """
    with pa.memory_map(str(task.directory / "texts.arrow")) as file:
        reader = pa.ipc.open_file(file)
        assert reader.schema == TEXTS_SCHEMA
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            yield from batch.filter(pa.array(own[batch["row"].to_numpy()]))["text"].to_pylist()


def _documents(task: ShardTask) -> pa.Table:
    with pa.memory_map(str(task.directory / "documents.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.schema == DOCUMENTS_SCHEMA
    return table


def write_rejects(path: Path, tasks: Sequence[ShardTask]) -> None:
    """Gather what cleaning left out, in the order of the input, in one file that appears whole."""
    with new_file(path) as temporary, temporary.open("wb") as out:
        for task in tasks:
            out.write((task.directory / "rejects.jsonl").read_bytes())
