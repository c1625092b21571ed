"""Several processes train as one: each takes a share of a step's blocks, and their gradients are summed.

    torchrun --nproc-per-node N -m cartilha train ...

Summed once a step, after the last micro-batch, and not by DistributedDataParallel's hooks: the loss of a step is the
mean over the targets of all ranks, whatever share each has, and a rank that runs out of memory may repeat its
micro-batches alone, because nobody waits for it before the sum. The price is that the sum does not overlap the backward
pass: 0.5 GB of gradients at 125 M parameters, milliseconds within a machine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from cartilha.errors import counted
from cartilha.machine.devices import seed_everything
from cartilha.machine.processes import gather_objects, join_processes, world

log = logging.getLogger("cartilha")


def sum_over_ranks(parameters: Sequence[nn.Parameter], loss: torch.Tensor) -> None:
    """Replace every gradient, and the loss, by its sum over the ranks; without torchrun nothing is done.

    Args:
        parameters: With this rank's gradients; None stands for zero (a rank without blocks).
        loss: This rank's share of the step's loss, a scalar.
    """
    if world()[1] == 1:
        return
    join_processes(loss.device)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    tensors = [loss, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
    sums = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in sums:
        assert work is not None
        work.wait()


def agree(seconds: float, micro_batch_size: int) -> tuple[float, int]:
    """The seconds of rank 0, which decide the learning rate under a time budget, and the smallest micro-batch.

    A rank whose memory ran out has a smaller one than the others, and its warning is not heard: rank 0 speaks for it.
    """
    ranks = gather_objects((seconds, micro_batch_size))
    smallest = min(size for _, size in ranks)
    if smallest < micro_batch_size:
        log.warning(
            "Memory ran out in another process: all go on with micro-batches of %s.", counted(smallest, "block")
        )
    return ranks[0][0], smallest


def same_everywhere(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Give every rank the weights and the optimizer's state of rank 0, which alone reads checkpoints.

    Each rank draws its own random numbers (dropout) afterwards; rank 0 goes on with those that it has.

    Args:
        model: The same shape on every rank.
        optimizer: Over the model's parameters; its states are there (`allocate_states`).
        seed: Of the run.
    """
    rank, num_ranks = world()
    if num_ranks == 1:
        return
    parameters = list(model.parameters())
    join_processes(parameters[0].device)
    with torch.no_grad():
        for parameter in parameters:
            dist.broadcast(parameter, src=0)
            state = optimizer.state[parameter]
            for key in sorted(state):
                dist.broadcast(state[key], src=0)
    if rank != 0:
        seed_everything(seed + rank)
