"""`train`: continued training of a model on a store, validated before step 1 and after every epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cartilha.blocks.sampler import BlockSampler
from cartilha.config import GenerateConfig, TrainConfig
from cartilha.console import progress as show_progress
from cartilha.errors import InterruptedRunError, OutOfMemoryError, UserError
from cartilha.evaluation.continuation import continue_prompts
from cartilha.evaluation.documents import ScoredDocuments, encode_documents, validation_subset
from cartilha.evaluation.measures import Evaluation
from cartilha.evaluation.windows import Protocol, make_protocol
from cartilha.model.load import LoadedModel, load_model
from cartilha.pipeline.evaluate import evaluate_loaded
from cartilha.pipeline.model_card import model_card
from cartilha.pipeline.run_files import (
    NoticeCollector,
    RunRecord,
    add_samples,
    check_output,
    read_results,
    read_status,
    write_config,
)
from cartilha.runtime import (
    choose_device,
    choose_dtype,
    describe_machine,
    free_memory_bytes,
    new_directory,
    peak_memory_bytes,
    seed_everything,
    versions,
    write_atomically,
)
from cartilha.tokens.store import TokenStore, read_store_info
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer
from cartilha.training.checkpoint import (
    TrainingState,
    check_settings,
    load_checkpoint,
    newest_sound_checkpoint,
    read_settings,
    save_checkpoint,
)
from cartilha.training.hooks import EpochLoss, MetricsFile, StopRequest, listening_for_stop
from cartilha.training.loop import Progress, Schedule, StepRecord, train_steps
from cartilha.training.memory import plan_micro_batch
from cartilha.training.optimizer import make_optimizer, resolve_lr

log = logging.getLogger("cartilha")


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        run: Its directory.
        results: The contents of results.json.
        was_finished: Whether it had been finished before (`--resume auto` does nothing then).
    """

    run: str
    results: dict[str, Any]
    was_finished: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {"run": self.run, "was_finished": self.was_finished, **self.results}


@dataclass
class _Run:
    """Everything that one run works with, put together once."""

    config: TrainConfig
    path: Path
    store: TokenStore
    tokenizer: TextTokenizer
    loaded: LoadedModel
    dtype: torch.dtype
    sampler: BlockSampler
    schedule: Schedule
    micro_batch_size: int
    state: TrainingState
    protocol: Protocol
    validation: ScoredDocuments
    prompts: GenerateConfig
    settings: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state.progress.step

    @property
    def num_epochs_done(self) -> int:
        return self.step // self.sampler.steps_per_epoch


def train(config: TrainConfig, *, prompts: GenerateConfig | None = None) -> TrainResult:
    """Train and leave the run's files in `config.output`.

    Args:
        config: What to train on what, and how.
        prompts: Prompts that the model continues before and after; by default the default prompt.

    Raises:
        UserError: Settings that cannot work, named before anything is computed.
        OutOfMemoryError: The device's memory did not suffice; the run is recorded so.
        InterruptedRunError: Asked to stop; a checkpoint is saved.
    """
    path = Path(config.output)
    resume = config.resume == "auto"
    _check(config)
    check_output(path, resume)
    if resume and read_status(path) == "finished":
        _check_finished(config, path)
        log.info("The run %s is finished: nothing to do.", path)
        return TrainResult(str(path), read_results(path), True)
    with _collecting_notices() as notices:
        run = _assemble(config, path, prompts or GenerateConfig(), resume)
        path.mkdir(parents=True, exist_ok=True)
        write_config(path, config)
        facts = _facts(run)
        record = RunRecord.resume(path, run.step, facts) if run.step else RunRecord.begin(path, facts)
        record.update()
        with _recording_failures(record, notices), listening_for_stop() as stop:
            _train(run, record, notices, stop)
    return TrainResult(str(path), record.values, False)


