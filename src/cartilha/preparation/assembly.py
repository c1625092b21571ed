"""Shards to a store: which documents stay and on which side, and one pass that writes them in the order of the input.

Nothing depends on how the input was cut or on which executor did the work: the same documents give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cartilha.corpus.near_duplicates import cluster
from cartilha.corpus.pieces import each, large_array, pieces, without
from cartilha.corpus.splits import SPLITS, Clusters, Split, SplitResult, split_documents
from cartilha.errors import UserError
from cartilha.preparation.executors import Executor
from cartilha.preparation.index import DocumentIndex, chosen_ids, first_of_each, read_documents
from cartilha.preparation.mixture import InputShares, copies
from cartilha.preparation.quality import Judge
from cartilha.preparation.request import PrepareRequest
from cartilha.preparation.selection import Chosen, choose
from cartilha.preparation.shard_work import TEXTS_SCHEMA, ShardTask
from cartilha.storage import new_file
from cartilha.tokens.store import SplitCounts
from cartilha.tokens.store_checks import COUNTS
from cartilha.tokens.store_writer import ROW_SCHEMA, SplitWriter, StoreWriter


@dataclass(frozen=True)
class Sides:
    """What becomes of each document.

    Attributes:
        kept: Whether each document is the first of its text and in the mixture, bool, shape (num_documents,).
        validation: Whether it is held out, bool.
        train: How many times it is on the training side; a document that is left out is on neither side.
        clusters: The number, among the documents kept, of the first one in its cluster of near-duplicates, int64; None
            where they were not looked for, so that each is a cluster of its own.
        dropped: Documents left out, by reason.
        mixture: The figures of each input, if there are weights.
        chosen: What --select_tokens chose.
    """

    kept: np.ndarray
    validation: np.ndarray
    train: np.ndarray
    clusters: np.ndarray | None
    dropped: dict[str, int]
    split: SplitResult
    mixture: tuple[dict[str, Any], ...]
    chosen: Chosen | None = None


def decide(
    index: DocumentIndex,
    asked: PrepareRequest,
    executor: Executor[Any, Any],
    judge: Judge | None = None,
    *,
    near_duplicates: bool,
) -> Sides:
    """Which documents stay and on which side, with clusters of near-duplicates kept together if that is asked for.

    The judge looks at those that would be trained on. A UserError says that there is nothing to split.
    """
    stays = first_of_each(index.hashes)
    dropped = {"exact_duplicates": int(np.count_nonzero(~stays))}
    all_clusters = None
    if near_duplicates:
        files = [task.directory / "signatures.npy" for task in index.tasks]
        all_clusters = Clusters(cluster(files), index.hashes)
    times, mixed = None, tuple[dict[str, Any], ...]()
    if asked.mixture is not None:
        times, mixed = _mix(index, stays, asked.mixture)
        in_mixture = each(lambda own, number: own & (number > 0), stays, times)
        dropped["weights"] = int(np.count_nonzero(without(stays, in_mixture)))
        stays = in_mixture
    if np.count_nonzero(stays) == 1:
        raise UserError("A single document cannot be split into training and validation; add more.")
    result = _split(index, asked, stays, all_clusters)
    if result.left_out.any():
        dropped["near_duplicates_of_validation"] = int(result.left_out.sum())
    train = without(stays, result.validation, result.left_out)
    chosen = None
    if asked.amount is not None:
        num_given = asked.num_held_out + asked.num_targets
        pool = each(lambda own, source: own & (source >= num_given), train, index.sources)
        target = without(train, pool)
        if all_clusters is not None:
            given = each(lambda own, source: own & (source < num_given), stays, index.sources)
            _take_once(pool, given, all_clusters)
        chosen = _choose(index, asked, executor, judge, (pool, target))
        poor = () if judge is None else (each(np.sign, judge.verdicts),)
        dropped["target"] = int(np.count_nonzero(target))
        dropped["not_chosen"] = int(np.count_nonzero(without(train, target, chosen.mask, *poor)))
        train = chosen.mask
    elif judge is not None:
        judge.begin(train)
        for piece in pieces(len(train)):
            numbers = piece.start + np.flatnonzero(train[piece])
            train[numbers] = judge.passes(numbers)
        if not train.any():
            raise UserError("No document is good enough to train on; give wider limits to their perplexity and score.")
    dropped |= {} if judge is None else judge.left_out
    trained = each(np.multiply, train, train if times is None else times, dtype=np.int32)
    clusters = None if all_clusters is None else _among_kept(all_clusters, stays)
    return Sides(stays, result.validation, trained, clusters, dropped, result, mixed, chosen)


def _among_kept(clusters: Clusters, stays: np.ndarray) -> np.ndarray:
    """The number, among the documents kept, of the first one in the cluster of each."""
    numbers = clusters.array(np.int64)  # one more than the number of each cluster's first document; 0 while it has none
    result, num_kept = clusters.array(np.int64), 0
    for piece in pieces(len(stays)):
        kept = piece.start + np.flatnonzero(stays[piece])
        firsts, places = np.unique(clusters.firsts[kept], return_index=True)
        new = numbers[firsts] == 0
        numbers[firsts[new]] = num_kept + places[new] + 1
        result[piece] = numbers[clusters.firsts[piece]] - 1
        num_kept += len(kept)
    return result


def _take_once(pool: np.ndarray, of_target: np.ndarray, clusters: Clusters) -> None:
    """Leave one document at most in the pool of each cluster that the target, or what is held out, has documents of."""
    alike = clusters.members(clusters.of(of_target), pool)
    taken = clusters.array(bool)
    for piece in pieces(len(pool)):
        numbers = piece.start + np.flatnonzero(alike[piece])
        firsts, places = np.unique(clusters.firsts[numbers], return_index=True)
        pool[numbers] = False
        pool[numbers[places[~taken[firsts]]]] = True
        taken[firsts] = True


def _choose(
    index: DocumentIndex,
    asked: PrepareRequest,
    executor: Executor[Any, Any],
    judge: Judge | None,
    documents: tuple[np.ndarray, np.ndarray],
) -> Chosen:
    """What is chosen of the pool (the first mask) by the target (the second)."""
    pool, target = documents
    if not pool.any():
        raise UserError(
            "No document of the input is left to choose from: all are held out, or equal to a text of --like;"
            " give more text, or another target."
        )
    if asked.num_targets and target.sum() < 2:
        raise UserError("The texts of --like leave fewer than two documents to aim at; give more.")
    assert asked.amount is not None
    if judge is not None:
        judge.begin(pool)
    how_much = (asked.amount, asked.rule.seed)
    return choose(index, pool, target, how_much, executor, None if judge is None else judge.passes)


def _split(index: DocumentIndex, asked: PrepareRequest, stays: np.ndarray, clusters: Clusters | None) -> SplitResult:
    """Which documents are held out: given ones, else by the rule, among the target's if there is one."""

    def split(documents: np.ndarray, given: np.ndarray | None = None) -> SplitResult:
        return split_documents(index.positions, documents, asked.rule, given, clusters)

    if asked.num_held_out or not asked.num_targets:
        return split(stays, _from_first(index, asked.num_held_out) if asked.num_held_out else None)
    own = each(np.logical_and, stays, _from_first(index, asked.num_targets))
    if np.count_nonzero(own) < 2:
        raise UserError(
            "The texts of --like are fewer than two documents, one to hold out and one to aim at; give more."
        )
    inner = split(own)
    return replace(split(stays, inner.validation), fraction_used=inner.fraction_used, notes=inner.notes)


