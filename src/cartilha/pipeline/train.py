"""`train`: continued training of a model on a store, with a validation before step 1 and after every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cartilha.config import GenerateConfig, TrainConfig
from cartilha.console import collecting_notices, progress
from cartilha.errors import InterruptedRunError, UserError, counted, log
from cartilha.evaluation.corpus import score_in_shares
from cartilha.evaluation.measures import Evaluation, make_evaluation
from cartilha.machine.cpu import give_back_freed_memory, give_back_holes
from cartilha.machine.devices import seed_everything
from cartilha.machine.memory import peak_memory_bytes
from cartilha.machine.processes import from_rank_0, gather_objects, is_main_process, world
from cartilha.model.compiling import training_body
from cartilha.model.load import save_model
from cartilha.model.sharding import is_sharded, whole_model
from cartilha.pipeline.check import refuse_if_failed
from cartilha.pipeline.preflight import preflight
from cartilha.reporting.notebook import run_html
from cartilha.runs.best import comparable, loss_of, since_best
from cartilha.runs.decay import copy_trunk, decaying
from cartilha.runs.energy import counting_energy
from cartilha.runs.english import score_english
from cartilha.runs.facts import facts, speed
from cartilha.runs.failures import naming_lost_processes, recording_failures
from cartilha.runs.files import RunWriter, check_output, only_process, read_results, values_at, write_config
from cartilha.runs.live import training_view
from cartilha.runs.model_card import write_card
from cartilha.runs.scratch import place_of_run
from cartilha.runs.setup import Run, assemble, check_space, is_finished_as_asked
from cartilha.runs.snapshots import compare_with_first, take_snapshot
from cartilha.storage import new_directory, write_json
from cartilha.training.checkpoint import (
    best_checkpoint,
    drop_optimizer_states,
    list_checkpoints,
    load_weights,
    newest_name,
)
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.metrics_file import MetricsFile
from cartilha.training.state import StepRecord
from cartilha.training.stopping import StopRequest, listening_for_stop
from cartilha.training.streams import random_numbers_apart
from cartilha.training.trackers import TrackedRun, open_tracker
from cartilha.training.watch import LossWatch
from cartilha.training.writer import CheckpointWriter, can_write_in_background


@dataclass(frozen=True)
class TrainResult:
    """A run's directory and results.json, and whether it was finished before (`--resume auto` then does nothing)."""

    run: str
    results: dict[str, Any]
    was_finished: bool

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        return {"run": self.run, "was_finished": self.was_finished, **self.results}

    def _repr_html_(self) -> str:
        """Notebooks show the result and the curves."""
        return run_html(self.run)


def train(config: TrainConfig, *, prompts: GenerateConfig | None = None) -> TrainResult:
    """Train and leave the run's files in `config.output`; the model continues the prompts before and after.

    A UserError names settings that cannot work, and a CheckFailedError an unsound set-up, before anything is written.
    results.json records an OutOfMemoryError, and an InterruptedRunError, before which a checkpoint is saved.
    """
    preflight(config)
    if config.stop_file and Path(config.stop_file).exists():
        raise InterruptedRunError(
            f"The stop file {config.stop_file} is there, so nothing was done; remove it and try again."
        )
    config = decaying(config)
    with naming_lost_processes(Path(config.output)), collecting_notices() as notices, _place(config) as path:
        if path is not None:
            record = _run(config, path, prompts or GenerateConfig(), notices)
            return TrainResult(config.output, record.values, was_finished=False)
    log.info("The run %s is finished: nothing to do.", config.output)
    results = read_results(Path(config.output)) if is_main_process() else {}
    return TrainResult(config.output, results, was_finished=True)


@contextmanager
def _place(config: TrainConfig) -> Iterator[Path | None]:
    """The run's directory, locked for this command; None if the run is finished as it was asked for.

    Of several processes the main one looks at the directory, locks it and writes there; the others are told.
    """
    output, resume = Path(config.output), config.resume == "auto"
    with ExitStack() as stack:
        path = None
        if is_main_process() and not (resume and is_finished_as_asked(config, output)):
            path = stack.enter_context(place_of_run(config, resume))
            stack.enter_context(only_process(path))
            check_output(path, resume)
            # The process that had the lock may have finished the run, and so may a local copy of it be finished.
            if resume and is_finished_as_asked(config, path):
                path = None
            elif config.decay_from and newest_name(path) is None:
                copy_trunk(config.decay_from, path)
        yield from_rank_0(path)


