"""Where the work on shards is done: in this process, on this machine's cores, or on a Ray cluster.

Each executor runs the same function on the same tasks and hands back results as they come, in no order.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Barrier
from typing import Protocol, TypeVar

from cartilha.errors import UnfinishedError, UserError, first_line, import_extra

Task = TypeVar("Task")
Result = TypeVar("Result")

# What a worker imports before it is needed, by one process for all of them where the system can fork. Arrow imports
# pandas, where that is installed, to see whether a list is one of its; that takes a third of a second.
PRELOAD = ["cartilha.preparation.shard_work", "gigatoken", "awkward", "pandas"]


START_S = 60.0  # after which work begins with the processes that are there


class Executor(Protocol):
    """Runs a function on tasks."""

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results as they come. What the function raises is raised here, and no more is begun then."""
        ...

    def close(self) -> None:
        """Let go of processes; safe to call twice."""


class Inline:
    """Does the work here, one task after the other."""

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See `Executor`."""
        for task in tasks:
            yield function(task)

    def close(self) -> None:
        """Nothing is held."""


class Local:
    """Does the work in processes of this machine, which begin to start at once and import while others prepare.

    Args:
        num_workers: How many.
        imports: More modules to import at once.
    """

    def __init__(self, num_workers: int, imports: Sequence[str] = ()) -> None:
        self._num_workers = num_workers
        self._imports = [*PRELOAD, *imports]
        # Threads (of Arrow, rayon) do not survive a fork: workers come from a process that has none, or are new.
        method = "forkserver" if sys.platform == "linux" else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(self._imports)
        self._pool = ProcessPoolExecutor(num_workers, context, _begin, (context.Barrier(num_workers),))
        self._start = threading.Thread(target=self._start_workers)
        self._start.start()

    def _start_workers(self) -> None:
        """Have all processes begin: the pool starts one only where it knows of none that is idle."""
        with _without_main_module():
            for _ in range(self._num_workers):
                self._pool.submit(_import_all, self._imports)

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See `Executor`."""
        self._start.join()
        left = iter(tasks)
        running: set[Future[Result]] = set()
        try:
            while True:
                for task in left:
                    running.add(self._pool.submit(function, task))
                    if len(running) >= 2 * self._num_workers:
                        break
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise UnfinishedError(
                "A process that prepared a part of the text was killed, perhaps for want of memory; run the same"
                f" command again with fewer than {self._num_workers} --workers: what is done is kept."
            ) from None
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """Wait for what is running and end the processes."""
        self._start.join()
        self._pool.shutdown(wait=True, cancel_futures=True)


class Ray:
    """Does the work on a Ray cluster, or on a local one where no address is given.

    Inputs and the store's directory must be reachable under the same paths from all of its machines.

    Args:
        address: Of the cluster (`auto`, `host:port`, `ray://host:port`); None starts one here.
        num_workers: Tasks at a time; None for as many as there are cores.

    Raises:
        UserError: The extra is missing, or the cluster cannot be reached.
    """

    def __init__(self, address: str | None, num_workers: int | None) -> None:
        ray = import_extra("ray", "The Ray executor", "scale")
        self._ray = ray
        options = {} if address else {"num_cpus": num_workers, "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"The Ray cluster at {address or 'this machine'} cannot be reached"
                f" ({first_line(error)}); check --ray_address, or use --executor local."
            ) from None
        self._at_once = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See `Executor`."""
        ray = self._ray
        remote = ray.remote(num_cpus=1, max_retries=2)(function)
        left = iter(tasks)
        running: list[object] = []
        while True:
            for task in left:
                running.append(remote.remote(task))
                if len(running) >= 2 * self._at_once:
                    break
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

    def close(self) -> None:
        """Disconnect."""
        self._ray.shutdown()


_all_begun: Barrier | None = None  # in a worker: of all workers


def _begin(all_begun: Barrier) -> None:
    """A worker's first act: leave Ctrl-C to the parent, end when the parent is gone, and use one core."""
    global _all_begun
    _all_begun = all_begun
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _import_all(names: Sequence[str]) -> None:
    """Import, and be busy until all workers are: each has begun then."""
    import importlib

    assert _all_begun is not None
    with contextlib.suppress(threading.BrokenBarrierError):
        _all_begun.wait(START_S)
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Workers started here do not run the caller's script again, which needs no `if __name__ == "__main__"` then."""
    real = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = real
