"""Setting up a run: everything that can be wrong is named here, before anything is computed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from cartilha.blocks.mixing import MixtureSampler
from cartilha.blocks.sampler import BlockSampler
from cartilha.config import GenerateConfig, TrainConfig
from cartilha.errors import UserError, counted, first_line, log
from cartilha.evaluation.documents import ScoredDocuments, encode_documents, validation_subset
from cartilha.evaluation.scorer import Scorer, make_scorer
from cartilha.machine.devices import choose_device, choose_dtype, dtype_name, seed_everything
from cartilha.machine.memory import free_memory_bytes
from cartilha.machine.processes import from_rank_0, gather_objects, is_main_process, world
from cartilha.model.adapters import adapter_of
from cartilha.model.configuration import context_length, model_config
from cartilha.model.load import LoadedModel, load_model, load_with_adapter, look_at, weights_hash
from cartilha.model.longer_context import LongerContext
from cartilha.model.recomputation import checkpoint_layers
from cartilha.model.sharding import is_sharded
from cartilha.model_reference import check_4_bits
from cartilha.runs.decay import SET_BY_DECAY
from cartilha.runs.files import read_results, read_status
from cartilha.runs.sharing import is_to_be_sharded, share_out
from cartilha.runs.sources import Mix, identities, sources_of
from cartilha.runs.step_plan import RunPlan, StepShape, plan_run, refuse_beyond_context, this_machine
from cartilha.runs.validation_times import ValidationTimes
from cartilha.tokens.store import TokenStore, tokenizer_for
from cartilha.tokens.store_checks import read_store_info
from cartilha.tokens.tokenizer import TextTokenizer
from cartilha.training.checkpoint import (
    check_settings,
    load_checkpoint,
    newest_sound_checkpoint,
    read_settings,
    refuse_if_dropped,
    remove_older,
    space_needed,
)
from cartilha.training.device_facts import GIB, DeviceFacts
from cartilha.training.distributed import share_state
from cartilha.training.memory import check_states_fit
from cartilha.training.optimizer import StateSize, resolve_batch_tokens, resolve_lr
from cartilha.training.profiles import Profile, fullest_fit, profiles
from cartilha.training.schedule import Schedule
from cartilha.training.state import TrainingState
from cartilha.training.update_rules import check_lean, resolve_optimizer
from cartilha.units import parse_amount, parse_duration, parse_share


@dataclass
class Run:
    """Everything that one run works with, put together once."""

    config: TrainConfig
    path: Path
    store: TokenStore
    scorer: Scorer
    sampler: BlockSampler
    schedule: Schedule
    plan: RunPlan
    state: TrainingState
    validation: ScoredDocuments
    prompts: GenerateConfig
    settings: dict[str, Any]
    mix: Mix | None = None  # where the run reads more than its store

    @property
    def loaded(self) -> LoadedModel:
        """The model that is trained."""
        return self.scorer.loaded

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.state.progress.step

    @property
    def sources(self) -> dict[str, Any]:
        """What was read of each source of a mixture so far, for the run's record; empty where nothing is mixed."""
        if self.mix is None:
            return {}
        assert isinstance(self.sampler, MixtureSampler)
        return {"sources": self.mix.rows(self.sampler, self.step)}

    @cached_property
    def validation_times(self) -> ValidationTimes:
        """After which steps the run is validated."""
        return ValidationTimes.of(self.config.validate_every, self.sampler.targets_per_epoch)

    @property
    def disk_space(self) -> tuple[int, int]:
        """Bytes that the run's files still need at most, and bytes of one checkpoint."""
        keep, dtype = self.config.keep_last, getattr(torch, self.config.save_dtype)
        return space_needed(self.plan.size, self.path, keep=keep, weight_bytes=dtype.itemsize)


