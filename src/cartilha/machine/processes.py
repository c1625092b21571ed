"""The processes that torchrun starts: which of them this is, and what they exchange."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes files and speaks to the user: rank 0, or the only one."""
    return world()[0] == 0


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")  # gloo's words


def is_lost_process(error: BaseException) -> bool:
    """Whether an exchange failed because another process has ended, by itself or with its machine."""
    if world()[1] == 1:
        return False
    import torch.distributed as dist

    is_from_torch = isinstance(error, (RuntimeError, ConnectionError))
    return isinstance(error, dist.DistError) or (is_from_torch and any(words in str(error) for words in _LOST))


def join_processes(device: torch.device | None = None) -> None:
    """Join the process group, once, to exchange tensors of `device`, or plain objects: gloo and, with CUDA, NCCL."""
    import torch.distributed as dist

    if not dist.is_initialized():
        import torch

        on_cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
        # Hours: rank 0 writes samples and checkpoints while the others wait.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(hours=6))


def gather_objects(mine: T) -> list[T]:
    """Every rank's value, in the order of the ranks."""
    num_ranks = world()[1]
    if num_ranks == 1:
        return [mine]
    import torch.distributed as dist

    join_processes()
    gathered: list[T | None] = [None] * num_ranks
    dist.all_gather_object(gathered, mine)
    return cast("list[T]", gathered)


def from_rank_0(mine: T) -> T:
    """The value of rank 0."""
    return gather_objects(mine)[0]


def on_rank_0(function: Callable[[], T]) -> T:
    """What a function gives that is called in rank 0 alone, in every rank; an OSError that it raises, too."""
    found: T | OSError | None = None
    if is_main_process():
        try:
            found = function()
        except OSError as error:
            found = error
    shared = from_rank_0(found)
    if isinstance(shared, OSError):
        raise shared
    return cast("T", shared)