def _run(config: TrainConfig, path: Path, prompts: GenerateConfig, notices: list[str]) -> RunWriter:
    """Set up and train in a directory that is locked for this command."""
    run = assemble(config, path, prompts, config.resume == "auto")
    _spare_memory(run)
    if not config.skip_checks:
        with random_numbers_apart():  # a resumed run goes on with those of its checkpoint
            refuse_if_failed(run)
    values = facts(run)
    if is_main_process():
        check_space(run)
        values = values_at(path, run.step, values)
    record = RunWriter(path, from_rank_0(values), notices)
    with recording_failures(record), listening_for_stop(Path(config.stop_file) if config.stop_file else None) as stop:
        record.update()  # the first file: from now on the directory is a run, which can be resumed
        if is_main_process():
            write_config(path, config)
            write_json(path / "plan.json", run.plan.values)
        _announce(run)
        _train(run, record, stop)
    return record


def _train(run: Run, record: RunWriter, stop: StopRequest) -> None:
    """Measure, train, measure; write a checkpoint after each epoch, whenever one is due, and before stopping."""
    watch = LossWatch(run.state.progress, scaled=run.state.scaler.is_enabled())
    tracked = TrackedRun(run.path, run.step, run.settings)
    tracker = open_tracker(run.config.tracker, tracked) if is_main_process() else None
    metrics = MetricsFile(run.path / "metrics.jsonl", run.step, watch, tracker)
    writer = CheckpointWriter(
        run.path,
        every_steps=run.config.checkpoint_steps,
        every_minutes=run.config.checkpoint_minutes,
        keep=run.config.keep_last,
        background=run.plan.background_checkpoints and can_write_in_background(run.loaded.model.device, run.plan.size),
    )
    log_book = _LogBook(run, record, metrics)
    with closing(metrics), closing(writer), counting_energy(run.loaded.model.device, record) as count:
        if run.step == 0:
            log_book.measure("Validation before training")
            log_book.measure_english(0)
            seed_everything(run.config.seed)
        first, steps = None, _steps(run, record)
        if log_book.is_out_of_patience:  # killed between its last step and its end
            steps.close()
        for step in steps:
            first = first or step
            metrics.step(step)
            count()
            if watch.has_diverged:
                raise watch.diverged(newest_name(run.path))
            validation_loss = log_book.validate(step)
            last = run.schedule.is_over(step.step, step.total_seconds) or log_book.is_out_of_patience
            # Read once: a request that comes while the checkpoint is written waits for the next step.
            stopping, due = map(any, zip(*gather_objects((stop.requested, writer.is_due(step.step))), strict=True))
            if validation_loss is not None or last or stopping or due:
                metrics.sync()
                writer.write(run.state, run.settings, validation_loss, goes_on=not (last or stopping))
            if stopping and not last:
                raise InterruptedRunError(
                    f"Stopped after step {step.step} of {run.schedule.num_steps}; a checkpoint is saved, "
                    "and the same command with --resume auto goes on from it."
                )
            if last:
                steps.close()
        writer.finish()
        record.update(checkpoint_seconds=writer.stall_s, **speed(run, first))
        log_book.finish()


def _announce(run: Run) -> None:
    sampler, schedule = run.sampler, run.schedule
    step = f"{counted(schedule.num_steps, 'step')} of {counted(sampler.tokens_per_step, 'token')}"
    blocks = f"{counted(sampler.blocks_per_step, 'block')} of {sampler.block_size}"
    log.info(
        "Training %s (%s): %s (%s, micro-batch %d), %s on %s, %s, lr %.2g.",
        *(run.config.model, _size(run), step, blocks, run.plan.micro_batch_size),
        *(run.settings["dtype"], run.loaded.model.device.type, run.config.optimizer, schedule.peak_lr),
    )
    if run.mix is not None:
        log.info("An epoch is %s, in which --store is read once.", counted(sampler.steps_per_epoch, "step"))
        run.mix.announce(schedule.num_steps, sampler.tokens_per_step)
    else:
        log.info(
            "An epoch is %s: %s, %s, %.2f %% padding.",
            *(counted(getattr(sampler, f"{noun}s_per_epoch"), noun) for noun in ("step", "block", "target")),
            100 * sampler.padding_share,
        )
    if short := run.validation_times.too_short(schedule.num_steps / sampler.steps_per_epoch):
        log.info("--validate_every %s adds no validation: %s.", run.config.validate_every, short)
    patience, epochs = run.config.patience, (schedule.num_steps - 1) / sampler.steps_per_epoch
    num_validations = int(epochs * run.validation_times.per_epoch)
    if patience is not None and num_validations < patience:
        log.warning(
            "%s before the last step, so --patience %d cannot end this training early; validate more often with "
            "--validate_every.",
            *(f"There {'is' if num_validations == 1 else 'are'} {counted(num_validations, 'validation')}", patience),
        )


