"""`--decay_from`: a copy of a run, from one of its checkpoints on, in which the rate decays at once."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

from cartilha.config import TrainConfig
from cartilha.errors import UserError
from cartilha.runs.files import read_results
from cartilha.storage import new_directory, write_json
from cartilha.training.schedule import DECAY_FRACTION, Schedule

# Settings that the checkpoint's run had not.
SET_BY_DECAY = ("decay_from", "num_steps", "schedule", "time_budget_s", "mix_end", "mix_end_fraction")


def decaying(config: TrainConfig) -> TrainConfig:
    """The settings of a run that goes on from `config.decay_from` and decays: as many steps as WSD has for that.

    A mixture for the end begins at the checkpoint. A UserError names what is not a checkpoint of a run, or one whose
    rate has begun to fall already.
    """
    if config.decay_from is None:
        return config
    for name in ("max_steps", "time_budget"):
        if getattr(config, name) is not None:
            raise UserError(f"--decay_from takes a fifth of all steps for the decay; leave out --{name}.")
    if config.mix_end_fraction != TrainConfig.mix_end_fraction:
        raise UserError("--decay_from begins --mix_end at the checkpoint; leave out --mix_end_fraction.")
    checkpoint = Path(config.decay_from)
    run, name = checkpoint.parent.parent, checkpoint.name.removeprefix("step-")
    if checkpoint.parent.name != "checkpoints" or not name.isdecimal() or not (checkpoint / "manifest.json").is_file():
        raise UserError(f"{checkpoint} is not a checkpoint; name one of a run: RUN/checkpoints/step-00000100.")
    step, trunk = int(name), _schedule_of(run)
    if trunk.lr(step - 1) != trunk.peak_lr or trunk.lr(step) != trunk.peak_lr:
        raise UserError(
            f"The learning rate of {run} is not at its peak at step {step}; --decay_from wants a run with --schedule "
            "wsd or constant, and a checkpoint between its warm-up and its decay."
        )
    # The last fifth of the steps after the warm-up is the decay, and it begins after `step`.
    num_steps = math.ceil(step / (1 - DECAY_FRACTION * (1 - config.warmup_fraction)))
    mix_end_fraction = (num_steps - step) / num_steps if config.mix_end else config.mix_end_fraction
    return replace(config, max_steps=num_steps, schedule="wsd", resume="auto", mix_end_fraction=mix_end_fraction)


def _schedule_of(run: Path) -> Schedule:
    try:
        settings = read_results(run)["settings"]
        return Schedule(
            num_steps=settings["num_steps"],
            peak_lr=settings["lr"],
            warmup_fraction=settings["warmup_fraction"],
            final_lr_fraction=settings["final_lr_fraction"],
            shape=settings.get("schedule", "cosine"),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{run}/results.json is damaged ({error!r} in it), so it cannot be decayed from.") from error


def copy_trunk(checkpoint: str, output: Path) -> None:
    """Begin the run in `output` with one checkpoint of another run, and with that run's history."""
    from cartilha.training.checkpoint import has_states  # which loads torch, and no other command needs it

    run = Path(checkpoint).parent.parent
    if not has_states(Path(checkpoint)):
        raise UserError(
            f"{checkpoint} has no optimizer states, which a run drops when it is finished; take an unfinished run, or"
            " one that was trained with --keep_optimizer."
        )
    with new_directory(output / "checkpoints" / Path(checkpoint).name) as temporary:
        shutil.copytree(checkpoint, temporary, dirs_exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run / name).is_file():
            shutil.copyfile(run / name, output / name)
    write_json(output / "results.json", {**read_results(run), "status": "running", "name": output.name})