def _from_first(index: DocumentIndex, num_sources: int) -> np.ndarray:
    """Which documents are from the first sources: bool."""
    return each(lambda source: source < num_sources, index.sources)


def _mix(
    index: DocumentIndex, stays: np.ndarray, mixture: InputShares
) -> tuple[np.ndarray, tuple[dict[str, Any], ...]]:
    """How many times each document is taken, int32, and the figures of each input."""
    num_inputs, num_documents = len(mixture.shares), len(stays)
    sums = np.zeros((3, num_inputs))  # documents, tokens, documents left out
    for piece in pieces(num_documents):
        own = mixture.inputs[index.sources[piece]][stays[piece]]
        sums[0] += np.bincount(own, minlength=num_inputs)
        sums[1] += np.bincount(own, index.num_tokens[piece][stays[piece]], num_inputs)
    rates, times = mixture.rates(sums[1]), large_array((num_documents,), np.int32)
    for piece in pieces(num_documents):
        of_document = mixture.inputs[index.sources[piece]]
        times[piece] = copies(rates[of_document], index.hashes[piece])
        sums[2] += np.bincount(of_document[stays[piece] & (times[piece] == 0)], minlength=num_inputs)
    documents, tokens, left_out = sums.astype(np.int64)
    columns = {
        "share": mixture.shares,
        "num_documents": documents,
        "num_tokens": tokens,
        "times": rates,
        "num_left_out": left_out,
    }
    return times, tuple(pa.table(columns).to_pylist())


