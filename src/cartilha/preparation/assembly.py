"""Shards to a store: which documents stay, on which side each is, and one pass that writes them in the input's order.

Nothing here depends on how the input was cut or on who did the work: the same documents give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cartilha.corpus.near_duplicates import cluster
from cartilha.corpus.splits import Split, SplitResult, SplitRule, split_documents
from cartilha.errors import UserError
from cartilha.preparation.mixture import Mixture, copies
from cartilha.preparation.shard_work import DOCUMENTS_SCHEMA, TEXTS_SCHEMA, ShardTask
from cartilha.tokens.store_writer import ROW_SCHEMA, SplitWriter, StoreWriter

COPY_TOKENS = 4 << 20  # tokens copied at a time
MASKED_TOKENS = 100  # shorter documents than this are picked by a mask


@dataclass(frozen=True)
class Corpus:
    """All documents of all shards, in the input's order, by number.

    Attributes:
        tasks: The shards.
        starts: Number of each shard's first document, and of the one after the last, int64.
        hashes: The first 16 bytes of the SHA-256 of each text, as two numbers, uint64: shape (num_documents, 2).
        positions: `split_position` of each, float64.
        num_tokens: Tokens of each, int64.
        sources: Number of the source that each was read from, int32.
    """

    tasks: Sequence[ShardTask]
    starts: np.ndarray
    hashes: np.ndarray
    positions: np.ndarray
    num_tokens: np.ndarray
    sources: np.ndarray

    def hex_hashes(self, which: np.ndarray) -> np.ndarray:
        """Hashes as they are printed, bytes of 32 characters."""
        digits = self.hashes[which].astype(">u8").tobytes().hex().encode("ascii")
        return np.frombuffer(digits, "S32")


@dataclass(frozen=True)
class Sides:
    """What becomes of each document.

    Attributes:
        validation: Whether it is held out, bool, shape (num_documents,).
        train: How many times it stands in the training side, int64; on neither side where it is left out.
        clusters: Its cluster: the number of the first document, among those kept, that is a near-duplicate; int64.
        dropped: Documents left out, by reason.
        split: What decided.
        mixture: With weights, for each input its share of the tokens, its documents and their tokens, how many times
            they are taken, and how many documents are left out.
    """

    validation: np.ndarray
    train: np.ndarray
    clusters: np.ndarray
    dropped: dict[str, int]
    split: SplitResult
    mixture: tuple[dict[str, Any], ...]


def load_corpus(tasks: Sequence[ShardTask], source_numbers: dict[Any, int]) -> Corpus:
    """The numbers of all documents.

    Args:
        tasks: Finished ones, in order.
        source_numbers: For each source of the tasks' parts its number.
    """
    hashes, positions, num_tokens, sources = [np.zeros((0, 2), np.uint64)], [np.zeros(0)], [np.zeros(0, np.int64)], []
    starts = [0]
    for task in tasks:
        table = _read(task, "documents.arrow", DOCUMENTS_SCHEMA)
        of_pieces = np.array([source_numbers[part.source] for part in task.shard.parts], np.int32)
        sources.append(of_pieces[table["piece"].to_numpy()])
        positions.append(table["position"].to_numpy())
        num_tokens.append(table["num_tokens"].to_numpy())
        for chunk in table["text_hash"].chunks:
            found = np.frombuffer(chunk.buffers()[1], ">u8", 2 * len(chunk), 16 * chunk.offset)
            hashes.append(found.reshape(-1, 2).astype(np.uint64))
        starts.append(starts[-1] + len(table))
    return Corpus(
        tasks,
        np.array(starts),
        np.concatenate(hashes),
        np.concatenate(positions),
        np.concatenate(num_tokens),
        np.concatenate([np.zeros(0, np.int32), *sources]),
    )


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Whether each document is the first with its text: bool, shape (num_documents,).

    Args:
        hashes: Shape (num_documents, 2).
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable
    ordered = hashes[order]
    result = np.ones(len(hashes), bool)
    result[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return result


def decide(
    corpus: Corpus,
    rule: SplitRule,
    *,
    near_duplicates: bool,
    mixture: Mixture | None,
    given: np.ndarray | None,
    memory_bytes: int,
) -> Sides:
    """Which documents stay and on which side.

    Args:
        corpus: All documents.
        rule: How many are held out.
        near_duplicates: Whether clusters of near-duplicates are kept together.
        mixture: What share of the tokens each input is to have; None where everything is taken once.
        given: For each source whether it is held out as a whole; None where the rule decides.
        memory_bytes: What clustering may hold.

    Raises:
        UserError: There is nothing to split.
    """
    num_documents = len(corpus.hashes)
    stays = first_of_each(corpus.hashes)
    dropped = {"exact_duplicates": int((~stays).sum())}
    found = None
    if near_duplicates:
        files = [task.directory / "signatures.npy" for task in corpus.tasks]
        found = cluster(files, memory_bytes=memory_bytes, scratch=corpus.tasks[0].work)
    times, mixed = np.ones(num_documents, np.int64), tuple[dict[str, Any], ...]()
    if mixture is not None:
        times, mixed = _mix(corpus, stays, mixture)
        dropped["weights"] = int((stays & (times == 0)).sum())
        stays &= times > 0
    kept = np.flatnonzero(stays)
    if len(kept) == 1:
        raise UserError(
            "The corpus is a single document, which cannot be split into training and validation; add more."
        )
    own_clusters = None if found is None else found[kept]
    result = split_documents(
        corpus.hex_hashes(kept),
        rule,
        clusters=own_clusters,
        given=None if given is None else given[corpus.sources[kept]],
        own=corpus.positions[kept],
    )
    if result.left_out.any():
        dropped["near_duplicates_of_validation"] = int(result.left_out.sum())
    validation, train = np.zeros(num_documents, bool), np.zeros(num_documents, bool)
    validation[kept] = result.validation
    train[kept] = ~result.validation & ~result.left_out
    clusters = np.arange(num_documents)
    if own_clusters is not None:
        firsts = np.full(num_documents, num_documents)
        np.minimum.at(firsts, own_clusters, np.arange(len(kept)))
        clusters[kept] = firsts[own_clusters]
    else:
        clusters[kept] = np.arange(len(kept))
    return Sides(validation, np.where(train, times, 0), clusters, dropped, result, mixed)


def _mix(corpus: Corpus, stays: np.ndarray, mixture: Mixture) -> tuple[np.ndarray, tuple[dict[str, Any], ...]]:
    """How many times each document is taken, and the figures of each input."""
    of_document = mixture.inputs[corpus.sources]
    tokens = np.bincount(of_document[stays], corpus.num_tokens[stays], len(mixture.shares))
    rates = mixture.rates(tokens)
    times = copies(rates[of_document], corpus.hashes)
    figures = []
    for number, share in enumerate(mixture.shares.tolist()):
        own = stays & (of_document == number)
        figures.append(
            {
                "share": share,
                "num_documents": int(own.sum()),
                "num_tokens": int(tokens[number]),
                "times": float(rates[number]),
                "num_left_out": int((own & (times == 0)).sum()),
            }
        )
    return times, tuple(figures)


def write_sides(writer: StoreWriter, corpus: Corpus, sides: Sides) -> None:
    """Write both sides, by a thread each: they share nothing but what they read.

    Documents that are taken several times come again after all others, pass by pass.
    """
    passes = [sides.train > times for times in range(int(sides.train.max(initial=1)))]
    masks: list[tuple[Split, list[np.ndarray]]] = [("train", passes), ("validation", [sides.validation])]

    def write(split: Split, own: list[np.ndarray]) -> None:
        for mask in own:
            _write_side(writer.splits[split], corpus, sides, mask)

    with ThreadPoolExecutor(2) as pool:
        for work in [pool.submit(write, split, own) for split, own in masks]:
            work.result()


def _write_side(writer: SplitWriter, corpus: Corpus, sides: Sides, mask: np.ndarray) -> None:
    for number, task in enumerate(corpus.tasks):
        begin, end = corpus.starts[number], corpus.starts[number + 1]
        own = mask[begin:end]
        if not own.any():
            continue
        table = _read(task, "documents.arrow", DOCUMENTS_SCHEMA).filter(pa.array(own))
        hashes = corpus.hex_hashes(begin + np.flatnonzero(own)).astype("U32").tolist()
        columns = [table[name] for name in ROW_SCHEMA.names[:-2]]
        columns += [pa.array(hashes, pa.string()), pa.array(sides.clusters[begin:end][own], pa.int64())]
        writer.add_rows(pa.Table.from_arrays(columns, schema=ROW_SCHEMA))
        for ids in _tokens(task, corpus.num_tokens[begin:end], own):
            writer.add_tokens(ids)
        if mask is sides.validation:
            for text_hash, text in zip(hashes, _texts(task, own), strict=True):
                writer.add_text(text_hash, text)


def _tokens(task: ShardTask, num_tokens: np.ndarray, own: np.ndarray) -> Iterator[np.ndarray]:
    """The ids of some documents of a shard, some millions at a time."""
    path = task.directory / "tokens.bin"
    if not path.stat().st_size:
        return
    ids = np.memmap(path, np.dtype(task.settings.dtype), "r")
    ends = np.cumsum(num_tokens)
    first = 0
    while first < len(num_tokens):
        begin = int(ends[first] - num_tokens[first])
        last = max(first + 1, int(np.searchsorted(ends, begin + COPY_TOKENS, side="right")))
        part = ids[begin : ends[last - 1]]
        chosen = own[first:last]
        if chosen.all():
            yield from np.array_split(part, max(1, len(part) // COPY_TOKENS))
        elif len(part) > MASKED_TOKENS * len(chosen):  # long documents: copy them, run by run
            edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
            bounds = np.concatenate(([0], ends[first:last] - begin))[edges].tolist()
            yield np.concatenate([part[:0], *(part[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True))])
        else:
            yield part[np.repeat(chosen, num_tokens[first:last])]
        first = last


def _texts(task: ShardTask, own: np.ndarray) -> Iterator[bytes]:
    """The texts of some documents of a shard, in order.

    A shard whose kept texts are all of the other side may have an earlier row's text at its end, that of its lowest
    position; where that one is wanted, no other is.
    """
    with pa.memory_map(str(task.directory / "texts.arrow")) as file:
        reader = pa.ipc.open_file(file)
        assert reader.schema == TEXTS_SCHEMA
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            yield from batch.filter(pa.array(own[batch["row"].to_numpy()]))["text"].to_pylist()


def _read(task: ShardTask, name: str, schema: pa.Schema) -> pa.Table:
    with pa.memory_map(str(task.directory / name)) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.schema == schema
    return table


def write_rejects(path: Path, tasks: Sequence[ShardTask]) -> None:
    """Gather what cleaning left out, in the input's order, in one file that appears whole."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as out:
        for task in tasks:
            out.write((task.directory / "rejects.jsonl").read_bytes())
    temporary.replace(path)
