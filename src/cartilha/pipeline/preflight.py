"""What can be refused from a command's settings alone, within a second: neither torch nor transformers is imported.

The command line asks before it imports the command's module; the command asks again, for callers from Python.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cartilha import config as configs
from cartilha.corpus.sources import HubSource, resolve_inputs
from cartilha.errors import UserError, missing_extra
from cartilha.evaluation.decoding import check_decoding
from cartilha.evaluation.windows import first_tokens
from cartilha.explorer.port import listen
from cartilha.machine.processes import is_main_process, world
from cartilha.model_reference import resolve_model
from cartilha.runs.files import check_output, read_status, run_directory
from cartilha.training.trackers import check_tracker
from cartilha.units import parse_duration, parse_share

log = logging.getLogger("cartilha")

MAX_EXPLORED_MODELS = 2


def preflight(config: Any) -> None:
    """Refuse settings that cannot work, whatever the model and the text are.

    Args:
        config: A command's configuration.

    Raises:
        UserError: A value out of its range, a path that is not there, a missing extra, or two options that exclude
            each other.
    """
    with _quietly():
        _check_values(config)
        if type(config) in _CHECKS:
            _CHECKS[type(config)](config)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without notices: the command itself gives them."""

    def reject(record: logging.LogRecord) -> bool:
        return False

    log.addFilter(reject)
    try:
        yield
    finally:
        log.removeFilter(reject)


def _check_values(config: Any) -> None:
    """Numbers against the least that their option allows, words against those that it knows."""
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, minimum, hint = getattr(config, item.name), item.metadata.get("minimum"), hints[item.name]
        if minimum is not None and isinstance(value, int | float) and not value >= minimum:
            raise UserError(f"{item.name} must be {minimum} or more, not {value}.")
        if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
            raise UserError(f"{item.name} must be one of {', '.join(typing.get_args(hint))}, not {value!r}.")


# What several commands share


def _check_store(path: str | None) -> None:
    if path is None:
        return
    from cartilha.tokens.store import read_store_info  # with pyarrow, which not every command needs

    read_store_info(Path(path))


def _check_text(refs: tuple[str, ...]) -> None:
    for source in resolve_inputs(refs):
        if isinstance(source, HubSource):
            _check_extra("datasets", f"hf:{source.name}", "hub")


def _check_extra(module: str, what: str, extra: str) -> None:
    if find_spec(module) is None:
        raise missing_extra(what, extra)


def _check_block(block_size: int) -> None:
    if block_size < 2:
        raise UserError(f"A block size of {block_size} is too small; use 2 or more, 512 as a rule.")


