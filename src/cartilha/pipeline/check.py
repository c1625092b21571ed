"""`check`: is the set-up right, before the money is spent? The cheap checks also run before every training."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cartilha.checks import model, text, training
from cartilha.checks.machine import memory_and_disk
from cartilha.checks.outcome import Check, CheckResult, Subject
from cartilha.config import CheckConfig
from cartilha.console import progress
from cartilha.corpus.document import Document
from cartilha.corpus.primer import read_primer
from cartilha.errors import CheckFailedError, UserError, first_line
from cartilha.machine.devices import choose_device, choose_dtype
from cartilha.model.load import load_model
from cartilha.pipeline.models import model_tokenizer
from cartilha.pipeline.preflight import preflight
from cartilha.runs.setup import Run
from cartilha.runs.step_plan import StepShape, plan_run, refuse_beyond_context, this_machine
from cartilha.tokens.store import TokenStore
from cartilha.training.checkpoint import space_needed
from cartilha.training.optimizer import resolve_lr

log = logging.getLogger("cartilha")

SAMPLE_DOCUMENTS, SAMPLE_DOCUMENTS_QUICK = 200, 25
TRAINING_SAMPLE = 100

CHECKS: tuple[Check, ...] = (
    text.round_trip,
    text.vocabulary,
    model.start,
    model.causality,
    model.isolation,
    training.overfit,
    training.loss,
    training.accumulation,
    training.gradients,
    model.precision,
    text.leak,
    memory_and_disk,
    training.resume,
    model.truth,
)
# What every training does before step 1: seconds, and nothing that moves a weight.
CHEAP_CHECKS: tuple[Check, ...] = (
    text.round_trip,
    text.vocabulary,
    model.causality,
    model.isolation,
    text.leak,
    memory_and_disk,
)


@dataclass(frozen=True)
class CheckReport:
    """What all checks found.

    Attributes:
        model: The model checked.
        store: The store, or None where the primer stood in.
        checks: In the order in which they ran.
        seconds: All together.
    """

    model: str
    store: str | None
    checks: tuple[CheckResult, ...]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 when none failed, else 3."""
        return CheckFailedError.exit_code if any(check.outcome == "failed" for check in self.checks) else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "model": self.model,
            "store": self.store,
            "checks": [asdict(check) for check in self.checks],
            "num_failed": sum(check.outcome == "failed" for check in self.checks),
            "seconds": self.seconds,
        }


def check(config: CheckConfig) -> CheckReport:
    """Run every check on a model, and on a store's text where one is named.

    Raises:
        UserError: There is no such model or store, or nothing in it to check with.
    """
    preflight(config)
    started = time.monotonic()
    subject = _subject(config)
    results = run_checks(subject, CHECKS)
    return CheckReport(config.model, config.store, tuple(results), time.monotonic() - started)


def run_checks(subject: Subject, checks: Sequence[Check]) -> list[CheckResult]:
    """Each check's result, with the time that it took. A check that breaks has failed, and says how."""
    results = []
    with progress("Checking", float(len(checks)), "checks") as advance:
        for one in checks:
            began = time.monotonic()
            try:
                found = one(subject)
            except Exception as error:  # whatever it is, the user wants the other checks, too
                found = _broken(one, error)
            results.append(replace(found, seconds=time.monotonic() - began))
            advance(1.0, results[-1].name)
    return results


def _broken(check: Check, error: Exception) -> CheckResult:
    return CheckResult(
        check.__name__.replace("_", " "),
        "failed",
        f"{type(error).__name__}: {first_line(error)}",
        "the check can be carried out",
        "What is checked here does not work at all with this model.",
        "Look at the error, and at the other checks.",
    )


def refuse_if_failed(run: Run) -> None:
    """Run the cheap checks and stop a training whose set-up is wrong.

    Args:
        run: Assembled, and with nothing of it written yet.

    Raises:
        CheckFailedError: Naming the first check that failed, what it means, and the remedy.
    """
    began = time.monotonic()
    run.loaded.model.train(False)  # dropout would move every logit
    results = run_checks(_subject_of_run(run), CHEAP_CHECKS)
    run.loaded.model.train(run.config.dropout)
    failed = [result for result in results if result.outcome == "failed"]
    if failed:
        first = failed[0]
        raise CheckFailedError(
            f"The check {first.name!r} failed ({first.measured}; expected: {first.expected}). {first.meaning} "
            f"{first.remedy} `cartilha check` shows all of them; --skip_checks trains all the same."
        )
    names = ", ".join(result.name for result in results if result.outcome == "passed")
    log.info("Checked before step 1: %s (%.1f s).", names, time.monotonic() - began)


def _subject_of_run(run: Run) -> Subject:
    held_out, trained_on = sample_documents(run.store, quick=True)
    return Subject(
        loaded=run.loaded,
        tokenizer=run.tokenizer,
        dtype=run.dtype,
        held_out=held_out,
        training=trained_on,
        store=run.store,
        block_size=run.config.block_size,
        lr=run.schedule.peak_lr,
        micro_batch_size=run.plan.micro_batch_size,
        planned_bytes=run.plan.memory_bytes,
        disk_bytes=run.disk_space[0],
        output=run.path,
        quick=True,
        is_random=run.config.model.startswith("random:"),
    )


def _subject(config: CheckConfig) -> Subject:
    store = TokenStore(config.store) if config.store else None
    held_out, trained_on = sample_documents(store, config.quick)
    if len(held_out) < 2 or not trained_on:
        raise UserError("There are too few documents to check with; two held-out and one training document are needed.")
    device = choose_device(config.device)
    # A store of another tokenizer is a check that fails, not an error: the others go on with the model's own.
    tokenizer = model_tokenizer(config.model, store)
    loaded = load_model(config.model, device, tokenizer=tokenizer)
    refuse_beyond_context(config.block_size, loaded.context_length, config.model)
    dtype = choose_dtype(config.dtype, device)
    plan = plan_run(
        loaded.model.config,
        this_machine(device, dtype),
        loaded.num_parameters,
        StepShape(config.block_size, max(1, config.batch_tokens // config.block_size)),
    )
    return Subject(
        loaded=loaded,
        tokenizer=tokenizer,
        dtype=dtype,
        held_out=held_out,
        training=trained_on,
        store=store,
        block_size=config.block_size,
        lr=resolve_lr(config.lr, loaded.num_parameters),
        micro_batch_size=plan.micro_batch_size,
        planned_bytes=plan.memory_bytes,
        disk_bytes=space_needed(loaded.num_parameters, Path(config.output))[0],
        output=Path(config.output),
        quick=config.quick,
        is_random=config.model.startswith("random:"),
    )


def sample_documents(store: TokenStore | None, quick: bool) -> tuple[list[Document], list[Document]]:
    """The first held-out and the first training documents of a store, or of the primer cut in two."""
    number = SAMPLE_DOCUMENTS_QUICK if quick else SAMPLE_DOCUMENTS
    if store is not None:
        return (
            list(itertools.islice(store.read_documents("validation"), number)),
            list(itertools.islice(store.read_documents("train"), TRAINING_SAMPLE)),
        )
    texts = list(read_primer())
    held_out = texts[::5]
    return held_out[:number], [text for i, text in enumerate(texts) if i % 5][:TRAINING_SAMPLE]
