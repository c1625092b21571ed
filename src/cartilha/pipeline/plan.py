"""`plan`: what training a model takes in memory, time and money, on this machine and on cards that one might rent."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from cartilha.blocks.sampler import BlockSampler
from cartilha.config import PlanConfig
from cartilha.errors import counted
from cartilha.machine.devices import choose_device, choose_dtype, dtype_name
from cartilha.machine.memory import is_out_of_memory
from cartilha.model.configuration import context_length, model_config
from cartilha.model.load import configured_head_shape, load_model
from cartilha.model.recomputation import checkpoint_layers
from cartilha.pipeline.preflight import preflight
from cartilha.runs.step_plan import best_step, refuse_beyond_context, this_machine, with_copy
from cartilha.tokens.packed import PackedDocuments
from cartilha.tokens.store import TokenStore
from cartilha.training.checkpoint import BYTES_PER_PARAMETER as CHECKPOINT_BYTES_PER_PARAMETER
from cartilha.training.checkpoint import space_needed
from cartilha.training.device_facts import KNOWN_DEVICES, DeviceFacts, flops_per_token
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.memory import (
    BYTES_PER_PARAMETER,
    SAFETY,
    MemoryModel,
    StepMemory,
    check_states_fit,
    show_count,
)
from cartilha.training.schedule import Schedule
from cartilha.training.state import TrainingState

log = logging.getLogger("cartilha")

BLOCK_SIZES = (256, 512, 1024, 2048)
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
PROBE_TOKENS = {"cpu": 1024, "cuda": 16_384}  # a step
PROBE_STEPS = 3  # the first is not counted
GIB = 2**30


@dataclass(frozen=True)
class PlanResult:
    """The plan as plain values; `rows` has one for each device, block size and micro-batch."""

    values: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each device, block size and micro-batch."""
        rows = self.values["rows"]
        assert isinstance(rows, list)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return self.values


@dataclass(frozen=True)
class _Speed:
    """Tokens a second of a device: at one block size measured or expected, at others by operations a token."""

    flops: float
    measured_at: int | None = None


def plan(config: PlanConfig) -> PlanResult:
    """Plan the training of a model.

    Raises:
        UserError: No such model, store or device, a block size beyond the context, or a model that fits nowhere.
    """
    preflight(config)
    store = TokenStore(config.store) if config.store else None
    tokenizer = store.tokenizer() if store else None
    model = model_config(config.model, tokenizer if config.model.startswith("random:") else None)
    sizes = _block_sizes(config, context_length(model))
    machine, devices = _devices(config, model)
    speeds = {facts.name: _Speed(facts.peak_flops * facts.share) for facts in devices}
    memory = {facts.name: _memory_model(model, facts, config) for facts in devices}
    num_parameters = memory[devices[0].name].num_parameters
    _refuse_what_fits_nowhere(config, devices, num_parameters)
    configured_head_shape(model, config.model)
    if machine is not None and not config.skip_probe and num_parameters * BYTES_PER_PARAMETER < machine.memory_bytes:
        speeds[machine.name] = _probed(config, model, machine, num_parameters, sizes) or speeds[machine.name]
    counts = store.counts["train"] if store else None
    tokens = config.epochs * (counts.num_tokens + counts.num_documents) if counts else None
    rows, recommended = [], []
    for facts in devices:
        for block_size in sizes:
            of_size = [
                _row(facts, memory[facts.name], model, block_size, size, speeds[facts.name], tokens, config)
                for size in MICRO_BATCH_SIZES
            ]
            rows += of_size
            recommended.append(_recommended(facts, memory[facts.name], block_size, config, of_size))
    return PlanResult(
        {
            "model": config.model,
            "num_parameters": num_parameters,
            "context_length": context_length(model),
            "state_bytes": num_parameters * BYTES_PER_PARAMETER,
            "flops_per_token": {str(size): flops_per_token(model, num_parameters, size) for size in sizes},
            "batch_tokens": config.batch_tokens,
            "epochs": config.epochs,
            "train_tokens": tokens,
            "checkpoint_bytes": CHECKPOINT_BYTES_PER_PARAMETER * num_parameters,
            "disk_bytes": space_needed(num_parameters)[0],
            "devices": [_device_values(facts) for facts in devices],
            "recommended": recommended,
            "rows": rows,
        }
    )


def _block_sizes(config: PlanConfig, longest: int) -> tuple[int, ...]:
    if config.block_size is None:
        return tuple(size for size in BLOCK_SIZES if size <= longest) or (longest,)
    refuse_beyond_context(config.block_size, longest, config.model)
    return (config.block_size,)


def _devices(config: PlanConfig, model: PretrainedConfig) -> tuple[DeviceFacts | None, list[DeviceFacts]]:
    """This machine, where it is asked for, and all devices to plan for."""
    names = config.device or ("auto", *KNOWN_DEVICES)
    machine = None
    if "auto" in names:
        device = choose_device("auto")
        machine = replace(this_machine(device, choose_dtype("auto", device)), name="this machine").for_model(model)
    found = [machine if name == "auto" else KNOWN_DEVICES[name].for_model(model) for name in dict.fromkeys(names)]
    return machine, [facts for facts in found if facts is not None]


def _memory_model(model: PretrainedConfig, facts: DeviceFacts, config: PlanConfig) -> MemoryModel:
    how = facts.computation(checkpointing=config.gradient_checkpointing)
    return MemoryModel(model, how, overhead_bytes=facts.overhead_bytes)