def _check_batch(block_size: int, batch_tokens: int) -> None:
    _check_block(block_size)
    if batch_tokens < block_size or batch_tokens % block_size:
        lower = max(1, batch_tokens // block_size) * block_size
        raise UserError(
            f"batch_tokens ({batch_tokens}) must be a multiple of block_size ({block_size}); "
            f"use --batch_tokens {lower}."
        )


def _check_rate(rate: float | str, name: str) -> None:
    if (isinstance(rate, str) and rate != "auto") or (not isinstance(rate, str) and not 0 < rate < math.inf):
        raise UserError(f"The {name} must be a number above 0, not {rate}.")


def _check_file_to_write(path: str | None, name: str) -> None:
    if path is not None and Path(path).is_dir():
        raise UserError(f"--{name} {path} is a directory; name a file.")


# Commands


def _job(config: configs.RunConfig) -> None:
    from cartilha.preparation.request import plan

    if not config.output:
        raise UserError("A job needs a place for its store, run and report; name a directory with --output.")
    for stage in (config.prepare, config.train, config.generate):
        _check_values(stage)
    plan(replace(config.prepare, model=config.model, output=str(Path(config.output) / "store")))
    resolve_model(config.model)
    _training(config.train)
    check_decoding(config.generate)


def _train(config: configs.TrainConfig) -> None:
    if not config.store or not config.output:
        raise UserError("Training needs --store STORE and --output RUN.")
    _training(config)
    output, resume = Path(config.output), config.resume == "auto"
    if resume and read_status(output) == "finished":  # store and model may have been removed since
        return
    if is_main_process():  # the others may come when the first has begun to write there
        check_output(output, resume)
    _check_store(config.store)
    resolve_model(config.model)


def _training(config: configs.TrainConfig) -> None:
    """What a training is asked for, but for its paths, which a job sets itself."""
    _check_batch(config.block_size, config.batch_tokens)
    parse_duration(config.time_budget)
    if not 0 <= config.seed < 2**63:
        raise UserError(f"The seed must lie between 0 and 2**63 - 1, not {config.seed}.")
    if not config.max_grad_norm > 0:
        raise UserError(f"max_grad_norm must be above 0, not {config.max_grad_norm}; use a large one to clip nothing.")
    _check_rate(config.lr, "learning rate")
    _check_rate(config.embeddings_lr, "embeddings' learning rate")
    parse_share(config.embeddings_first, "embeddings_first")
    if not 0 <= config.warmup_fraction <= 1 or not 0 <= config.final_lr_fraction <= 1:
        raise UserError("warmup_fraction and final_lr_fraction must lie between 0 and 1.")
    check_tracker(config.tracker)


def _check(config: configs.CheckConfig) -> None:
    _check_block(config.block_size)
    _check_rate(config.lr, "learning rate")
    _check_store(config.store)
    resolve_model(config.model)


def _plan(config: configs.PlanConfig) -> None:
    known = ("auto", *configs.PLANNED_DEVICES)
    for name in config.device:
        if name not in known:
            raise UserError(f"There is no device {name!r} to plan for; choose from {', '.join(known)}.")
    if config.block_size is not None:
        _check_batch(config.block_size, config.batch_tokens)
    _check_store(config.store)
    resolve_model(config.model)


def _scored_text(config: configs.EvaluateConfig | configs.CompareConfig) -> None:
    first_tokens(config.protocol)
    if config.window is not None and config.window < 1:
        raise UserError(f"A window of {config.window} is impossible; use --window 1 or more.")
    if config.stride is not None and not 1 <= config.stride <= (config.window or config.stride):
        raise UserError(f"The stride must lie between 1 and the window ({config.window}), not {config.stride}.")
    if not config.store and not config.input:
        raise UserError("There is no text to score; give --store STORE (its validation side) or --input REF.")
    _check_store(config.store)
    _check_text(config.input)


def _evaluate(config: configs.EvaluateConfig) -> None:
    _scored_text(config)
    if not config.model:
        raise UserError("There is no model to evaluate; name one or more with --model.")
    if config.save and len(config.model) != 1:
        raise UserError("--save keeps the evaluation of one model; name one with --model.")
    if config.near_duplicates:
        if not config.store:
            raise UserError("--near_duplicates needs the training text to look in; name its store with --store.")
        _check_extra("rensa", "The search for near-duplicates", "text")
    if config.continuations is not None:
        _check_extra("sacrebleu", "The measure chrF or BLEU (sacrebleu)", "eval")
    if config.tasks:
        _check_extra("lm_eval", "A downstream task", "eval")
    for task in config.tasks:
        if Path(task).suffix in (".yaml", ".yml") and not Path(task).is_file():
            raise UserError(f"There is no task file {task}; give one of the harness's YAML files, or a task's name.")
    for name in ("save", "per_token"):
        _check_file_to_write(getattr(config, name), name)
    # Under torchrun the documents are shared out; what must see all of them in one place is refused by name.
    alone = [name for name in ("per_token", "continuations", "tasks") if getattr(config, name)]
    if alone and world()[1] > 1:
        raise UserError(f"--{alone[0]} works in one process only; run it without torchrun.")
    for ref in config.model:
        resolve_model(ref)


def _compare(config: configs.CompareConfig) -> None:
    if (len(config.models), len(config.evaluations)) not in ((2, 0), (0, 2)):
        raise UserError("Name two models with --model A B, or two saved evaluations with --evaluations A B.")
    if config.evaluations:
        from cartilha.evaluation.saved import load_evaluation  # with pyarrow, which not every command needs

        for path in config.evaluations:
            load_evaluation(Path(path))
        return
    _scored_text(config)
    for ref in config.models:
        resolve_model(ref)


def _generate(config: configs.GenerateConfig) -> None:
    check_decoding(config)
    resolve_model(config.model)


def _vocab(config: configs.VocabConfig) -> None:
    if not config.input:
        raise UserError("There is no text; name files, a dataset or the primer with --input.")
    if config.advise and config.extend is not None:
        raise UserError("--advise tries several sizes by itself; leave out either it or --extend.")
    parse_duration(config.time_budget)
    if config.extend is not None:
        if config.extend < 1:
            raise UserError(f"--extend must be 1 or more, not {config.extend}.")
        if not config.output:
            raise UserError("There is no place for the extended model; name a directory with --output.")
        output = Path(config.output)
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            raise UserError(f"{config.output} holds something already; choose another --output for the extended model.")
    _check_text(config.input)
    resolve_model(config.model)


def _explore(config: configs.ExploreConfig) -> None:
    if not config.models and not config.store:
        raise UserError("There is nothing to explore; name one or two models with --model, or a store with --store.")
    if len(config.models) > MAX_EXPLORED_MODELS:
        raise UserError(
            f"The page compares {MAX_EXPLORED_MODELS} models at most, not {len(config.models)}; leave some out."
        )
    _check_extra("gradio", "The explorer", "explorer")
    listen(config.port).close()
    _check_store(config.store)
    for ref in config.models:
        resolve_model(ref)


def _push(config: configs.PushConfig) -> None:
    folder = run_directory(config.run) / "model"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{config.run} holds no trained model ({folder} is missing); `cartilha train --resume auto` finishes a run."
        )


# Commands that import neither torch nor transformers check the rest themselves.
_CHECKS: dict[type[Any], Callable[[Any], None]] = {
    configs.RunConfig: _job,
    configs.TrainConfig: _train,
    configs.CheckConfig: _check,
    configs.PlanConfig: _plan,
    configs.EvaluateConfig: _evaluate,
    configs.CompareConfig: _compare,
    configs.GenerateConfig: _generate,
    configs.VocabConfig: _vocab,
    configs.ExploreConfig: _explore,
    configs.PushConfig: _push,
}