def _check(config: TrainConfig) -> None:
    """Mistakes that can be named without loading anything."""
    if not config.store or not config.output:
        raise UserError("Training needs --store STORE and --output RUN.")
    if config.block_size < 2:
        raise UserError(f"A block size of {config.block_size} is too small; use 2 or more, 512 as a rule.")
    if config.batch_tokens < config.block_size or config.batch_tokens % config.block_size:
        lower = max(1, config.batch_tokens // config.block_size) * config.block_size
        raise UserError(
            f"batch_tokens ({config.batch_tokens}) must be a multiple of block_size ({config.block_size}); "
            f"use --batch_tokens {lower}."
        )
    smallest = {"epochs": 1, "max_steps": 1, "checkpoint_steps": 1, "validation_tokens": 1, "weight_decay": 0}
    for name, least in smallest.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise UserError(f"{name} must be {least} or more, not {value}.")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"The seed must lie between 0 and 2**63 - 1, not {config.seed}.")
    if not config.max_grad_norm > 0:
        raise UserError(f"max_grad_norm must be above 0, not {config.max_grad_norm}; use a large one to clip nothing.")
    if config.micro_batch_size != "auto" and config.micro_batch_size < 1:
        raise UserError(f"micro_batch_size must be 1 or more, or auto, not {config.micro_batch_size}.")
    if config.lr != "auto" and not 0 < config.lr < math.inf:
        raise UserError(f"The learning rate must be a number above 0, not {config.lr}.")
    if not 0 <= config.warmup_fraction <= 1 or not 0 <= config.final_lr_fraction <= 1:
        raise UserError("warmup_fraction and final_lr_fraction must lie between 0 and 1.")


def _check_finished(config: TrainConfig, path: Path) -> None:
    """Refuse to pass off a finished run as one of other settings; what a resume would refuse, without loading anything.

    Raises:
        UserError: Naming what differs.
    """
    results = read_results(path)
    recorded = {**results["settings"], "store": results["corpus"]["train_hash"]}
    asked = ["model", "block_size", "batch_tokens", "warmup_fraction", "final_lr_fraction"]
    asked += ["weight_decay", "max_grad_norm", "dropout", "seed"]
    current = {name: getattr(config, name) for name in asked}
    current["lr"] = resolve_lr(config.lr, recorded["num_parameters"])
    current["num_steps"] = config.max_steps or config.epochs * results["packing"]["steps_per_epoch"]
    if config.dtype != "auto":
        current["dtype"] = config.dtype
    if (Path(config.store) / "store.json").is_file():  # it may have been removed since
        current["store"] = read_store_info(Path(config.store))["splits"]["train"]["corpus_hash"]
    check_settings(recorded, current, path)