def _refuse_what_fits_nowhere(config: PlanConfig, devices: list[DeviceFacts], num_parameters: int) -> None:
    """A model whose states are too large for every device asked for is refused; for some of them it is said."""
    too_small = [facts for facts in devices if num_parameters * BYTES_PER_PARAMETER > facts.memory_bytes]
    if len(too_small) == len(devices):
        largest = max(devices, key=lambda facts: facts.memory_bytes)
        check_states_fit(num_parameters, largest.memory_bytes, config.model, largest.name)
    for facts in too_small:
        log.info(
            "%s (%s parameters) cannot be trained on %s: %.1f GiB of states, %.1f GiB of memory.",
            config.model,
            show_count(num_parameters),
            facts.name,
            num_parameters * BYTES_PER_PARAMETER / GIB,
            facts.memory_bytes / GIB,
        )


def _as_planned(step: StepMemory, facts: DeviceFacts, memory: MemoryModel) -> StepMemory:
    """With the copy of the state that is there while a checkpoint is written, as `train` plans it for a longer run."""
    if not facts.is_host:
        return step
    return with_copy(step, facts, memory.num_parameters) or step


def _row(
    facts: DeviceFacts,
    memory: MemoryModel,
    model: PretrainedConfig,
    block_size: int,
    size: int,
    speed: _Speed,
    tokens: int | None,
    config: PlanConfig,
) -> dict[str, Any]:
    step = memory.step(size, block_size, accumulates=size * block_size < config.batch_tokens)
    fits = step.total <= SAFETY * facts.memory_bytes
    planned = _as_planned(step, facts, memory)
    # Layers that are computed twice cost another forward pass, which is 2 of 8 operations then.
    twice = 4 / 3 if config.gradient_checkpointing and speed.measured_at is None else 1.0
    rate = speed.flops / flops_per_token(model, memory.num_parameters, block_size) / twice if fits else None
    hours = tokens / rate / 3600 if tokens and rate else None
    return {
        "device": facts.name,
        "block_size": block_size,
        "micro_batch_size": size,
        "memory_bytes": planned.total,
        "memory": asdict(planned),
        "fits": fits,
        "tokens_per_second": rate,
        "estimated": speed.measured_at != block_size,
        "seconds_per_epoch": 3600 * hours / config.epochs if hours else None,
        "hours": hours,
        "price": hours * config.price_per_hour if hours and config.price_per_hour is not None else None,
    }


def _recommended(
    facts: DeviceFacts, memory: MemoryModel, block_size: int, config: PlanConfig, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The largest micro-batch that fits, for a step of `batch_tokens`; 0 where none does."""
    blocks_per_step = max(1, config.batch_tokens // block_size)
    size, step = best_step(memory, facts, block_size, blocks_per_step)
    planned = _as_planned(step, facts, memory)
    same = ("tokens_per_second", "estimated", "seconds_per_epoch", "hours", "price")
    return {
        "device": facts.name,
        "block_size": block_size,
        "micro_batch_size": size,
        "gradient_accumulation_steps": -(-blocks_per_step // size) if size else None,
        "memory_bytes": planned.total,
        "memory": asdict(planned),
        "fits": size > 0,
        **{name: rows[0][name] for name in same},
    }


def _device_values(facts: DeviceFacts) -> dict[str, Any]:
    return {
        "device": facts.name,
        "memory_bytes": facts.memory_bytes,
        "dtype": dtype_name(facts.dtype),
        "attention": facts.kernel,
        "peak_flops": facts.peak_flops,
        "expected_share_of_peak": facts.share,
    }


def _probed(
    config: PlanConfig, model: PretrainedConfig, facts: DeviceFacts, num_parameters: int, sizes: tuple[int, ...]
) -> _Speed | None:
    """What `_probe` measures; None where a step, which takes more than the states that were counted, does not fit."""
    try:
        return _probe(config, model, facts, num_parameters, sizes)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    log.warning("Memory ran out in the probe of this machine: its speed is estimated.")
    return None


def _probe(
    config: PlanConfig, model: PretrainedConfig, facts: DeviceFacts, num_parameters: int, sizes: tuple[int, ...]
) -> _Speed:
    """Take a few real steps on this machine; the speed at other block sizes follows from their operations a token."""
    device = choose_device("auto")
    tokens = PROBE_TOKENS.get(device.type, PROBE_TOKENS["cpu"])
    block_size = 512 if 512 in sizes else sizes[0]
    loaded = load_model(config.model, device)
    if config.gradient_checkpointing:
        checkpoint_layers(loaded.model)
    blocks = max(1, tokens // block_size)
    log.info("Probing this machine: %d steps of %s of %d tokens.", PROBE_STEPS, counted(blocks, "block"), block_size)
    ids = np.random.default_rng(0).integers(0, 256, (blocks * PROBE_STEPS + 1, block_size - 1))
    state = TrainingState.begin(loaded.model, facts.dtype, lr=1e-6, weight_decay=0.0)
    schedule = Schedule(PROBE_STEPS, 1e-6, warmup_fraction=0.0, final_lr_fraction=1.0)
    documents = PackedDocuments.from_ids(list(ids), prefix_id=0, end_id=0)
    sampler = BlockSampler(documents, block_size=block_size, blocks_per_step=blocks, seed=0)
    began = time.perf_counter()
    records = list(train_steps(state, sampler, schedule, StepSettings(facts.dtype, blocks)))
    rate = max(blocks * block_size / record.seconds for record in records[1:])
    log.info("%s tokens/s, in %.0f s.", f"{rate:,.0f}", time.perf_counter() - began)
    return _Speed(rate * flops_per_token(model, num_parameters, block_size), block_size)
