"""Several processes train as one: each takes a share of a step's blocks, and their gradients are summed.

    torchrun --nproc-per-node N -m cartilha train ...

The gradients are summed once per step, after the last micro-batch, and not by DistributedDataParallel's hooks: a rank
that runs out of memory may repeat its micro-batches alone, because no other rank waits for it before the sum. The price
is that the sum does not overlap the backward pass: milliseconds within a machine, at 125 M parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from cartilha.errors import counted, log
from cartilha.machine.devices import seed_everything
from cartilha.machine.processes import from_rank_0, gather_objects, join_processes, world
from cartilha.model.adapters import trained_parameters
from cartilha.model.sharding import is_sharded
from cartilha.training.state import TrainingState

SENT_ALONE_BYTES = 2**16  # smaller gradients are copied together and summed in one exchange


def sum_over_ranks(parameters: Sequence[nn.Parameter], loss: torch.Tensor, *, gradients: bool = True) -> None:
    """Replace this rank's gradients (None stands for zero), and its share of the loss, by their sums over the ranks.

    Without `gradients` only the loss is summed: those of a sharded model are summed in the backward pass.
    """
    if world()[1] == 1:
        return
    join_processes(loss.device)
    tensors = [loss]
    for parameter in parameters if gradients else ():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        tensors.append(parameter.grad)
    # Gloo sums several large tensors at the same time, and one that holds them all takes longer. Of small ones, the
    # exchanges themselves are what takes the time (docs/log.md, section 54).
    small = [tensor for tensor in tensors if tensor.nbytes < SENT_ALONE_BYTES and tensor.dtype == loss.dtype]
    large = [tensor for tensor in tensors if tensor.nbytes >= SENT_ALONE_BYTES or tensor.dtype != loss.dtype]
    flat = torch.cat([tensor.flatten() for tensor in small])
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in [flat, *large]]:
        assert work is not None
        work.wait()
    sums = flat.split([tensor.numel() for tensor in small])
    torch._foreach_copy_(small, [part.view_as(tensor) for part, tensor in zip(sums, small, strict=True)])


def agree(seconds: float, micro_batch_size: int) -> tuple[float, int]:
    """The seconds of rank 0, which decide the learning rate under a time budget, and the smallest micro-batch.

    A rank whose memory ran out has a smaller one than the others. Its own warning is not shown: rank 0 gives one.
    """
    ranks = gather_objects((seconds, micro_batch_size))
    smallest = min(size for _, size in ranks)
    if smallest < micro_batch_size:
        blocks = counted(smallest, "block")
        log.warning("Memory ran out in another process: all go on with micro-batches of %s.", blocks)
    return ranks[0][0], smallest


def share_state(state: TrainingState, seed: int) -> None:
    """Give every rank the state of rank 0, which alone reads checkpoints; of a sharded model all have read their part.

    Each other rank draws its own random numbers (dropout) afterwards, seeded by `seed` and its number.
    """
    rank, num_ranks = world()
    if num_ranks == 1:
        return
    progress, scaler = from_rank_0((state.progress, state.scaler.state_dict()))
    vars(state.progress).update(vars(progress))
    state.scaler.load_state_dict(scaler)
    # A frozen base is loaded by each rank.
    parameters = [] if is_sharded(state.model) else list(trained_parameters(state.model).values())
    join_processes(state.model.device)
    with torch.no_grad():
        for parameter in parameters:
            dist.broadcast(parameter, src=0)
            for _, kept in sorted(state.optimizer.state[parameter].items()):
                shared = kept.to(parameter.device)  # counts of steps may be in the host's memory
                dist.broadcast(shared, src=0)
                kept.copy_(shared)
    if rank != 0:
        seed_everything(seed + rank)
