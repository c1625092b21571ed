"""The processes that torchrun starts: which of them this is, and what they exchange."""

from __future__ import annotations

import os
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