def write_sides(writer: StoreWriter, index: DocumentIndex, sides: Sides) -> None:
    """Write both sides, each in its own thread; documents taken several times come again after all others."""
    passes = [each(lambda own: own > times, sides.train) for times in range(int(sides.train.max(initial=1)))]  # noqa: B023

    def write(split: Split, masks: list[np.ndarray]) -> None:
        for mask in masks:
            _write_side(writer.splits[split], index, sides, mask)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, SPLITS, (passes, [sides.validation])))


def _write_side(writer: SplitWriter, index: DocumentIndex, sides: Sides, mask: np.ndarray) -> None:
    num_kept = 0
    for task, begin, end in index.shards():
        own, first = mask[begin:end], num_kept
        num_kept += int(np.count_nonzero(sides.kept[begin:end]))
        if not own.any():
            continue
        clusters = first + np.cumsum(sides.kept[begin:end]) - 1 if sides.clusters is None else sides.clusters[begin:end]
        table = read_documents(task).filter(pa.array(own))
        hashes = index.hex_hashes(begin + np.flatnonzero(own)).astype("U32").tolist()
        columns = [table[name] for name in ROW_SCHEMA.names[:-2]]
        columns += [pa.array(hashes, pa.string()), pa.array(clusters[own], pa.int64())]
        writer.add_rows(pa.Table.from_arrays(columns, schema=ROW_SCHEMA))
        for ids in chosen_ids(task, index.num_tokens[begin:end], own):
            writer.add_tokens(ids)
        if mask is sides.validation:
            for text_hash, text in zip(hashes, _texts(task, own), strict=True):
                writer.add_text(text_hash, text)


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


def write_rejects(path: Path, tasks: Sequence[ShardTask], others: Iterable[dict[str, Any]]) -> None:
    """Gather what cleaning left out, and then `others`, in the order of the input, in one file that appears whole."""
    with new_file(path) as temporary, temporary.open("wb") as out:
        for task in tasks:
            out.write((task.directory / "rejects.jsonl").read_bytes())
        for row in others:
            out.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))


def side_counts(index: DocumentIndex, sides: Sides) -> dict[Split, SplitCounts]:
    """What each side would hold, without a hash."""
    counts: dict[Split, SplitCounts] = {}
    for split, times in zip(SPLITS, (sides.train, sides.validation), strict=True):
        sums = dict.fromkeys(COUNTS, 0)
        for task, begin, end in index.shards():
            table, own = read_documents(task), times[begin:end].astype(np.int64)
            sums["num_documents"] += int(own.sum())
            for name in COUNTS[1:]:
                sums[name] += int(table[name].to_numpy() @ own)
        counts[split] = SplitCounts(**sums, corpus_hash="")
    return counts
