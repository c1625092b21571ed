"""The command line in several processes at once, as torchrun starts it, without the time that its start takes.

A server imports everything once, and each process is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["cartilha.pipeline.train", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
TIMEOUT_S = 120


@dataclass(frozen=True)
class Outcome:
    """What the processes left, in the order of their ranks: exit codes and what they printed."""

    codes: list[int | None]
    outs: list[str]
    errs: list[str]


def run_processes(number: int, folder: Path, *arguments: object, lost: tuple[int, int] | None = None) -> Outcome:
    """Call the command line in so many processes; of `lost`, (rank, step), that rank is killed in that step."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(argument) for argument in arguments]
    started = [_CONTEXT.Process(target=_one, args=(r, number, port, folder, words, lost)) for r in range(number)]
    for process in started:
        process.start()
    for process in started:
        process.join(TIMEOUT_S)
        process.kill()
        process.join()
    outs, errs = ([(folder / f"{r}.{kind}").read_text("utf-8") for r in range(number)] for kind in ("out", "err"))
    return Outcome([process.exitcode for process in started], outs, errs)


def _one(
    rank: int, number: int, port: int, folder: Path, words: list[str], lost: tuple[int, int] | None
) -> None:  # pragma: no cover  # in another process
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(number)}
    import torch

    from cartilha.cli import main
    from cartilha.training import loop

    torch.set_num_threads(1)
    if lost is not None and lost[0] == rank:
        update = loop._update

        def killed(state, *rest):
            if state.progress.step + 1 == lost[1]:
                os.kill(os.getpid(), 9)
            return update(state, *rest)

        loop._update = killed
    sys.exit(main(words))
