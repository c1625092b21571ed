"""The command line in several processes at once, as torchrun starts it, without the time that its start takes.

A server imports everything once, and each process is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows has no server
_CONTEXT = multiprocessing.get_context(_METHOD)
_CONTEXT.set_forkserver_preload(["cartilha.pipeline.train", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
TIMEOUT_S = 300


@dataclass(frozen=True)
class Outcome:
    """What the processes left, in the order of their ranks: exit codes and what they printed."""

    codes: list[int | None]
    outs: list[str]
    errs: list[str]


def run_processes(number: int, folder: Path, *arguments: object, lost: tuple[int, int] | None = None) -> Outcome:
    """Call the command line in so many processes; of `lost`, (rank, step), that rank is killed in that step."""
    codes = in_processes(number, _main, folder, [str(argument) for argument in arguments], lost)
    outs, errs = ([(folder / f"{r}.{kind}").read_text("utf-8") for r in range(number)] for kind in ("out", "err"))
    return Outcome(codes, outs, errs)


def in_processes(number: int, function: Callable[..., None], folder: Path, *arguments: object) -> list[int | None]:
    """Call a function of a module in so many processes, with its rank, `folder` and arguments; their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        _CONTEXT.Process(target=_call, args=(r, number, port, function, folder, *arguments)) for r in range(number)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(TIMEOUT_S)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def _call(rank: int, number: int, port: int, function: Callable[..., None], folder: Path, *arguments: object) -> None:
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(number)}
    function(rank, folder, *arguments)


def _main(rank: int, folder: Path, words: list[str], lost: tuple[int, int] | None) -> None:
    import torch

    from cartilha.cli import main
    from cartilha.training import loop

    torch.set_num_threads(1)
    if lost is not None and lost[0] == rank:
        update = loop._update

        def killed(state, *rest):
            if state.progress.step + 1 == lost[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(state, *rest)

        loop._update = killed
    sys.exit(main(words))
