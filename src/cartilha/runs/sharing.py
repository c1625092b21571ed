"""Whether the processes of a run share out the model or hold all of it each."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from cartilha.config import PlanConfig, TrainConfig
from cartilha.errors import UserError, log
from cartilha.machine.cpu import give_back_freed_memory
from cartilha.machine.processes import gather_objects, world
from cartilha.model.load import look_at
from cartilha.model.sharding import shard_model
from cartilha.runs.step_plan import this_machine
from cartilha.training.device_facts import GIB, DeviceFacts
from cartilha.training.memory import SAFETY, MemoryModel
from cartilha.training.profiles import Profile
from cartilha.training.update_rules import can_shard


def is_to_be_sharded(
    config: TrainConfig, profile: Profile, model: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether a run's model is to be sharded: as asked for, or because the plan says that a whole one does not fit.

    A UserError says why a model cannot be sharded that is to be. With `auto`, a line says what is chosen.
    """
    num_ranks = world()[1]
    if config.shard == "none" or num_ranks == 1:
        if config.shard == "full":
            log.info("There is one process, which holds the whole model: --shard full needs torchrun.")
        return False
    reason = why_whole(config, profile, model)
    if config.shard == "full":
        if reason:
            raise UserError(f"{config.model} cannot be sharded, since {reason}; use --shard none.")
        log.info("Sharded: each of %d processes holds a part of weights, gradients and states.", num_ranks)
        return True
    needed, free = _needed_alone(config, profile, model, this_machine(device, dtype))
    if all(gather_objects(needed <= SAFETY * free)):
        log.info(
            "Replicated: each of %d processes holds the whole model (%.1f GiB planned, %.1f GiB free).",
            *(num_ranks, needed / GIB, free / GIB),
        )
        return False
    if reason:
        log.warning("%s is planned not to fit, and cannot be sharded, since %s.", config.model, reason)
        return False
    log.info(
        "Sharded: the whole model would take %.1f GiB in each of %d processes, and %.1f GiB are free.",
        *(needed / GIB, num_ranks, free / GIB),
    )
    return True


def why_whole(config: TrainConfig | PlanConfig, profile: Profile, model: PretrainedConfig) -> str | None:
    """Why the processes cannot share out this model, to complete "since ..."; None if they can."""
    seen = look_at(model, config.model)
    if profile.lean:
        return "it is trained with --memory lean, which works on whole weights"
    if profile.adapter is not None and profile.adapter.base == "4bit":
        return "each process holds a base of 4 bits whole"
    if not seen.how.packed:
        return "it runs one document per row, so that processes would have different numbers of passes"
    if not seen.recomputes:
        return "its layers cannot be told apart"
    if not can_shard(config.optimizer):
        return f"--optimizer {config.optimizer} works on whole weights"
    return None


def _needed_alone(
    config: TrainConfig, profile: Profile, model: PretrainedConfig, machine: DeviceFacts
) -> tuple[float, int]:
    """Bytes planned for the smallest step of a process that holds the whole model, and those that it may have."""
    facts, size = machine.for_model(model, dropout=config.dropout), profile.size(model, config.optimizer)
    how = profile.computation(facts, dropout=config.dropout)
    try:
        memory = MemoryModel(model, how, overhead_bytes=facts.overhead_bytes, size=size)
        needed = float(memory.step(1, config.block_size, accumulates=True).total)
    except Exception:  # an architecture may do something that tensors without contents cannot follow
        needed = float(size.training_bytes + facts.overhead_bytes)
    return needed, facts.memory_bytes


def share_out(model: PreTrainedModel, path: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model whose run will be written to `path`, which every process must see, or a UserError says so."""
    if not all(gather_objects(path.is_dir())):
        raise UserError(
            f"Not every machine sees {path}: each writes its part of a sharded model's checkpoints there; name an "
            "--output on a disk that all of them share, with --scratch none."
        )
    if device.type == "cpu":
        log.info("Sharded on a CPU: layers are gathered in float32, and gradients are not added in place.")
        dtype = torch.float32
    give_back_freed_memory()  # also of the host, where a card's weights were read
    log.info("A sharded model is not compiled, and training waits while a checkpoint is written.")
    shard_model(model, device, dtype)
