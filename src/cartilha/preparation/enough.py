"""Which shards are read, and how far, where not all of the input is: up to a number of documents, or of good tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from cartilha.config import PrepareConfig
from cartilha.console import progress
from cartilha.errors import counted, log
from cartilha.machine.devices import usable_cores
from cartilha.preparation.assembly import decide
from cartilha.preparation.executors import Executor
from cartilha.preparation.index import load_index
from cartilha.preparation.request import PrepareRequest
from cartilha.preparation.selection import Amount, threshold
from cartilha.preparation.shard_work import THRESHOLD_FILE, ShardResult, ShardTask, Until, done_result, process_shard
from cartilha.preparation.threshold import Threshold

SAMPLE_DOCUMENTS = 20_000

Done = list[tuple[ShardTask, ShardResult]]
_Run = Callable[[list[ShardTask]], list[ShardResult]]  # in the order of the tasks


def do_shards(
    config: PrepareConfig,
    asked: PrepareRequest,
    executor: Executor[Any, Any],
    tasks: Sequence[ShardTask],
    num_whole: int,
) -> Done:
    """Do the work on all shards, or find it done; the tasks that were needed, with their results.

    A limit does not count the documents of the first `num_whole` shards.
    """
    at_once = config.workers or usable_cores()
    with progress("Preparing", sum(task.shard.num_bytes for task in tasks) or None, "bytes") as advance:

        def run(some: Sequence[ShardTask], where: Executor[Any, Any] = executor) -> list[ShardResult]:
            results = {task.shard.number: result for task in some if (result := done_result(task)) is not None}
            advance(sum(result.num_bytes for result in results.values()))
            left = [task for task in some if task.shard.number not in results]
            for result in where(process_shard, left):
                results[result.number] = result
                advance(result.num_bytes)
            return [results[task.shard.number] for task in some]

        def run_few(some: Sequence[ShardTask]) -> list[ShardResult]:
            return run(some, executor if len(some) > 1 else map)

        if config.limit_documents is None and config.stream_best is None:
            return list(zip(tasks, run(tasks), strict=True))
        whole, rest = tasks[:num_whole], tasks[num_whole:]
        done = list(zip(whole, run(whole), strict=True))
        if config.limit_documents is not None:
            return [*done, *read_first(rest, config.limit_documents, run_few, at_once)]
        return read_enough(rest, asked, done, run_few, at_once, executor)


def read_first(tasks: Sequence[ShardTask], limit: int, run: _Run, at_once: int) -> Done:
    """Do the work on the first documents, so many of them.

    Several shards are done at a time, each up to the limit; the one that goes beyond it is done again.
    """
    return list(
        _so_far(
            *(tasks, limit, run, at_once),
            up_to=lambda task, left: replace(task, limit=left),
            amount=lambda result: result.num_documents,
        )
    )


def _so_far(
    tasks: Sequence[ShardTask],
    left: int,
    run: _Run,
    at_once: int,
    up_to: Callable[[ShardTask, int], ShardTask],
    amount: Callable[[ShardResult], int],
) -> Iterator[tuple[ShardTask, ShardResult]]:
    """The first tasks whose results come to the amount that is `left`, each with its result.

    So many tasks as `at_once` are done together, each cut (by `up_to`) at what is left before them. The one that
    reaches the amount is then done again, cut at what is left before itself: the documents do not depend on `at_once`.
    """
    for begin in range(0, len(tasks), at_once):
        asked = left
        wave = [up_to(task, asked) for task in tasks[begin : begin + at_once]]
        for task, result in zip(wave, run(wave), strict=True):
            if left != asked and amount(result) >= left:
                task = up_to(task, left)
                (result,) = run([task])
            yield task, result
            left -= amount(result)
            if left <= 0:
                return


def read_enough(
    tasks: Sequence[ShardTask],
    asked: PrepareRequest,
    done: Done,
    run: _Run,
    at_once: int,
    executor: Executor[Any, Any],
) -> Done:
    """Do the work on shards until the best share of the documents, as a first sample has them, holds enough tokens.

    `done` are the texts that are held out or aimed at. What is read does not depend on `at_once`.
    """
    assert asked.amount is not None and asked.stream_best is not None and isinstance(asked.amount.value, int)
    wanted, best = asked.amount.value, f"the best {100 * asked.stream_best:.4g} % of a first sample"
    if not tasks:
        return done
    path = tasks[0].work / THRESHOLD_FILE
    if not path.is_file():
        sample = read_first(tasks, SAMPLE_DOCUMENTS, run, at_once)
        index = load_index([task for task, _ in (*done, *sample)], asked.sources)
        sides = decide(index, replace(asked, amount=Amount(asked.stream_best)), executor, near_duplicates=False)
        assert sides.chosen is not None
        threshold(index, sides.chosen).save(path)
    found = Threshold.load(path)
    read = list(
        _so_far(
            *(tasks, wanted, run, at_once),
            up_to=lambda task, left: replace(task, until=Until(left, found.fingerprint)),
            amount=lambda result: result.good_tokens,
        )
    )
    documents, good = (sum(getattr(result, name) for _, result in read) for name in ("num_documents", "good_tokens"))
    if good >= wanted:
        log.info(
            "Reading ended after %s, when those as good as %s held %s.",
            *(counted(documents, "document"), best, counted(wanted, "token")),
        )
    else:
        log.warning(
            "The whole input was read (%s): those as good as %s hold %s, so the rest is chosen from worse ones.",
            *(counted(documents, "document"), best, counted(good, "token")),
        )
    return [*done, *read]
