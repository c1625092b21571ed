"""`train`: continued training of a model on a store, validated before step 1 and after every epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cartilha.config import GenerateConfig, TrainConfig
from cartilha.errors import InterruptedRunError, OutOfMemoryError, UserError, counted
from cartilha.evaluation.measures import Evaluation
from cartilha.machine.devices import seed_everything
from cartilha.machine.memory import is_out_of_memory, peak_memory_bytes
from cartilha.machine.processes import from_rank_0, gather_objects, is_main_process
from cartilha.model.compiling import training_body
from cartilha.pipeline.check import refuse_if_failed
from cartilha.pipeline.evaluate import evaluate_loaded
from cartilha.pipeline.preflight import preflight
from cartilha.runs.files import (
    NoticeCollector,
    RunWriter,
    check_output,
    only_process,
    read_results,
    write_config,
)
from cartilha.runs.live import training_view
from cartilha.runs.model_card import model_card
from cartilha.runs.scratch import place_of_run
from cartilha.runs.setup import Run, assemble, check_space, facts, is_finished_as_asked
from cartilha.runs.snapshots import take_snapshot
from cartilha.storage import DISK_FAULTS, new_directory, system_error, write_atomically, write_json
from cartilha.training.checkpoint import best_checkpoint, drop_optimizer_states, list_checkpoints, newest_name
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.metrics_file import MetricsFile
from cartilha.training.state import Progress, StepRecord
from cartilha.training.stopping import StopRequest, listening_for_stop
from cartilha.training.streams import random_numbers_apart
from cartilha.training.trackers import TrackedRun, open_tracker
from cartilha.training.watch import LossWatch
from cartilha.training.writer import CheckpointWriter, can_write_in_background

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


def train(config: TrainConfig, *, prompts: GenerateConfig | None = None) -> TrainResult:
    """Train and leave the run's files in `config.output`.

    Args:
        config: What to train on what, and how.
        prompts: Prompts that the model continues before and after; by default the default prompt.

    Raises:
        CheckFailedError: The set-up is unsound (see `cartilha check`); nothing was written.
        UserError: Settings that cannot work, named before anything is computed.
        OutOfMemoryError: The device's memory did not suffice; the run is recorded so.
        InterruptedRunError: Asked to stop; a checkpoint is saved.
    """
    output, resume = Path(config.output), config.resume == "auto"
    preflight(config)
    stop_file = Path(config.stop_file) if config.stop_file else None
    if stop_file and stop_file.exists():
        raise InterruptedRunError(f"The stop file {stop_file} is there: nothing was done; remove it and go on.")
    with _collecting_notices() as notices, _place(config, resume) as path:
        record = None if path is None else _run(config, path, prompts or GenerateConfig(), notices, stop_file)
    return _nothing_to_do(output) if record is None else TrainResult(str(output), record.values, False)


def _run(
    config: TrainConfig, path: Path, prompts: GenerateConfig, notices: NoticeCollector, stop_file: Path | None
) -> RunWriter:
    """Set up and train in a directory that this command has for itself."""
    run = assemble(config, path, prompts, config.resume == "auto")
    if not config.skip_checks:
        with random_numbers_apart():  # a resumed run goes on with those of its checkpoint
            refuse_if_failed(run)
    setting = facts(run)
    if is_main_process():
        check_space(run)
        record = RunWriter.resume(path, run.step, setting) if run.step else RunWriter.begin(path, setting)
    record = from_rank_0(record if is_main_process() else RunWriter(path, {}))
    with _recording_failures(record, notices), listening_for_stop(stop_file) as stop:
        record.update()  # the first file: with it the directory is a run, which can be gone on with
        if is_main_process():
            write_config(path, config)
            write_json(path / "plan.json", run.plan.values)
        _train(run, record, notices, stop)
    return record


@contextmanager
def _place(config: TrainConfig, resume: bool) -> Iterator[Path | None]:
    """The run's directory, for this command alone; None where the run is finished as it was asked for.

    Of several processes the first looks at the directory, holds its lock and writes there; the others are told.
    """
    output = Path(config.output)
    with ExitStack() as stack:
        path = None
        if is_main_process() and not (resume and is_finished_as_asked(config, output)):
            path = stack.enter_context(place_of_run(config, resume))
            stack.enter_context(only_process(path))
            check_output(path, resume)
            if resume and is_finished_as_asked(config, path):  # by whoever had it until now, or in the local copy
                path = None
        yield from_rank_0(path)


def _nothing_to_do(path: Path) -> TrainResult:
    if not is_main_process():
        return TrainResult(str(path), {}, True)
    log.info("The run %s is finished: nothing to do.", path)
    return TrainResult(str(path), read_results(path), True)


def _train(run: Run, record: RunWriter, notices: NoticeCollector, stop: StopRequest) -> None:
    """Measure, train, measure; a checkpoint at each epoch's end, whenever one is due, and before stopping."""
    _announce(run)
    watch = LossWatch(run.state.progress, scaled=run.state.scaler.is_enabled())
    tracked = TrackedRun(run.path, run.step, run.settings)
    tracker = open_tracker(run.config.tracker, tracked) if is_main_process() else None
    metrics = MetricsFile(run.path / "metrics.jsonl", run.step, watch, tracker)
    writer = CheckpointWriter(
        run.path,
        every_steps=run.config.checkpoint_steps,
        every_minutes=run.config.checkpoint_minutes,
        keep=run.config.keep_last,
        background=run.plan.background_checkpoints
        and can_write_in_background(run.loaded.model.device, run.loaded.num_parameters),
    )
    try:
        if run.step == 0:
            _measure(run, record, metrics, "Validation before training")
            seed_everything(run.config.seed)
        first = None
        for step in _steps(run, record):
            first = first or step
            metrics.step(step)
            if watch.has_diverged:
                raise watch.diverged(newest_name(run.path))
            validation_loss = _end_epoch(run, record, metrics, step) if step.ends_epoch else None
            last = run.schedule.is_over(step.step, step.total_seconds)
            # Read once: a request that comes while the checkpoint is written waits a step.
            stopping = any(gather_objects(stop.requested))
            if step.ends_epoch or last or stopping or writer.is_due(step.step):
                metrics.sync()
                writer.write(run.state, run.settings, validation_loss, goes_on=not (last or stopping))
            if stopping and not last:
                raise InterruptedRunError(
                    f"Stopped after step {step.step} of {run.schedule.num_steps}; a checkpoint is saved, "
                    "and the same command with --resume auto goes on from it."
                )
        writer.finish()
        record.update(checkpoint_seconds=writer.stall_s, **_rates(run.state.progress, first))
        _finish(run, record, notices, metrics)
    finally:
        writer.close()
        metrics.close()


