"""`plan`: what training a model takes in memory, time and money, on this machine and on cards that one might rent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from cartilha.config import PlanConfig
from cartilha.errors import UserError, counted, log
from cartilha.machine.devices import choose_device, choose_dtype, dtype_name
from cartilha.machine.memory import is_out_of_memory
from cartilha.model.configuration import context_length, whole_config
from cartilha.model.load import look_at
from cartilha.model.parts import count_other_parameters, text_config
from cartilha.pipeline.expectation import expect
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.probe import probe
from cartilha.reporting.notebook import plan_html
from cartilha.runs.sharing import why_whole
from cartilha.runs.sources import Mix
from cartilha.runs.step_plan import refuse_beyond_context, this_machine, with_copy
from cartilha.tokens.store import TokenStore
from cartilha.training.checkpoint import space_needed
from cartilha.training.device_facts import (
    GIB,
    KNOWN_DEVICES,
    DeviceFacts,
    flops_per_token,
    parameter_flops,
    utilization,
)
from cartilha.training.memory import SAFETY, MemoryModel, StepMemory, best_step, check_states_fit, show_count
from cartilha.training.optimizer import StateSize, resolve_batch_tokens
from cartilha.training.profiles import Fit, Profile, fit, profiles
from cartilha.training.update_rules import resolve_optimizer
from cartilha.units import parse_duration

BLOCK_SIZES = (256, 512, 1024, 2048)
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
THIS_MACHINE = "this machine"


@dataclass(frozen=True)
class PlanResult:
    """The plan as plain values; its `rows` has one for each device, block size and micro-batch."""

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The plan."""
        return self.values

    def _repr_html_(self) -> str:
        """Notebooks show what is recommended."""
        return plan_html(self.values)