def _size(run: Run) -> str:
    size, rank = run.plan.size, run.config.lora
    total = f"{size.num_parameters / 1e6:.1f} M parameters"
    return total if rank is None else f"LoRA of rank {rank}: {size.num_trained / 1e6:.1f} M of {total}"


def _steps(run: Run, record: RunWriter) -> Generator[StepRecord, None, None]:
    """The loop, shown as it goes."""
    config, plan = run.config, run.plan
    # The backward pass of a compiled model gives all gradients at its end, when nothing is saved by giving them back.
    choice = "never" if plan.size.is_lean and config.compile == "auto" else config.compile
    body = training_body(run.loaded.model, choice, run.schedule.num_steps)
    give_back_holes()
    first = from_rank_0(run.sampler.tokens_per_step / plan.tokens_per_second / world()[1])
    settings = StepSettings(run.scorer.dtype, plan.micro_batch_size, config.max_grad_norm, config.loss, body, first)
    with training_view(record, run.schedule, f"Training {config.model}") as show:
        for step in train_steps(run.state, run.sampler, run.schedule, settings):
            show(step)
            yield step


def _spare_memory(run: Run) -> None:
    """Have a CPU give freed tensors back at once, if its memory is short and the run's profile is one that saves it.

    Lean weights, adapters and layers computed twice are such profiles; the plan takes it that memory is given back.
    """
    saves, twice = run.plan.size.saves_memory, run.config.gradient_checkpointing
    if not (saves or twice) or run.loaded.model.device.type != "cpu" or not run.plan.is_tight:
        return
    if give_back_freed_memory(2**16 if saves else 2**20):
        log.info("Memory is short: freed memory is given back at once, so that a step takes up to twice the time.")
        give_back_holes()


