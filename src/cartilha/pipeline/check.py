"""`check`: is the set-up right? Every training begins with the cheap checks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from cartilha.checks import model, text, training
from cartilha.checks.machine import memory_and_disk
from cartilha.checks.outcome import Check, CheckResult, Judgement, Subject
from cartilha.config import CheckConfig, TrainConfig
from cartilha.console import progress
from cartilha.corpus.document import Document
from cartilha.corpus.primer import read_primer
from cartilha.corpus.records import ReadSettings
from cartilha.errors import CheckFailedError, UserError, first_line, log
from cartilha.evaluation.scorer import Scorer, load_scorer
from cartilha.machine.devices import choose_device
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.questions import named_questions
from cartilha.pipeline.result import Result
from cartilha.preparation.decontamination import QuestionNames
from cartilha.runs.setup import Run
from cartilha.runs.step_plan import RunPlan, StepShape, plan_run, refuse_beyond_context, this_machine
from cartilha.tokens.store import TokenStore
from cartilha.training.checkpoint import space_needed
from cartilha.training.optimizer import StateSize, resolve_batch_tokens, resolve_lr
from cartilha.training.update_rules import resolve_optimizer

SAMPLE_DOCUMENTS, SAMPLE_DOCUMENTS_QUICK = 200, 25
TRAINING_SAMPLE = 100

Samples = tuple[list[Document], list[Document]]  # held-out and training documents

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
    text.benchmark,
    memory_and_disk,
    training.resume,
    model.truth,
)
# What every training does before step 1: these take seconds and change no weight.
CHEAP_CHECKS = (text.round_trip, text.vocabulary, model.causality, model.isolation, text.leak, memory_and_disk)

BROKEN = Judgement(
    "the check can be carried out",
    "What is checked here does not work at all with this model.",
    "Look at the error, and at the other checks.",
)


@dataclass(frozen=True)
class CheckReport(Result):
    """What all checks found, in the order in which they ran; `store` is None if the primer was used instead."""

    model: str
    store: str | None
    checks: tuple[CheckResult, ...]
    seconds: float
    num_failed: int

    @property
    def exit_code(self) -> int:
        """0 if none failed, else 3."""
        return CheckFailedError.exit_code if self.num_failed else 0


def check(config: CheckConfig) -> CheckReport:
    """Run every check on a model, and on a store's text if one is named."""
    preflight(config)
    started = time.monotonic()
    results = tuple(run_checks(_subject_of_command(config), CHECKS))
    num_failed = sum(result.outcome == "failed" for result in results)
    return CheckReport(config.model, config.store, results, time.monotonic() - started, num_failed)


def run_checks(subject: Subject, checks: Sequence[Check]) -> list[CheckResult]:
    """Each check's result, with the time that it took. A check that raises an error has failed."""
    results = []
    with progress("Checking", float(len(checks)), "checks") as advance:
        for one in checks:
            began = time.monotonic()
            try:
                found = one(subject)
            except Exception as error:  # the user wants the results of the other checks, too
                found = BROKEN.judge(False, f"{type(error).__name__}: {first_line(error)}")
            name = one.__name__.replace("_", " ")
            results.append(replace(found, name=name, seconds=time.monotonic() - began))
            advance(1.0, results[-1].name)
    return results


def refuse_if_failed(run: Run) -> None:
    """Run the cheap checks, before anything is written; a CheckFailedError explains the first one that failed."""
    began = time.monotonic()
    run.loaded.model.train(False)  # dropout would change every logit
    subject = _subject(run.config, run.scorer, run.store, sample_documents(run.store, quick=True), run.plan)
    mixed = () if run.mix is None else run.mix.texts()
    subject = replace(subject, disk_bytes=run.disk_space[0], output=run.path, mixed=mixed)
    results = run_checks(subject, CHEAP_CHECKS)
    run.loaded.model.train(run.config.dropout)
    for result in results:
        if result.outcome == "failed":
            raise CheckFailedError(
                f"The check {result.name!r} failed ({result.measured}; expected: {result.expected}). {result.meaning} "
                f"{result.remedy} `cartilha check` shows all of them; --skip_checks trains in spite of it."
            )
    names = ", ".join(result.name for result in results if result.outcome == "passed")
    log.info("Checked before step 1: %s (%.1f s).", names, time.monotonic() - began)


def _subject_of_command(config: CheckConfig) -> Subject:
    store = TokenStore(config.store) if config.store else None
    samples = sample_documents(store, config.quick)
    if len(samples[0]) < 2 or not samples[1]:
        raise UserError("There are too few documents to check with; two held-out and one training document are needed.")
    device = choose_device(config.device)
    # A store of another tokenizer is a failed check, not an error: the other checks use the model's own tokenizer.
    scorer = load_scorer(config.model, store, config, device)
    loaded = scorer.loaded
    refuse_beyond_context(config.block_size, loaded.context_length, config.model)
    batch_tokens = resolve_batch_tokens(config.batch_tokens, config.block_size, device.type)
    shape = StepShape(config.block_size, max(1, batch_tokens // config.block_size))
    size = StateSize.of(loaded.model, resolve_optimizer("auto", batch_tokens))
    plan = plan_run(loaded.model.config, this_machine(device, scorer.dtype), size, shape)
    subject = _subject(config, scorer, store, samples, plan)
    return replace(
        subject, questions=named_questions(QuestionNames.of(config.questions, "--questions"), ReadSettings())
    )


def _subject(
    config: CheckConfig | TrainConfig, scorer: Scorer, store: TokenStore | None, samples: Samples, plan: RunPlan
) -> Subject:
    output = Path(config.output)
    batch_tokens = resolve_batch_tokens(config.batch_tokens, config.block_size, scorer.loaded.model.device.type)
    of_adapter, is_fresh = getattr(config, "lora", None) is not None, config.model.startswith("random:")
    return Subject(
        *(scorer.loaded, scorer.tokenizer, scorer.protocol),
        held_out=samples[0],
        training=samples[1],
        store=store,
        block_size=config.block_size,
        lr=resolve_lr(config.lr, plan.size.num_parameters, batch_tokens, of_adapter=of_adapter, is_fresh=is_fresh),
        optimizer=plan.size.optimizer,
        micro_batch_size=plan.micro_batch_size,
        planned_bytes=plan.memory_bytes,
        disk_bytes=space_needed(plan.size, output)[0],
        output=output,
        quick=not isinstance(config, CheckConfig) or config.quick,
        is_random=is_fresh,
    )


def sample_documents(store: TokenStore | None, quick: bool) -> Samples:
    """The first held-out and the first training documents of a store, or of the primer cut in two."""
    number = SAMPLE_DOCUMENTS_QUICK if quick else SAMPLE_DOCUMENTS
    if store is None:
        texts = list(read_primer())
        return texts[::5][:number], [text for i, text in enumerate(texts) if i % 5][:TRAINING_SAMPLE]
    held_out, training = store.read_documents("validation"), store.read_documents("train")
    return list(islice(held_out, number)), list(islice(training, TRAINING_SAMPLE))