def is_finished_as_asked(config: TrainConfig, path: Path) -> bool:
    """Whether the run is finished and nothing is left to do; what a resume would refuse is refused without loading.

    A UserError names the settings that differ from those it is finished with, or says that results.json is damaged.
    """
    if read_status(path) != "finished":
        return False
    results = read_results(path)
    try:
        recorded = _recorded(results["settings"]) | {"store": results["corpus"]["train_hash"]}
        config = _begun_with(config, recorded)
        schedule = _schedule(config, recorded["num_parameters"], results["packing"]["steps_per_epoch"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}/results.json is damaged ({error!r} in it); train into another --output.") from error
    current = _asked(config, schedule)
    for name in ("dtype", "memory"):
        if getattr(config, name) != "auto":
            current[name] = getattr(config, name)
    if (Path(config.store) / "store.json").is_file():  # it may have been removed since
        current["store"] = read_store_info(Path(config.store))["splits"]["train"]["corpus_hash"]
    if config.allow_changes and any(recorded.get(name) != value for name, value in current.items()):
        refuse_if_dropped(path)
        return False
    check_settings(recorded, current, path)
    return True


def _schedule(config: TrainConfig, num_parameters: int, steps_per_epoch: int) -> Schedule:
    kind = {"of_adapter": config.lora is not None, "is_fresh": config.model.startswith("random:")}
    lr = resolve_lr(config.lr, num_parameters, config.batch_tokens, **kind)
    return Schedule(
        num_steps=_num_steps(config, steps_per_epoch),
        peak_lr=lr,
        warmup_fraction=config.warmup_fraction,
        final_lr_fraction=config.final_lr_fraction,
        time_budget_s=parse_duration(config.time_budget),
        embeddings_first=parse_share(config.embeddings_first, "embeddings_first"),
        embeddings_lr=lr if config.embeddings_lr == "auto" else config.embeddings_lr,
        shape=config.schedule,
    )


def _recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run began with; an option that did not exist then had its default of then."""
    return {**TrainConfig().deciding_values(), "memory": "full", "optimizer": "adamw", **settings}


def _num_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    return config.max_steps or config.epochs * steps_per_epoch


def _begun_with(config: TrainConfig, recorded: dict[str, Any]) -> TrainConfig:
    """The configuration in which `auto` is what the run began with; tokens per step only if its blocks are as long."""
    names = ["optimizer", "lr", "memory"] if recorded else []
    if recorded.get("block_size") == config.block_size:
        names.append("batch_tokens")
    config = replace(config, **{name: recorded[name] for name in names if getattr(config, name) == "auto"})
    if config.memory == "lean":
        check_lean(config.optimizer)
    return config


def _asked(config: TrainConfig, schedule: Schedule) -> dict[str, Any]:
    """The settings that a resume must find unchanged, as far as model and text do not decide them."""
    resolved = ("num_steps", "time_budget_s", "embeddings_first", "embeddings_lr")
    asked = config.deciding_values() | {name: getattr(schedule, name) for name in resolved}
    for name in ("time_budget", "mix", "mix_end"):
        del asked[name]
    if config.validate_every is not None:  # however it is written
        asked["validate_every"] = parse_amount(config.validate_every, "--validate_every")
    return {**asked, **identities(config), "lr": schedule.peak_lr}


def assemble(config: TrainConfig, path: Path, prompts: GenerateConfig, resume: bool) -> Run:
    """Open the store, load the model, check that they fit, and restore the checkpoint if the run is to go on."""
    store = TokenStore(config.store)
    tokenizer = tokenizer_for(config.model, store)
    if tokenizer.fingerprint != store.fingerprint:
        raise UserError(
            f"The store {store.path} was made with another tokenizer than that of {config.model}; "
            f"prepare one with: cartilha prepare --model {config.model} --input FILE --output STORE"
        )
    device = choose_device(config.device)
    # Of several processes the first looks for the checkpoint and reads it; those of a sharded model all read it.
    checkpoint = from_rank_0(newest_sound_checkpoint(path) if resume and is_main_process() else None)
    recorded = from_rank_0(_recorded(read_settings(checkpoint)) if checkpoint and is_main_process() else {})
    # A resumed run keeps its compute dtype and what else `auto` chose: it might choose otherwise on another machine.
    dtype = choose_dtype(recorded.get("dtype", "auto") if config.dtype == "auto" else config.dtype, device)
    config = _begun_with(config, recorded)
    batch_tokens = from_rank_0(resolve_batch_tokens(config.batch_tokens, config.block_size, device.type))
    config = replace(config, batch_tokens=batch_tokens, optimizer=resolve_optimizer(config.optimizer, batch_tokens))
    seed_everything(config.seed)
    shape, share = _configuration(config, tokenizer), -(-batch_tokens // config.block_size // world()[1])
    profile = from_rank_0(_profile(config, shape, this_machine(device, dtype), share))
    config = replace(config, memory=profile.memory, gradient_checkpointing=profile.checkpointing)
    dtype = torch.bfloat16 if profile.in_half and dtype == torch.float32 else dtype
    sharded = is_to_be_sharded(config, profile, shape, device, dtype)
    loaded = _load(config, profile, tokenizer, device, sharded=sharded)
    scorer = make_scorer(loaded, tokenizer, dtype, window=config.context)  # a longer context is seen as a whole
    mix, sampler = _text(config, store, batch_tokens)
    schedule = _schedule(config, loaded.num_parameters, sampler.steps_per_epoch)
    settings = {
        **_asked(config, schedule),
        "weights": loaded.base_hash or weights_hash(loaded.model),
        "store": store.info["splits"]["train"]["corpus_hash"],
        "validation": store.info["splits"]["validation"]["corpus_hash"],
        "tokenizer": store.fingerprint,
        "dtype": dtype_name(dtype),
        "memory": profile.memory,
    }
    if sharded:
        share_out(loaded.model, path, device, dtype)
    rates = {"lr": schedule.peak_lr, "weight_decay": config.weight_decay}
    state = TrainingState.begin(loaded.model, dtype, **rates, optimizer=config.optimizer)
    if checkpoint is not None:
        if recorded["decay_from"] is None:  # the checkpoint of the run that this one decays from
            recorded |= {name: settings[name] for name in SET_BY_DECAY if config.decay_from and name in settings}
        check_settings(recorded, settings, path, allow_changes=config.allow_changes)
        if sharded or is_main_process():
            load_checkpoint(checkpoint, state)
        if is_main_process():
            if state.progress.step < schedule.num_steps:
                refuse_if_dropped(path)
            remove_older(checkpoint, config.keep_last)  # a kill can come between writing and removing
        log.info("Going on from step %d (%s).", state.progress.step, checkpoint)
    share_state(state, config.seed)
    if not prompts.prompt:
        prompts = replace(prompts, prompt=tuple(store.language["prompts"]))
    held_out = list(store.read_documents("validation"))
    chosen = validation_subset(held_out, store.documents("validation").num_tokens.tolist(), config.validation_tokens)
    validation = encode_documents(chosen, tokenizer)
    plan = _plan(config, scorer, sampler, schedule, state.progress.micro_batch_size)
    return Run(config, path, store, scorer, sampler, schedule, plan, state, validation, prompts, settings, mix)


def _text(config: TrainConfig, store: TokenStore, batch_tokens: int) -> tuple[Mix | None, BlockSampler]:
    """What is read, and the blocks of each step of it."""
    size, blocks = config.block_size, batch_tokens // config.block_size
    sources = sources_of(config)
    if not sources:
        return None, BlockSampler(store.packed("train"), block_size=size, blocks_per_step=blocks, seed=config.seed)
    mix = Mix.open(sources, store)
    if config.mix_end:
        num_steps = _num_steps(config, -(-mix.documents.epoch_size // batch_tokens))
        mix = mix.ending(num_steps, config.mix_end_fraction, batch_tokens)
    return mix, MixtureSampler(mix.documents, block_size=size, blocks_per_step=blocks, seed=config.seed)


def _configuration(config: TrainConfig, tokenizer: TextTokenizer) -> PretrainedConfig:
    """The model's, with the context that it is trained for; a UserError says that a block is longer."""
    found, context = model_config(config.model, tokenizer), LongerContext.of(config)
    shape = found if context is None else context.applied(found, config.model)
    refuse_beyond_context(config.block_size, context_length(shape), config.model)
    return shape


def _profile(config: TrainConfig, shape: PretrainedConfig, machine: DeviceFacts, share: int) -> Profile:
    """How the weights are kept: what `--memory` says, or the fullest profile that fits this machine.

    `share` is this process's blocks per step. Of several processes, `auto` keeps float32 weights, which are sharded if
    need be.
    """
    candidates = profiles(config, recomputes=look_at(shape, config.model).recomputes)
    if len(candidates) == 1 or (config.memory == "auto" and world()[1] > 1):
        return candidates[0]
    facts = machine.for_model(shape, dropout=config.dropout)
    try:
        found = fullest_fit(candidates, shape, facts, config.optimizer, (config.block_size, share))
    except Exception as error:  # an architecture may do something that tensors without contents cannot follow
        log.info("Which memory profile fits could not be planned (%s).", first_line(error))
        return candidates[0]
    if found.profile != candidates[0]:
        log.warning(
            "Training with %s does not fit here: it goes on with %s (%.1f GiB planned, %.1f GiB there).",
            *(candidates[0].options, found.profile.options),
            *(found.step.total / GIB, facts.memory_bytes / GIB),
        )
    return found.profile


def _load(
    config: TrainConfig, profile: Profile, tokenizer: TextTokenizer, device: torch.device, *, sharded: bool
) -> LoadedModel:
    """The model as it is trained; one that cannot fit is refused before its weights take memory.

    One that is to be sharded is loaded into the host's memory.
    """
    adapter = profile.adapter
    if adapter is not None and adapter.base == "4bit":
        check_4_bits(device.type)
    size = profile.size(_configuration(config, tokenizer), config.optimizer)
    place = "this machine" if device.type == "cpu" else f"this machine's {device.type} device"
    check_states_fit(size, free_memory_bytes(device), config.model, place, shares=world()[1] if sharded else 1)
    where, how = torch.device("cpu") if sharded else device, dict[str, Any](tokenizer=tokenizer, seed=config.seed)
    if adapter is not None:
        loaded = load_with_adapter(config.model, where, adapter, **how)
    else:
        how |= {"dtype": profile.weights, "context": LongerContext.of(config)}
        loaded = load_model(config.model, where, **how)
    loaded.model.train(config.dropout)
    if profile.checkpointing:
        checkpoint_layers(loaded.model)
    return loaded


def check_space(run: Run) -> None:
    """Refuse, with a UserError, a run that the disk cannot hold."""
    needed, checkpoint = run.disk_space
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise UserError(
            f"The disk of {run.path} has {free / 1e9:.2f} GB left, and the run may need {needed / 1e9:.2f} GB (a "
            f"checkpoint is {checkpoint / 1e9:.2f} GB); free some space or name another --output."
        )


def _plan(config: TrainConfig, scorer: Scorer, sampler: BlockSampler, schedule: Schedule, in_force: int) -> RunPlan:
    """The run's plan; a resumed run keeps its micro-batch in force (0: none yet), since another rounds otherwise."""
    num_ranks, blocks_per_step = world()[1], sampler.blocks_per_step
    sharded = is_sharded(scorer.loaded.model)
    if num_ranks > blocks_per_step:
        log.warning(
            "%d processes share steps of %s, so that some have nothing to do; use a larger --batch_tokens.",
            *(num_ranks, counted(blocks_per_step, "block")),
        )
    share = -(-blocks_per_step // num_ranks)
    asked = min(in_force, share) if in_force else None
    if config.micro_batch_size != "auto":
        asked = min(config.micro_batch_size, asked or share)
    loaded = scorer.loaded
    machine = this_machine(loaded.model.device, scorer.dtype)
    adapter = adapter_of(loaded.model)
    shape = StepShape(
        *(config.block_size, share, asked, config.gradient_checkpointing, config.dropout, adapter),
        shares=num_ranks if sharded else 1,
    )
    size = StateSize.of(loaded.model, config.optimizer, loaded.others["bytes"] if loaded.others else 0)
    plan = plan_run(loaded.model.config, machine, size, shape)
    if sharded:  # all processes run the same passes
        return replace(plan, micro_batch_size=min(gather_objects(plan.micro_batch_size)))
    if not machine.is_host or not is_main_process():  # a card's copy is in the host; the first process writes
        return plan
    by_clock = 60 * config.checkpoint_minutes * num_ranks * plan.tokens_per_second / sampler.tokens_per_step
    # Training goes on beside a checkpoint unless it is the last one, which needs no copy.
    by_validation = (
        sampler.steps_per_epoch / ValidationTimes.of(config.validate_every, sampler.targets_per_epoch).per_epoch
    )
    intervals = [by_validation, config.checkpoint_steps, by_clock]
    return plan.with_checkpoints() if any(n and n < schedule.num_steps for n in intervals) else plan