def _assemble(config: TrainConfig, path: Path, prompts: GenerateConfig, resume: bool) -> _Run:
    """Open the store, load the model, check that they fit, and restore the checkpoint if the run is to go on."""
    store = TokenStore(config.store)
    tokenizer = _matching_tokenizer(config.model, store)
    device = choose_device(config.device)
    checkpoint = newest_sound_checkpoint(path) if resume else None
    recorded = read_settings(checkpoint) if checkpoint else None
    # A resumed run keeps its compute dtype: `auto` might choose otherwise on another day.
    dtype = choose_dtype(recorded["dtype"] if recorded and config.dtype == "auto" else config.dtype, device)
    seed_everything(config.seed)
    loaded = load_model(config.model, device, tokenizer=tokenizer, seed=config.seed)
    if config.block_size > loaded.context_length:
        raise UserError(
            f"A block size of {config.block_size} is beyond the context of {config.model} ({loaded.context_length} "
            f"tokens); use --block_size {loaded.context_length} or less."
        )
    loaded.model.train(config.dropout)
    documents = store.documents("train")
    blocks_per_step = config.batch_tokens // config.block_size
    sampler = BlockSampler(
        store.tokens("train"),
        documents.start,
        documents.num_tokens,
        prefix_id=store.prefix_id,
        end_id=store.end_id,
        block_size=config.block_size,
        blocks_per_step=blocks_per_step,
        seed=config.seed,
    )
    lr = resolve_lr(config.lr, loaded.num_parameters)
    num_steps = config.max_steps or config.epochs * sampler.steps_per_epoch
    settings = {
        "model": config.model,
        "store": store.info["splits"]["train"]["corpus_hash"],
        "tokenizer": store.fingerprint,
        "block_size": config.block_size,
        "batch_tokens": config.batch_tokens,
        "num_steps": num_steps,
        "lr": lr,
        "warmup_fraction": config.warmup_fraction,
        "final_lr_fraction": config.final_lr_fraction,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "dropout": config.dropout,
        "seed": config.seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    optimizer = make_optimizer(loaded.model, lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = TrainingState(loaded.model, optimizer, scaler, Progress())
    if checkpoint is not None and recorded is not None:
        check_settings(recorded, settings, path)
        load_checkpoint(checkpoint, state)
        log.info("Going on from step %d (%s).", state.progress.step, checkpoint)
    protocol = make_protocol(
        "full", None, None, prefix_id=tokenizer.prefix_id, dtype=settings["dtype"], context_length=loaded.context_length
    )
    held_out = store.validation_documents()
    chosen = validation_subset(held_out, store.documents("validation").num_tokens.tolist(), config.validation_tokens)
    return _Run(
        config=config,
        path=path,
        store=store,
        tokenizer=tokenizer,
        loaded=loaded,
        dtype=dtype,
        sampler=sampler,
        schedule=Schedule(num_steps, lr, config.warmup_fraction, config.final_lr_fraction),
        micro_batch_size=_micro_batch_size(config, loaded, blocks_per_step, dtype),
        state=state,
        protocol=protocol,
        validation=encode_documents(chosen, tokenizer),
        prompts=prompts,
        settings=settings,
    )


def _matching_tokenizer(model: str, store: TokenStore) -> TextTokenizer:
    """The store's tokenizer, after checking that it is the model's."""
    if model.startswith("random:") and not model.startswith("random:tiny"):
        return store.tokenizer()
    tokenizer = load_tokenizer(model)
    if tokenizer.fingerprint() != store.fingerprint:
        raise UserError(
            f"The store {store.path} was made with another tokenizer than that of {model}; "
            f"prepare one with: cartilha prepare --model {model} --input FILE --output STORE"
        )
    return tokenizer


def _micro_batch_size(config: TrainConfig, loaded: LoadedModel, blocks_per_step: int, dtype: torch.dtype) -> int:
    if config.micro_batch_size != "auto":
        return min(config.micro_batch_size, blocks_per_step)
    return plan_micro_batch(
        loaded.model,
        num_parameters=loaded.num_parameters,
        block_size=config.block_size,
        blocks_per_step=blocks_per_step,
        dtype=dtype,
        free_bytes=free_memory_bytes(loaded.model.device),
    )


def _facts(run: _Run) -> dict[str, Any]:
    """What results.json records of the set-up."""
    config, sampler, counts = run.config, run.sampler, run.store.counts
    machine = describe_machine(run.loaded.model.device)
    return {
        "settings": {
            **run.settings,
            "store": str(run.store.path),
            "epochs": config.epochs,
            "max_steps": config.max_steps,
            "blocks_per_step": sampler.blocks_per_step,
            "micro_batch_size": run.micro_batch_size,
            "device": machine["device_name"],
            "num_parameters": run.loaded.num_parameters,
        },
        "corpus": {
            "num_train_documents": counts["train"].num_documents,
            "num_train_tokens": counts["train"].num_tokens,
            "num_validation_documents": counts["validation"].num_documents,
            "num_validation_tokens": counts["validation"].num_tokens,
            "train_hash": counts["train"].corpus_hash,
            "validation_hash": counts["validation"].corpus_hash,
            "tokenizer_fingerprint": run.store.fingerprint,
        },
        "packing": {
            "num_blocks": sampler.blocks_per_epoch,
            "steps_per_epoch": sampler.steps_per_epoch,
            "padding_share": sampler.padding_share,
        },
        "machine": machine,
        "versions": versions(),
    }


def _train(run: _Run, record: RunRecord, notices: NoticeCollector, stop: StopRequest) -> None:
    """Measure, train, measure; checkpoints at each epoch's end and every `checkpoint_steps`."""
    _announce(run)
    metrics = MetricsFile(run.path / "metrics.jsonl", run.step)
    epoch_loss = EpochLoss(run.state.progress)
    try:
        if run.step == 0:
            _measure(run, record, metrics, "Validation before training")
            _write_samples(run)
        for step in _steps(run):
            metrics.step(step)
            epoch_loss.step(step)
            if step.ends_epoch:
                train_loss, seconds = epoch_loss.finish()
                evaluation = _measure(run, record, metrics, f"Validation after epoch {step.epoch}")
                row = {
                    "epoch": step.epoch,
                    "train_loss": train_loss,
                    "validation_loss": evaluation.total.nll / evaluation.total.num_tokens,
                    "seconds": seconds,
                }
                record.update(epochs=[*record.values["epochs"], row])
            every = run.config.checkpoint_steps
            last = step.step == run.schedule.num_steps
            stopping = stop.requested  # read once: a request that comes while the checkpoint is written waits a step
            if step.ends_epoch or last or stopping or (every and step.step % every == 0):
                epoch_loss.flush()
                metrics.flush()
                save_checkpoint(run.path, run.state, run.settings)
            if stopping and not last:
                raise InterruptedRunError(
                    f"Stopped after step {step.step} of {run.schedule.num_steps}; a checkpoint is saved, "
                    "and the same command with --resume auto goes on from it."
                )
    finally:
        metrics.close()
    _finish(run, record, notices)


def _announce(run: _Run) -> None:
    sampler, schedule = run.sampler, run.schedule
    log.info(
        "Training %s (%.1f M parameters): %d steps of %s tokens (%d blocks of %d, micro-batch %d), %s on %s, lr %.2g.",
        run.config.model,
        run.loaded.num_parameters / 1e6,
        schedule.num_steps,
        f"{run.config.batch_tokens:,}",
        sampler.blocks_per_step,
        sampler.block_size,
        run.micro_batch_size,
        run.settings["dtype"],
        run.loaded.model.device.type,
        schedule.peak_lr,
    )
    log.info(
        "An epoch is %d steps: %s blocks, %s targets, %.2f %% padding.",
        sampler.steps_per_epoch,
        f"{sampler.blocks_per_epoch:,}",
        f"{sampler.targets_per_epoch:,}",
        100 * sampler.padding_share,
    )


def _steps(run: _Run) -> Iterator[StepRecord]:
    """The loop, with progress shown."""
    left = run.schedule.num_steps - run.step
    with show_progress("Training", float(left), "steps") as advance:
        for record in train_steps(
            run.loaded.model,
            run.state.optimizer,
            run.sampler,
            run.schedule,
            run.state.progress,
            dtype=run.dtype,
            micro_batch_size=run.micro_batch_size,
            max_grad_norm=run.config.max_grad_norm,
            scaler=run.state.scaler,
        ):
            rate = record.num_targets / record.seconds
            advance(1.0, f"step {record.step}, loss {float(record.loss):.3f}, {rate:,.0f} tokens/s")
            yield record


def _measure(run: _Run, record: RunRecord, metrics: MetricsFile, title: str) -> Evaluation:
    evaluation = evaluate_loaded(run.loaded, run.validation, run.protocol, run.dtype, title)
    metrics.evaluation(run.step, run.num_epochs_done, evaluation.to_dict())
    record.add_evaluation(run.step, run.num_epochs_done, evaluation)
    bits = evaluation.bits_per_byte
    log.info(
        "%s: perplexity %.2f, bits per byte %s (%s tokens; %s)",
        title,
        evaluation.perplexity,
        "refused" if bits is None else f"{bits:.4f}",
        f"{evaluation.total.num_tokens:,}",
        run.protocol.describe(),
    )
    return evaluation


def _write_samples(run: _Run) -> None:
    """Continue the prompts, without the dropout that training may have."""
    run.loaded.model.train(False)
    add_samples(run.path, run.step, continue_prompts(run.loaded, run.tokenizer, run.prompts))
    run.loaded.model.train(run.config.dropout)


def _finish(run: _Run, record: RunRecord, notices: NoticeCollector) -> None:
    """The last evaluation where no epoch's end has just made it, samples, the model, and the summary."""
    if record.values["evaluations"][-1]["step"] != run.step:
        metrics = MetricsFile(run.path / "metrics.jsonl", run.step)
        _measure(run, record, metrics, "Validation after training")
        metrics.close()
    _write_samples(run)
    progress = run.state.progress
    record.update(
        tokens=progress.tokens,
        seconds=progress.seconds,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else None,
        memory_bytes=peak_memory_bytes(run.loaded.model.device.type),
        notices=list(dict.fromkeys([*record.values["notices"], *notices.notices])),
    )
    with new_directory(run.path / "model", replace=True) as temporary:
        run.loaded.model.save_pretrained(temporary)
        run.tokenizer.save(temporary)
        write_atomically(temporary / "README.md", model_card(record.values))
    record.update(status="finished")


@contextmanager
def _collecting_notices() -> Iterator[NoticeCollector]:
    collector = NoticeCollector()
    log.addHandler(collector)
    try:
        yield collector
    finally:
        log.removeHandler(collector)


@contextmanager
def _recording_failures(record: RunRecord, notices: NoticeCollector) -> Iterator[None]:
    """Whatever ends the run early is written to results.json: a failed run is a row of the table too."""

    def note(status: str, error: BaseException) -> None:
        found = list(dict.fromkeys([*record.values["notices"], *notices.notices]))
        record.update(status=status, error=str(error) or type(error).__name__, notices=found)

    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt) as error:
        note("interrupted", error)
        raise
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            note("failed", error)
            raise
        note("out_of_memory", error)
        raise OutOfMemoryError(
            "The device ran out of memory; use a smaller --micro_batch_size (the result stays the same) "
            "or a smaller --block_size."
        ) from error
    except BaseException as error:
        note("failed", error)
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    """Torch has a type for CUDA's; the CPU allocator and MPS raise a RuntimeError with these words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    words = ("can't allocate memory", "not enough memory", "MPS backend out of memory")  # the second is Windows'
    return any(word in text for word in words)