def _end_epoch(run: Run, record: RunWriter, metrics: MetricsFile, step: StepRecord) -> float:
    """Validate and record the epoch that this step ends; returns the validation loss, in nats a token."""
    metrics.flush()
    train_loss, seconds = run.state.progress.end_epoch()
    evaluation = _measure(run, record, metrics, f"Validation after epoch {step.epoch}")
    validation_loss = evaluation.total.nll / evaluation.total.num_tokens
    row = {"epoch": step.epoch, "train_loss": train_loss, "validation_loss": validation_loss, "seconds": seconds}
    record.update(epochs=[*record.values["epochs"], row])
    return validation_loss


def _announce(run: Run) -> None:
    sampler, schedule = run.sampler, run.schedule
    log.info(
        "Training %s (%.1f M parameters): %s of %s (%s of %d, micro-batch %d), %s on %s, lr %.2g.",
        run.config.model,
        run.loaded.num_parameters / 1e6,
        counted(schedule.num_steps, "step"),
        counted(run.config.batch_tokens, "token"),
        counted(sampler.blocks_per_step, "block"),
        sampler.block_size,
        run.plan.micro_batch_size,
        run.settings["dtype"],
        run.loaded.model.device.type,
        schedule.peak_lr,
    )
    log.info(
        "An epoch is %s: %s, %s, %.2f %% padding.",
        counted(sampler.steps_per_epoch, "step"),
        counted(sampler.blocks_per_epoch, "block"),
        counted(sampler.targets_per_epoch, "target"),
        100 * sampler.padding_share,
    )


def _steps(run: Run, record: RunWriter) -> Iterator[StepRecord]:
    """The loop, shown as it goes."""
    settings = StepSettings(
        run.dtype,
        run.plan.micro_batch_size,
        run.config.max_grad_norm,
        run.config.loss,
        body=training_body(run.loaded.model, run.config.compile, run.schedule.num_steps),
    )
    with training_view(record, run.schedule, f"Training {run.config.model}") as show:
        for step in train_steps(run.state, run.sampler, run.schedule, settings):
            show(step)
            yield step


