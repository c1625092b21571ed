"""Where the work on shards is done: in this process (by `map`), on the cores of this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.synchronize import Barrier
from typing import Any, TypeVar

from cartilha.errors import UnfinishedError, UserError, first_line, import_extra
from cartilha.machine.cpu import give_back_freed_memory

Task = TypeVar("Task")
Result = TypeVar("Result")

# What workers import before their first task; on Linux, one process imports it for all. Arrow imports pandas, if it is
# installed, to see whether a list is one of its types; that takes a third of a second.
PRELOAD = ["cartilha.preparation.shard_work", "gigatoken", "awkward", "pandas"]
LARGE_ARRAY = 4 << 20  # bytes; smaller ones are made and freed all the time, and mapping them would take longer
START_S = 60.0  # after which work begins with the processes that have started

# Runs a function on tasks: results come unordered, and after an exception no further task begins.
Executor = Callable[[Callable[[Task], Result], Iterable[Task]], Iterator[Result]]


@contextmanager
def in_processes(num_workers: int, imports: Sequence[str] = ()) -> Iterator[Executor[Any, Any]]:
    """An executor of processes on this machine, which import `PRELOAD` and `imports` while the caller prepares."""
    modules = [*PRELOAD, *imports]
    # Threads (of Arrow, rayon) do not survive a fork, so workers are forked from a process without threads, or new.
    method = "forkserver" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(modules)
    pool = ProcessPoolExecutor(num_workers, context, _begin, (context.Barrier(num_workers),))

    def start_workers() -> None:  # all of them: the pool starts one only when no other is idle
        caller = sys.modules["__main__"]
        # Workers must not run the caller's script, which therefore needs no `if __name__ == "__main__"`.
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            for _ in range(num_workers):
                pool.submit(_import_all, modules)
        finally:
            sys.modules["__main__"] = caller

    start = threading.Thread(target=start_workers)
    start.start()

    def run(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        start.join()
        left = iter(tasks)
        running: set[Future[Result]] = set()
        try:
            while True:
                running |= {pool.submit(function, task) for task in islice(left, 2 * num_workers - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise UnfinishedError(
                "A process that prepared a part of the text was killed, perhaps because memory ran out; run the same"
                f" command again with fewer than {num_workers} --workers: what is done is kept."
            ) from None
        finally:
            for future in running:
                future.cancel()

    try:
        yield run
    finally:
        start.join()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def on_ray(address: str | None, num_workers: int | None) -> Iterator[Executor[Any, Any]]:
    """An executor on a Ray cluster, all of whose machines reach inputs and store under the same paths.

    The address is `auto`, `host:port` or `ray://host:port`; without one, a cluster starts here. Without `num_workers`,
    all of its cores are used. A UserError says that the extra is missing, or that the cluster cannot be reached.
    """
    ray = import_extra("ray", "The Ray executor", "scale")
    options = {} if address else {"num_cpus": num_workers, "include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The Ray cluster at {address or 'this machine'} cannot be reached ({first_line(error)}); check"
            " --ray_address, or use --executor local."
        ) from None
    at_once = 2 * (num_workers or max(1, int(ray.cluster_resources().get("CPU", 1))))

    def run(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        remote = ray.remote(num_cpus=1, max_retries=2)(function)
        left = iter(tasks)
        running: list[Any] = []
        while True:
            running += [remote.remote(task) for task in islice(left, at_once - len(running))]
            if not running:
                return
            done, running = ray.wait(running)
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise UnfinishedError(
                    f"A Ray task was lost ({type(error).__name__}); look at the cluster and run the same command"
                    " again: what is done is kept."
                ) from None

    try:
        yield run
    finally:
        ray.shutdown()


_all_begun: Barrier | None = None  # in a worker: shared by all workers


def _begin(all_begun: Barrier) -> None:
    """Begin a worker: it leaves Ctrl-C to the parent, ends when the parent is gone, and uses one core."""
    global _all_begun
    _all_begun = all_begun
    give_back_freed_memory(LARGE_ARRAY)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _import_all(names: Sequence[str]) -> None:
    """Import modules once all workers have begun; waiting keeps this one busy, so that the pool starts the others."""
    assert _all_begun is not None
    with contextlib.suppress(threading.BrokenBarrierError):
        _all_begun.wait(START_S)
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
