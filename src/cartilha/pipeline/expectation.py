"""`plan --expect`: what ten minutes, an hour and a day of training would bring, from short trainings here."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cartilha.checks.training import weights_kept
from cartilha.config import GenerateConfig, PlanConfig, TrainConfig
from cartilha.console import progress
from cartilha.errors import UserError, counted, log
from cartilha.evaluation.corpus import score_in_shares
from cartilha.evaluation.measures import Evaluation, make_evaluation
from cartilha.machine.devices import seed_everything
from cartilha.model.compiling import CompiledBody, training_body
from cartilha.option_groups import AdapterOptions
from cartilha.runs.setup import Run, assemble
from cartilha.settings import options
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.power_law import expected_losses
from cartilha.training.state import Progress
from cartilha.units import show_duration

SHORTEST = {"cpu": (4, 8192)}  # steps of the shortest training, and its tokens where the text has enough
SHORTEST_ON_A_CARD = (32, 262_144)
HELD_OUT_TOKENS = 16_384  # scored before and after each of them
FRESH = 0.9  # of the loss of a uniform model: what is above has learnt nothing yet
DURATIONS = (600, 3600, 86_400)  # seconds
SHARED = ("model", "mix", "batch_tokens", "optimizer", "memory", "gradient_checkpointing")  # options of both commands


def expect(config: PlanConfig) -> dict[str, Any]:
    """Train a few times for a few steps, and say what longer trainings would bring.

    A UserError says that the text is too small for that.
    """
    assert config.store is not None
    names = [*SHARED, *(item.name for item in options(AdapterOptions))]
    asked = {name: getattr(config, name) for name in names}
    asked |= {"block_size": config.block_size or 512, "validation_tokens": HELD_OUT_TOKENS}
    run = assemble(TrainConfig(**asked, store=config.store, output="."), Path(), GenerateConfig(), resume=False)
    tokens_each, steps = run.sampler.tokens_per_step, _numbers_of_steps(run)
    if run.sampler.steps_per_epoch < steps[-1]:
        raise UserError(
            f"The training text is {counted(run.sampler.steps_per_epoch, 'step')} of "
            f"{counted(tokens_each, 'token')}, and --expect trains on {steps[-1]}; give more text or a "
            "smaller --batch_tokens."
        )
    held_out = int(run.validation.num_tokens.sum())
    work = sum(steps) * tokens_each + (1 + len(steps)) * held_out / 3  # scoring is the forward pass alone
    log.info(
        "Training %s steps of %s each, and scoring %s before and after each of the %d trainings: about %s.",
        *(", ".join(map(str, steps)), counted(tokens_each, "token"), counted(held_out, "held-out token"), len(steps)),
        show_duration(max(1.0, work / run.plan.tokens_per_second)),
    )
    started = time.perf_counter()
    before = _measured(run)
    if before.bits_per_byte is None:
        raise UserError(
            "--expect gives bits per byte, which are refused for this held-out text; `cartilha evaluate --store "
            f"{config.store}` says why."
        )
    body = training_body(run.loaded.model, "auto", steps[-1])
    trained = [_trained(run, num_steps, body) for num_steps in steps]
    rate = trained[-1]["tokens_per_second"]
    log.info("That took %s; %s tokens/s.", show_duration(time.perf_counter() - started), f"{rate:,.0f}")
    whole = run.sampler.targets_per_epoch
    longer = [int(seconds * rate) for seconds in DURATIONS if seconds * rate < whole]
    at = longer if len(longer) == len(DURATIONS) else [*longer, whole]
    measured = [row["bits_per_byte"] for row in trained]
    if min(measured) >= before.bits_per_byte:
        log.warning("None of these trainings left the model better than before, so nothing can be foreseen.")
        at = []
    elif before.total.loss > FRESH * math.log(run.scorer.vocabulary_size):
        log.warning(
            "The weights of %s are fresh. They first learn how frequent each token is and then wait before they learn "
            "more, which is no power law: nothing can be foreseen.",
            config.model,
        )
        at = []
    found = expected_losses(before.bits_per_byte, [row["tokens"] for row in trained], measured, at)
    return {
        "lr": run.schedule.peak_lr,
        "tokens_per_second": rate,
        "tokens_per_epoch": whole,
        "num_tokens": before.total.num_tokens,
        "num_documents": before.total.num_documents,
        "before": before.bits_per_byte,
        "trained": trained,
        "rows": [_row(number, number / rate, one) for number, one in zip(at, found, strict=True)],
    }


def _numbers_of_steps(run: Run) -> tuple[int, int, int]:
    """Of the trainings, each of which has a schedule of its own."""
    least, least_tokens = SHORTEST.get(run.loaded.model.device.type, SHORTEST_ON_A_CARD)
    enough = -(-least_tokens // run.sampler.tokens_per_step)
    shortest = max(least, min(enough, run.sampler.steps_per_epoch // 4))
    return shortest, 2 * shortest, 4 * shortest


def _row(tokens: int, seconds: float, bits: Sequence[float]) -> dict[str, Any]:
    low, median, high = bits
    return {"seconds": seconds, "tokens": tokens, "bits_per_byte": median, "interval": [low, high]}


def _measured(run: Run) -> Evaluation:
    started = time.perf_counter()
    scores = score_in_shares(run.scorer, run.validation)
    return make_evaluation(run.scorer, run.validation, scores, time.perf_counter() - started)


def _trained(run: Run, num_steps: int, body: CompiledBody | None) -> dict[str, Any]:
    """A training of so many steps with a whole schedule, as `train --max_steps` does it; the weights are put back."""
    for states in run.state.optimizer.state.values():
        for tensor in states.values():
            tensor.zero_()
    state, schedule = replace(run.state, progress=Progress()), replace(run.schedule, num_steps=num_steps)
    settings = StepSettings(run.scorer.dtype, run.plan.micro_batch_size, run.config.max_grad_norm, body=body)
    seed_everything(run.config.seed)
    with weights_kept(run.loaded.model), progress(f"{num_steps} steps", float(num_steps), "steps") as advance:
        records = []
        for record in train_steps(state, run.sampler, schedule, settings):
            records.append(record)
            advance(1)
        evaluation = _measured(run)
    steady = records[1:] or records
    return {
        "steps": num_steps,
        "tokens": records[-1].tokens,
        "seconds": records[-1].total_seconds,
        "tokens_per_second": sum(one.num_targets for one in steady) / math.fsum(one.seconds for one in steady),
        "bits_per_byte": evaluation.bits_per_byte,
    }