@dataclass(frozen=True)
class _Planned:
    """A device to plan for, and what the training takes on it."""

    config: PlanConfig
    model: PretrainedConfig
    facts: DeviceFacts
    memory: MemoryModel
    tokens: int | None  # of all epochs; None without a store
    profile: Profile
    flops: float  # operations per second, measured or expected; the speed at each block size follows from it
    fits: Sequence[Fit]  # how the profiles fit that were asked for, the fullest first
    measured_at: int | None = None  # block size of the measurement; None where the speed is expected

    @property
    def label(self) -> str:
        """The device as tables name it: `h100/8` is one of eight that share out a model."""
        return f"{self.facts.name}/{self.memory.shares}" if self.memory.shares > 1 else self.facts.name

    def blocks(self, block_size: int) -> tuple[int, int]:
        """Blocks per step, and those of the card that has most of them."""
        blocks = max(1, self.batch_tokens(block_size) // block_size)
        return blocks, -(-blocks // self.config.gpus)

    def batch_tokens(self, block_size: int) -> int:
        """Tokens per step there."""
        return resolve_batch_tokens(self.config.batch_tokens, block_size, self.facts.kind)

    def row(self, block_size: int, size: int) -> dict[str, Any]:
        """The figures of one micro-batch size."""
        config, memory = self.config, self._memory_at(block_size)
        blocks, share = self.blocks(block_size)
        step = memory.step(size, block_size, accumulates=size < share)
        fits = step.total <= SAFETY * self.facts.memory_bytes
        # Layers that are computed twice take another forward pass: 8 operations instead of 6.
        twice = 4 / 3 if self.profile.checkpointing and self.measured_at is None else 1.0
        flops_each = _flops(self.model, self.memory.size, block_size)
        # All wait for the card that has most blocks. What the cards send to each other is not counted.
        rate = self.flops * blocks / share / flops_each / twice if fits else None
        of_parameters = parameter_flops(self.memory.size.num_active_parameters, self.memory.size.num_frozen_active)
        used = utilization(self.facts, (rate or 0.0) / config.gpus, flops_each, of_parameters)
        hours = self.tokens / rate / 3600 if self.tokens and rate else None
        return {
            "device": self.label,
            "gpus": config.gpus,
            "sharded": self.memory.shares > 1,
            "block_size": block_size,
            "micro_batch_size": size,
            "profile": self.profile.name,
            **self._memory(memory, step),
            "fits": fits,
            "tokens_per_second": rate,
            "estimated": self.measured_at != block_size,
            **{name: used[name] if rate else None for name in ("mfu", "mfu_without_attention")},
            "seconds_per_epoch": 3600 * hours / config.epochs if hours else None,
            "hours": hours,
            "price": hours * config.gpus * config.price_per_hour
            if hours and config.price_per_hour is not None
            else None,
        }

    def recommended(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with the largest micro-batch that fits, for a step of `batch_tokens`; 0 if none fits."""
        blocks, share = self.blocks(row["block_size"])
        memory = self._memory_at(row["block_size"])
        size, step = best_step(memory, self.facts, row["block_size"], share)
        return row | {
            "batch_tokens": blocks * row["block_size"],
            "micro_batch_size": size,
            "gradient_accumulation_steps": -(-share // size) if size else None,
            **self._memory(memory, step),
            "fits": size > 0,
        }

    @cached_property
    def _in_large_steps(self) -> MemoryModel:
        return self.memory.with_size(self.profile.size(self.model, "adamw"))

    def _memory_at(self, block_size: int) -> MemoryModel:
        """The memory of steps of such blocks, whose tokens may decide the optimizer."""
        optimizer = resolve_optimizer(self.config.optimizer, self.batch_tokens(block_size))
        return self.memory if optimizer == self.memory.size.optimizer else self._in_large_steps

    def _memory(self, memory: MemoryModel, step: StepMemory) -> dict[str, Any]:
        step = _with_copy(step, self.facts, memory.size, self.memory.shares)
        return {"memory_bytes": step.total, "memory": asdict(step)}


def _with_copy(step: StepMemory, facts: DeviceFacts, size: StateSize, shares: int) -> StepMemory:
    """With the copy of the state that exists while a checkpoint is written, as `train` plans longer runs."""
    return (with_copy(step, facts, size) or step) if facts.is_host and shares == 1 else step


def _to_read(config: PlanConfig, store: TokenStore | None) -> tuple[int | None, list[dict[str, Any]]]:
    """The tokens of all epochs, None without a store, and what they are of each source of a mixture."""
    if store is None:
        return None, []
    if config.mix:
        mix = Mix.of(config.mix, store)
        tokens = config.epochs * mix.documents.epoch_size
        return tokens, mix.planned(tokens)
    counts = store.counts["train"]
    return config.epochs * (counts.num_tokens + counts.num_documents), []


def _devices(config: PlanConfig) -> list[str]:
    """The devices that were asked for, else all; several cards are planned for cards alone."""
    usual = ["auto", *KNOWN_DEVICES]
    if config.gpus > 1:
        usual = [name for name, known in KNOWN_DEVICES.items() if not known.is_host]
    return list(dict.fromkeys(config.device or usual))


def plan(config: PlanConfig) -> PlanResult:
    """Plan the training of a model; a UserError refuses too long a block, or a model that fits nowhere."""
    preflight(config)
    store = TokenStore(config.store) if config.store else None
    whole = whole_config(config.model, store.tokenizer() if store and config.model.startswith("random:") else None)
    model = text_config(whole)
    sizes = _block_sizes(config, context_length(model))
    seen = look_at(model, config.model)
    tokens, sources = _to_read(config, store)
    ways = _ways(config, model, profiles(config, recomputes=seen.recomputes))
    devices: list[_Planned] = []
    lines: list[dict[str, Any]] = []
    for facts in map(_facts, _devices(config)):
        facts = facts.for_model(model)
        fits = _fits(config, whole, facts, ways, 512 if 512 in sizes else sizes[0])
        lines += _profile_lines(config, facts, fits)
        for shares in sorted({shares for _, shares in ways}):
            alike = [found for found in fits if found.shares == shares]
            devices.append(_with_profile(config, model, facts, tokens, alike))
    states = max((device.fits[0].size for device in devices), key=lambda size: size.training_bytes)
    _refuse_what_fits_nowhere(config.model, devices)
    expected = expect(config) if config.expect else None
    if not config.skip_probe:
        devices = [_probed(device, sizes) if device.facts.name == THIS_MACHINE else device for device in devices]
    rows, recommended = [], []
    for device in devices:
        for block_size in sizes:
            of_size = [device.row(block_size, size) for size in MICRO_BATCH_SIZES]
            rows += of_size
            recommended.append(device.recommended(of_size[0]))
    return PlanResult(
        {
            "model": config.model,
            "num_parameters": states.num_parameters,
            "num_trained": states.num_trained,
            "num_active_parameters": states.num_active_parameters,
            "num_other_parameters": count_other_parameters(whole),
            "optimizer": states.optimizer,
            "memory": config.memory,
            "context_length": context_length(model),
            "runs": seen.line,
            "state_bytes": states.training_bytes,
            "flops_per_token": {str(size): _flops(model, states, size) for size in sizes},
            "batch_tokens": config.batch_tokens,
            "epochs": config.epochs,
            "train_tokens": tokens,
            "sources": sources,
            "checkpoint_bytes": states.checkpoint_bytes,
            "disk_bytes": space_needed(states)[0],
            "gpus": config.gpus,
            "devices": [_device_values(device) for device in devices],
            "recommended": recommended,
            "profiles": lines,
            "rows": rows,
            "expected": expected,
        }
    )


def tokens_in(model: str, duration: str) -> int:
    """How many tokens this machine trains a model on in a time such as `1h30m`, by the speed of a few steps."""
    found = plan(PlanConfig(model=model, device=("auto",))).to_dict()["rows"]
    rates = [row["tokens_per_second"] for row in found if row["tokens_per_second"] and not row["estimated"]]
    if not rates:
        raise UserError(f"The speed of {model} cannot be measured here; give --select_tokens instead.")
    seconds = parse_duration(duration)
    assert seconds is not None
    log.info("At %s tokens/s, %s are %s.", f"{rates[0]:,.0f}", duration, counted(int(rates[0] * seconds), "token"))
    return int(rates[0] * seconds)


def _block_sizes(config: PlanConfig, longest: int) -> tuple[int, ...]:
    if config.block_size is None:
        return tuple(size for size in BLOCK_SIZES if size <= longest) or (longest,)
    refuse_beyond_context(config.block_size, longest, config.model)
    return (config.block_size,)


def _facts(name: str) -> DeviceFacts:
    """A known card by its name, or this machine (`auto`)."""
    if name != "auto":
        return KNOWN_DEVICES[name]
    device = choose_device("auto")
    return replace(this_machine(device, choose_dtype("auto", device)), name=THIS_MACHINE)


def _ways(config: PlanConfig, model: PretrainedConfig, asked: Sequence[Profile]) -> list[tuple[Profile, int]]:
    """The profiles, and how many cards share out the model with each of them; the fullest first."""
    ways = [(profile, 1) for profile in asked]
    if config.gpus > 1:
        ways += [(profile, config.gpus) for profile in asked if why_whole(config, profile, model) is None]
    return sorted(ways, key=lambda way: way[0].lean)


def _fits(
    config: PlanConfig,
    model: PretrainedConfig,
    facts: DeviceFacts,
    ways: Sequence[tuple[Profile, int]],
    block_size: int,
) -> list[Fit]:
    """How each of the profiles fits a device."""
    batch_tokens = resolve_batch_tokens(config.batch_tokens, block_size, facts.kind)
    shape = block_size, -(-max(1, batch_tokens // block_size) // config.gpus)
    optimizer = resolve_optimizer(config.optimizer, batch_tokens)
    return [fit(profile, model, facts, optimizer, shape, shares) for profile, shares in ways]


def _with_profile(
    config: PlanConfig, model: PretrainedConfig, facts: DeviceFacts, tokens: int | None, fits: Sequence[Fit]
) -> _Planned:
    """A device with the fullest profile that fits it."""
    chosen = next((found for found in fits if found.micro_batch_size), fits[0])
    how = chosen.profile.computation(facts)
    memory = MemoryModel(model, how, overhead_bytes=facts.overhead_bytes, size=chosen.size, shares=chosen.shares)
    return _Planned(config, model, facts, memory, tokens, chosen.profile, facts.peak_flops * facts.share, fits)


def _flops(model: PretrainedConfig, states: StateSize, block_size: int) -> int:
    return flops_per_token(model, states.num_active_parameters, block_size, states.num_frozen_active)


def _profile_lines(config: PlanConfig, facts: DeviceFacts, fits: Sequence[Fit]) -> list[dict[str, Any]]:
    """What each profile takes on a device, and for one that does not fit what would."""
    that_fits = next((found for found in fits if found.micro_batch_size), None)
    lines = []
    for found in fits:
        remedy = None
        if not found.micro_batch_size:
            remedy = f"use {that_fits.options}" if that_fits else _elsewhere(config, found)
        lines.append(
            {
                "device": f"{facts.name}/{found.shares}" if found.shares > 1 else facts.name,
                "profile": found.profile.name,
                "block_size": found.block_size,
                "micro_batch_size": found.micro_batch_size,
                "bytes_per_parameter": found.size.training_bytes / found.size.num_parameters / found.shares,
                "memory_bytes": _with_copy(found.step, facts, found.size, found.shares).total,
                "fits": found.micro_batch_size > 0,
                "remedy": remedy,
            }
        )
    return lines


def _elsewhere(config: PlanConfig, found: Fit) -> str:
    """The smallest known card that holds what does not fit, or what else there is where no way fits a device."""
    needed, size = found.step.total, found.size
    if size.optimizer == "rmsprop" and config.optimizer == "auto":  # a card's larger steps take AdamW
        needed += (1 if size.is_lean else 4) * size.num_trained
    cards = [card for card in KNOWN_DEVICES.values() if card.kind == "cuda" and needed <= SAFETY * card.memory_bytes]
    fitting = sorted((round(card.memory_bytes / GIB), card.name) for card in cards)
    if fitting:
        return f"use a larger card ({fitting[0][1]})"
    adapter = " or --lora with --lora_base" if config.lora is None else ""
    return f"use {'several' if config.gpus == 1 else 'more'} cards (--gpus){adapter}"


def _refuse_what_fits_nowhere(model: str, devices: list[_Planned]) -> None:
    """Refuse a model whose states are too large for every device; name the devices that are too small."""

    def states_of(device: _Planned) -> StateSize:
        return device.fits[-1].size if device.memory.shares == 1 else device.memory.size

    def states_each(device: _Planned) -> float:
        return states_of(device).training_bytes / device.memory.shares

    too_small = [device for device in devices if states_each(device) > device.facts.memory_bytes]
    if len(too_small) == len(devices):
        most = max(devices, key=lambda device: device.facts.memory_bytes * device.memory.shares)
        check_states_fit(states_of(most), most.facts.memory_bytes, model, most.label, shares=most.memory.shares)
    for device in too_small:
        log.info(
            "%s (%s parameters) cannot be trained on %s: %.1f GiB of states, %.1f GiB of memory.",
            *(model, show_count(device.memory.size.num_parameters), device.label),
            *(states_each(device) / GIB, device.facts.memory_bytes / GIB),
        )


def _device_values(device: _Planned) -> dict[str, Any]:
    facts = device.facts
    return {
        "device": device.label,
        "memory_bytes": facts.memory_bytes,
        "optimizer": device.memory.size.optimizer,
        "state_bytes": device.fits[0].size.training_bytes,
        "dtype": dtype_name(facts.dtype),
        "attention": facts.kernel,
        "peak_flops": facts.peak_flops,
        "sheet_flops": facts.sheet_flops,
        "expected_share_of_peak": facts.share,
        "keeps_freed_memory": facts.is_host and (device.memory.size.saves_memory or device.profile.checkpointing),
    }


def _probed(device: _Planned, sizes: tuple[int, ...]) -> _Planned:
    """The device with its speed measured; without, if the states or a step do not fit."""
    if device.memory.shares > 1 or device.memory.size.training_bytes >= device.facts.memory_bytes:
        return device
    try:
        block_size = 512 if 512 in sizes else sizes[0]
        rate = probe(device.config.model, device.profile, device.memory, block_size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        log.warning("Memory ran out in the probe of this machine: its speed is estimated.")
        return device
    return replace(device, flops=rate * _flops(device.model, device.memory.size, block_size), measured_at=block_size)
