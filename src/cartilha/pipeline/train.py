"""`train`: continued training of a model on a store, validated before step 1 and after every epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cartilha.config import GenerateConfig, TrainConfig
from cartilha.console import progress as show_progress
from cartilha.errors import InterruptedRunError, OutOfMemoryError
from cartilha.evaluation.measures import Evaluation
from cartilha.pipeline.evaluate import evaluate_loaded
from cartilha.pipeline.model_card import model_card
from cartilha.pipeline.run_files import (
    NoticeCollector,
    RunRecord,
    check_output,
    read_results,
    read_status,
    write_config,
)
from cartilha.pipeline.run_setup import Run, assemble, check, check_finished, facts
from cartilha.pipeline.snapshots import take_snapshot
from cartilha.runtime import (
    from_rank_0,
    gather_objects,
    is_out_of_memory,
    peak_memory_bytes,
    seed_everything,
    world,
)
from cartilha.storage import new_directory, write_atomically
from cartilha.training.checkpoint import newest_name, save_checkpoint
from cartilha.training.hooks import EpochLoss, MetricsFile, StopRequest, listening_for_stop
from cartilha.training.loop import StepRecord, train_steps
from cartilha.training.watch import LossWatch

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
        UserError: Settings that cannot work, named before anything is computed.
        OutOfMemoryError: The device's memory did not suffice; the run is recorded so.
        InterruptedRunError: Asked to stop; a checkpoint is saved.
    """
    path = Path(config.output)
    resume = config.resume == "auto"
    check(config)
    finished = False
    if world()[0] == 0:  # of several processes, the first alone looks at the directory, and writes there
        check_output(path, resume)
        finished = resume and read_status(path) == "finished"
    if from_rank_0(finished):
        if world()[0] != 0:
            return TrainResult(str(path), {}, True)
        check_finished(config, path)
        log.info("The run %s is finished: nothing to do.", path)
        return TrainResult(str(path), read_results(path), True)
    with _collecting_notices() as notices:
        run = assemble(config, path, prompts or GenerateConfig(), resume)
        setting = facts(run)
        if world()[0] == 0:
            path.mkdir(parents=True, exist_ok=True)
            record = RunRecord.resume(path, run.step, setting) if run.step else RunRecord.begin(path, setting)
            record.update()  # the first file: with it the directory is a run, which can be gone on with
            write_config(path, config)
        record = from_rank_0(record if world()[0] == 0 else RunRecord(path, {}))
        with _recording_failures(record, notices), listening_for_stop() as stop:
            _train(run, record, notices, stop)
    return TrainResult(str(path), record.values, False)


def _train(run: Run, record: RunRecord, notices: NoticeCollector, stop: StopRequest) -> None:
    """Measure, train, measure; checkpoints at each epoch's end and every `checkpoint_steps`."""
    _announce(run)
    watch = LossWatch(run.state.progress, scaled=run.state.scaler.is_enabled())
    metrics = MetricsFile(run.path / "metrics.jsonl", run.step, watch)
    epoch_loss = EpochLoss(run.state.progress)
    try:
        if run.step == 0:
            _measure(run, record, metrics, "Validation before training")
            seed_everything(run.config.seed)
        for step in _steps(run):
            metrics.step(step)
            epoch_loss.step(step)
            if watch.has_diverged:
                raise watch.diverged(newest_name(run.path))
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
            last = run.schedule.is_over(step.step, step.total_seconds)
            # Read once: a request that comes while the checkpoint is written waits a step.
            stopping = any(gather_objects(stop.requested))
            if step.ends_epoch or last or stopping or (every and step.step % every == 0):
                epoch_loss.flush()
                metrics.flush()
                if world()[0] == 0:
                    save_checkpoint(run.path, run.state, run.settings)
            if last and step.step < run.schedule.num_steps:
                log.info(
                    "The time budget of %s is used up after step %d of %d; to go on, give a longer one.",
                    run.config.time_budget,
                    step.step,
                    run.schedule.num_steps,
                )
            if stopping and not last:
                raise InterruptedRunError(
                    f"Stopped after step {step.step} of {run.schedule.num_steps}; a checkpoint is saved, "
                    "and the same command with --resume auto goes on from it."
                )
    finally:
        metrics.close()
    _finish(run, record, notices)


def _announce(run: Run) -> None:
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


def _steps(run: Run) -> Iterator[StepRecord]:
    """The loop, with progress shown."""
    left = run.schedule.num_steps - run.step
    previous: StepRecord | None = None
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
            # The loss shown is the step before's: this one's may still be on its way from the device.
            shown = "" if previous is None else f"loss {float(previous.loss):.3f}, "
            advance(1.0, f"{shown}{rate:,.0f} tokens/s")
            previous = record
            yield record


def _measure(run: Run, record: RunRecord, metrics: MetricsFile, title: str) -> Evaluation:
    evaluation, nll = evaluate_loaded(run.loaded, run.validation, run.protocol, run.dtype, title)
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
    if world()[0] == 0:
        take_snapshot(run, record, evaluation, nll)
    return evaluation


def _finish(run: Run, record: RunRecord, notices: NoticeCollector) -> None:
    """The last evaluation where no epoch's end has just made it, the model, and the summary."""
    if record.values["evaluations"][-1]["step"] != run.step:
        metrics = MetricsFile(run.path / "metrics.jsonl", run.step, LossWatch(run.state.progress))
        _measure(run, record, metrics, "Validation after training")
        metrics.close()
    progress = run.state.progress
    record.values["settings"]["micro_batch_size"] = progress.micro_batch_size  # memory may have run out on the way
    record.update(
        steps=progress.step,
        skipped_steps=progress.skipped_steps,
        loss_spikes=progress.loss_spikes,
        tokens=progress.tokens,
        seconds=progress.seconds,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else None,
        memory_bytes=peak_memory_bytes(run.loaded.model.device.type),
        notices=list(dict.fromkeys([*record.values["notices"], *notices.notices])),
    )
    if world()[0] != 0:
        return
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
        raise