def _measure(run: Run, record: RunWriter, metrics: MetricsFile, title: str) -> Evaluation:
    evaluation, nll = evaluate_loaded(run.scorer, run.validation, title)
    metrics.evaluation(run.step, run.num_epochs_done, evaluation.to_dict())
    record.add_evaluation(run.step, run.num_epochs_done, evaluation)
    bits = evaluation.bits_per_byte
    log.info(
        "%s: perplexity %.2f, bits per byte %s (%s; %s)",
        title,
        evaluation.perplexity,
        "refused" if bits is None else f"{bits:.4f}",
        counted(evaluation.total.num_tokens, "token"),
        run.scorer.protocol.describe(),
    )
    if is_main_process():
        metrics.texts(run.step, take_snapshot(run, record, evaluation, nll))
    return evaluation


def _finish(run: Run, record: RunWriter, notices: NoticeCollector, metrics: MetricsFile) -> None:
    """The last evaluation where no epoch's end has just made it, the model, and the summary."""
    if record.values["evaluations"][-1]["step"] != run.step:
        _measure(run, record, metrics, "Validation after training")
    progress = run.state.progress
    record.values["settings"]["micro_batch_size"] = progress.micro_batch_size  # memory may have run out on the way
    if progress.step < run.schedule.num_steps:
        log.info(
            "The time budget of %s is used up after step %d of %d; a longer one with --allow_changes goes on.",
            *(run.config.time_budget, progress.step, run.schedule.num_steps),
        )
    best = best_checkpoint(list_checkpoints(run.path))
    record.update(
        best_checkpoint=best.name if best else None,
        steps=progress.step,
        skipped_steps=progress.skipped_steps,
        loss_spikes=progress.loss_spikes,
        tokens=progress.tokens,
        seconds=progress.seconds,
        memory_bytes=peak_memory_bytes(run.loaded.model.device.type),
        notices=list(dict.fromkeys([*record.values["notices"], *notices.notices])),
    )
    if not is_main_process():
        return
    with new_directory(run.path / "model", replace=True) as temporary:
        torch.nn.Module.to(run.loaded.model, getattr(torch, run.config.save_dtype))  # nothing computes with it any more
        run.loaded.model.save_pretrained(temporary)
        run.tokenizer.save(temporary)
        write_atomically(temporary / "README.md", model_card(record.values))
    if not run.config.keep_optimizer and progress.step >= run.schedule.num_steps:  # a longer time budget can go on
        drop_optimizer_states(run.path)
    record.update(status="finished")


def _rates(progress: Progress, first: StepRecord | None) -> dict[str, float | None]:
    """Tokens a second of all steps, and of those after this process's first one, which includes the compilation."""
    after = progress.seconds - first.total_seconds if first else 0.0
    return {
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
        "tokens_per_second_after_first_step": (progress.tokens - first.tokens) / after if first and after else None,
    }


@contextmanager
def _collecting_notices() -> Iterator[NoticeCollector]:
    collector = NoticeCollector()
    log.addHandler(collector)
    try:
        yield collector
    finally:
        log.removeHandler(collector)


@contextmanager
def _recording_failures(record: RunWriter, notices: NoticeCollector) -> Iterator[None]:
    """Whatever ends the run early is written to results.json: a failed run is a row of the table too."""

    def note(status: str, error: BaseException) -> None:
        found = list(dict.fromkeys([*record.values["notices"], *notices.notices]))
        with suppress(OSError):  # where the disk is at fault, this cannot be written either
            record.update(status=status, error=str(error) or type(error).__name__, notices=found)

    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt) as error:
        note("interrupted", error)
        raise
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            note("failed", error)
            raise
        note("out_of_memory", error)
        raise OutOfMemoryError(
            "The device ran out of memory even with one block a forward pass; use a smaller --block_size, "
            "--gradient_checkpointing, or a smaller model (cartilha plan says what fits)."
        ) from error
    except BaseException as error:
        note("failed", error)
        fault = system_error(error)
        if fault is None or fault.errno not in DISK_FAULTS:
            raise
        newest = newest_name(record.path)
        raise UserError(
            f"The run cannot write to {fault.filename or record.path} ({fault.strerror}); free some space or mend the "
            f"drive, and give the same command with --resume auto: it goes on from {newest or 'the beginning'}."
        ) from error