@dataclass(frozen=True)
class _LogBook:
    """A run, and where its evaluations are written down."""

    run: Run
    record: RunWriter
    metrics: MetricsFile

    def measure(self, title: str) -> Evaluation:
        """Score the validation side; a notice that was given before is not repeated."""
        run, started = self.run, time.perf_counter()
        with progress(title, float(run.validation.num_tokens.sum()), "tokens") as advance:
            scores = score_in_shares(run.scorer, run.validation, advance)
        evaluation = make_evaluation(run.scorer, run.validation, scores, time.perf_counter() - started)
        for note in evaluation.notes:
            if note not in self.record.heard:
                log.warning("%s", note)
        epoch = run.step // run.sampler.steps_per_epoch
        self.metrics.evaluation(run.step, epoch, evaluation.to_dict())
        self.record.add_evaluation(run.step, epoch, evaluation)
        bits = "refused" if evaluation.bits_per_byte is None else f"{evaluation.bits_per_byte:.4f}"
        scored = f"{counted(evaluation.total.num_tokens, 'token')}; {run.scorer.protocol.describe()}"
        log.info("%s: perplexity %.2f, bits per byte %s (%s)", title, evaluation.perplexity, bits, scored)
        if self._takes_part:
            self.metrics.texts(run.step, take_snapshot(run, self.record, evaluation, scores.nll))
        return evaluation

    def measure_english(self, step: int) -> None:
        """Score the English sample with the weights of that step, unless it is skipped."""
        if self._takes_part and not self.run.config.skip_english:
            score_english(self.run, self.record, step)

    @property
    def _takes_part(self) -> bool:
        """Whether this process computes what the main one keeps: it is that, or a sharded model takes all of them."""
        return is_main_process() or is_sharded(self.run.loaded.model)

    @property
    def is_out_of_patience(self) -> bool:
        """Whether so many validations in a row brought no better value that training ends early."""
        patience = self.run.config.patience
        return patience is not None and since_best(self.record.values["evaluations"]) >= patience

    def validate(self, step: StepRecord) -> float | None:
        """Validate where that is due after a step; returns the validation loss in nats per token, or else None."""
        if not self.run.validation_times.is_due(step):
            return None
        if step.ends_epoch:
            return self._end_epoch(step)
        return self.measure(f"Validation after step {step.step}").total.loss

    def _end_epoch(self, step: StepRecord) -> float:
        """Validate and record the epoch that this step ends."""
        self.metrics.flush()
        train_loss, seconds = self.run.state.progress.end_epoch()
        validation_loss = self.measure(f"Validation after epoch {step.epoch}").total.loss
        row = {"epoch": step.epoch, "train_loss": train_loss, "validation_loss": validation_loss, "seconds": seconds}
        self.record.update(epochs=[*self.record.values["epochs"], row], **self.run.sources)
        return validation_loss

    def finish(self) -> None:
        """Write the last evaluation (unless an epoch ended here), the model, and the summary."""
        run, record, progress = self.run, self.record, self.run.state.progress
        if record.values["evaluations"][-1]["step"] != run.step:
            self.measure("Validation after training")
        record.values["settings"]["micro_batch_size"] = progress.micro_batch_size  # smaller if memory ran out
        ended_by = self._end()
        best = from_rank_0(best_checkpoint(list_checkpoints(run.path)))
        record.update(
            best_checkpoint=best.name if best else None,
            ended_by=ended_by,
            steps=progress.step,
            skipped_steps=progress.skipped_steps,
            loss_spikes=progress.loss_spikes,
            tokens=progress.tokens,
            seconds=progress.seconds,
            memory_bytes=peak_memory_bytes(run.loaded.model.device.type),
            **run.sources,
            notices=record.notices,
        )
        if not self._takes_part:
            return
        model_step = self._take_best(best)
        self.measure_english(model_step)
        dtype = getattr(torch, run.config.save_dtype)
        loaded = replace(run.loaded, model=whole_model(run.loaded.model, dtype))
        if not is_main_process():
            return
        record.update(model_step=model_step, comparison=compare_with_first(run, model_step), notices=record.notices)
        with new_directory(run.path / "model", replace=True) as temporary:
            save_model(loaded, temporary, dtype)
            run.scorer.tokenizer.save(temporary)
            write_card(temporary, record.values)
        if ended_by == "steps" and not run.config.keep_optimizer:  # a longer time budget goes on with the states
            drop_optimizer_states(run.path)
        record.update(status="finished")

    def _end(self) -> str:
        """Say what ended the training, if not its last step: `steps`, `patience` or `time_budget`."""
        run, num_steps = self.run, self.run.schedule.num_steps
        if run.step >= num_steps:
            return "steps"
        at = f"step {run.step} of {num_steps}"
        if self.is_out_of_patience:
            waited = counted(run.config.patience or 0, "validation")
            log.info("%s brought no better value: training ends early, after %s.", waited, at)
            return "patience"
        budget = run.config.time_budget
        log.info("The time budget of %s is used up after %s; a longer one with --allow_changes goes on.", budget, at)
        return "time_budget"

    def _take_best(self, best: Path | None) -> int:
        """Put the weights of the best checkpoint into the model if the last evaluation is worse; returns their step."""
        run = self.run
        losses = {row["step"]: loss_of(row) for row in comparable(self.record.values["evaluations"])}
        if losses.get(0, math.inf) <= min(losses.values()):
            log.warning("No validation was better than the one before training: the model was better without it.")
        step = int(best.name.removeprefix("step-")) if best else run.step
        if best is None or losses[run.step] <= losses.get(step, math.inf):
            return run.step
        try:
            load_weights(best, run.loaded.model)
        except UserError as error:
            log.warning("%s RUN/model holds the weights of the last step instead, whose validation is worse.", error)
            return run.step
        log.info("RUN/model holds the weights of step %d, whose validation was the best.", step)
        return step
