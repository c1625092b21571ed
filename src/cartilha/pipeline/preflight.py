"""What can be refused from a command's settings alone, within a second: neither torch nor transformers is imported.

The command line asks before it imports the command's module; the command asks again, for callers from Python.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable
from dataclasses import Field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cartilha import config as configs
from cartilha.corpus.sources import HubSource, refuse_to_write_over, resolve_inputs
from cartilha.errors import UserError, log, missing_extra
from cartilha.evaluation.decoding import check_decoding
from cartilha.evaluation.windows import first_tokens
from cartilha.explorer.port import listen
from cartilha.machine.processes import is_main_process, world
from cartilha.model_reference import adapter_base, check_4_bits, resolve_model
from cartilha.runs.decay import decaying
from cartilha.runs.files import check_output, read_status, run_directory
from cartilha.settings import Settings
from cartilha.storage import refuse_to_replace
from cartilha.training.schedule import check_shape
from cartilha.training.trackers import check_tracker
from cartilha.training.update_rules import can_shard, check_lean, check_optimizer
from cartilha.units import parse_amount, parse_duration, parse_share


def preflight(config: Any) -> None:
    """Refuse, with a UserError, settings of a command that cannot work, whatever the model and the text are."""
    before, log.disabled = log.disabled, True  # the command itself gives the notices
    try:
        _check_values(config)
        _check_required(config)
        for check in _CHECKS.get(type(config), ()):
            check(config)
    finally:
        log.disabled = before


# Of each option alone


def _check_values(config: Settings) -> None:
    """Words against those that the option knows, numbers against its bounds, texts against what they stand for."""
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        # In `float | Literal["auto"]` a number is no word; in `Literal[...]` everything must be one.
        literals = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is typing.Literal]
        words = [word for literal in literals for word in typing.get_args(literal)]
        if words and value not in words and (hint in literals or isinstance(value, str)):
            raise UserError(f"--{item.name} must be one of {', '.join(words)}, not {value!r}.")
        if isinstance(value, int | float):
            _check_bounds(item, value)
        if item.name in _TEXTS and value is not None:
            _TEXTS[item.name](value)
        if "writes" in item.metadata and value:
            refuse_to_replace(item.name, Path(value), item.metadata["writes"])
        if item.name in _EXTRAS and value:
            _check_extra(*_EXTRAS[item.name])


def _check_required(config: Settings) -> None:
    for item in fields(config):
        if item.metadata.get("required") and not getattr(config, item.name):
            raise UserError(f"--{item.name} is missing; give {item.metadata['help']}.")


def _check_bounds(item: Field[Any], value: float) -> None:
    known = item.metadata
    most = known.get("maximum", math.inf)
    if "above" in known and not (known["above"] < value <= most and value < math.inf):
        allowed = f"above {known['above']}" + (f" and at most {most}" if "maximum" in known else "")
        raise UserError(f"--{item.name} must be a number {allowed}, not {value}.")
    if "minimum" in known and not known["minimum"] <= value <= most:
        allowed = "between {minimum} and {maximum}" if "maximum" in known else "{minimum} or more"
        raise UserError(f"--{item.name} must be {allowed.format_map(known)}, not {value}.")


_TEXTS: dict[str, Callable[[str], object]] = {
    "embeddings_first": lambda text: parse_share(text, "embeddings_first"),
    "optimizer": check_optimizer,
    "protocol": first_tokens,
    "schedule": check_shape,
    "time_budget": parse_duration,
    "tracker": check_tracker,
    "validate_every": lambda text: parse_amount(text, "--validate_every"),
}
_EXTRAS = {
    "lora": ("peft", "A LoRA adapter (--lora)", "adapters"),
    "continuations": ("sacrebleu", "The measure chrF or BLEU (sacrebleu)", "eval"),
    "near_duplicates": ("rensa", "The search for near-duplicates", "text"),
    "tasks": ("lm_eval", "A downstream task", "eval"),
}


# What several commands share


def _check_places(config: Any) -> None:
    """The store, the text and the models that a command names."""
    if getattr(config, "store", None):
        from cartilha.tokens.store_checks import read_store_info  # with pyarrow, which not every command needs

        read_store_info(Path(config.store))
    sources = resolve_inputs(getattr(config, "input", ()))
    for source in sources:
        if isinstance(source, HubSource):
            _check_extra("datasets", f"hf:{source.name}", "hub")
    refuse_to_write_over(sources, config)
    models = config.model if hasattr(config, "model") else config.models
    for ref in [models] if isinstance(models, str) else models:
        resolve_model(ref)


def _check_extra(module: str, what: str, extra: str) -> None:
    if find_spec(module) is None:
        raise missing_extra(what, extra)


def _check_batch(config: configs.TrainConfig | configs.PlanConfig) -> None:
    block_size, batch_tokens = config.block_size, config.batch_tokens
    if block_size is not None and batch_tokens != "auto" and (batch_tokens < block_size or batch_tokens % block_size):
        lower = max(1, batch_tokens // block_size) * block_size
        raise UserError(
            f"batch_tokens ({batch_tokens}) must be a multiple of block_size ({block_size}); "
            f"use --batch_tokens {lower}."
        )


def _check_adapter(config: configs.TrainConfig | configs.PlanConfig) -> None:
    if config.lora is None:
        for name, value in (("lora_embeddings", config.lora_embeddings), ("lora_base", config.lora_base != "float32")):
            if value:
                raise UserError(f"--{name} is about an adapter; give its rank with --lora, or leave --{name} out.")
    if isinstance(config, configs.PlanConfig):
        return
    if config.lora_base == "4bit":
        if config.device != "auto":
            check_4_bits(config.device)
        _check_extra("bitsandbytes", "A base of 4 bits (--lora_base 4bit)", "quantization")
    if config.lora_base != "float32" and config.dtype == "float32":
        raise UserError(
            f"A base in {config.lora_base} cannot be computed in float32; leave out --dtype float32, or --lora_base."
        )
    frozen = config.lora is not None and not config.lora_embeddings
    if frozen and parse_share(config.embeddings_first, "embeddings_first"):
        raise UserError("--embeddings_first trains the embeddings, which --lora freezes; add --lora_embeddings.")


# Commands


def _job(config: configs.RunConfig) -> None:
    from cartilha.preparation.request import read_request

    if not config.output:
        raise UserError("A job needs a place for its store, run and report; name a directory with --output.")
    prepare = replace(config.prepare, model=config.model, output=str(Path(config.output) / "store"))
    for stage in (prepare, config.train, config.generate):
        _check_values(stage)
    _check_required(prepare)
    read_request(prepare)
    _check_places(config)
    _check_adapter(config.train)
    _check_batch(config.train)
    _check_context(config.train)
    _check_memory(config.train)
    _check_mix(replace(config.train, store=prepare.output))
    check_decoding(config.generate)


def _train(config: configs.TrainConfig) -> None:
    output, resume = Path(config.output), config.resume == "auto"
    if resume and read_status(output) == "finished":  # store and model may have been removed since
        return
    if is_main_process():  # the others may come when the first has begun to write there
        check_output(output, resume)
    _check_places(config)
    _check_context(config)
    _check_memory(config)
    _check_mix(config)
    _check_shard(config)
    decaying(config)


def _check_shard(config: configs.TrainConfig) -> None:
    if config.shard != "full" or world()[1] == 1:
        return
    if config.lora_base == "4bit":
        raise UserError(
            "A base of 4 bits is held whole by each process; leave out --shard full, or use --lora_base bfloat16."
        )
    if not can_shard(config.optimizer):
        raise UserError(
            f"--optimizer {config.optimizer} works on whole weights, and no process holds one with --shard full; use "
            "--optimizer adamw, or --shard none."
        )


def _check_context(config: configs.TrainConfig) -> None:
    if config.context is None:
        return
    if config.lora is not None:
        raise UserError("An adapter cannot carry a longer context to its base; leave out --context, or --lora.")
    if config.block_size > config.context:
        raise UserError(
            f"--block_size {config.block_size} is beyond --context {config.context}; use the same for both."
        )


def _check_memory(config: configs.TrainConfig | configs.PlanConfig) -> None:
    if config.memory == "lean":
        check_lean(config.optimizer)
        if config.lora is not None:
            raise UserError("--memory lean trains all weights; with --lora use --lora_base bfloat16 instead.")
        if getattr(config, "dtype", "auto") == "float32":
            raise UserError("--memory lean computes in half precision; use --memory full or another --dtype.")
        if getattr(config, "shard", "none") == "full":
            raise UserError("Lean weights are not sharded; use --memory full, or --shard none.")


def _check_mix_of(mix: tuple[str, ...], store: str | None) -> None:
    """The mixture of a command that does not train."""
    if mix and not store:
        raise UserError("--mix needs the store that gets the rest of the tokens; name it with --store.")
    _check_mix(configs.TrainConfig(store=store or "", mix=mix))


def _check_mix(config: configs.TrainConfig) -> None:
    if not config.mix_end and config.mix_end_fraction != configs.TrainConfig.mix_end_fraction:
        raise UserError("--mix_end_fraction is for the shares of --mix_end, which are missing; give both, or neither.")
    if config.mix or config.mix_end:
        from cartilha.runs.sources import check_sources  # with pyarrow, which not every command needs

        check_sources(config)


def _plan(config: configs.PlanConfig) -> None:
    known = ("auto", *configs.PLANNED_DEVICES)
    for name in config.device:
        if name not in known:
            raise UserError(f"There is no device {name!r} to plan for; choose from {', '.join(known)}.")
    _check_mix_of(config.mix, config.store)
    if config.expect and not config.store:
        raise UserError("--expect trains on a store for a few steps; name one with --store STORE.")


def _scored_text(config: configs.EvaluateConfig | configs.CompareConfig) -> None:
    if config.stride is not None and config.stride > (config.window or config.stride):
        raise UserError(f"The stride must lie between 1 and the window ({config.window}), not {config.stride}.")
    if not config.store and not config.input:
        if getattr(config, "tasks", ()):  # they bring their own texts
            return
        raise UserError("There is no text to score; give --store STORE (its validation side) or --input REF.")


def _evaluate(config: configs.EvaluateConfig) -> None:
    if not config.model:
        raise UserError("There is no model to evaluate; name one or more with --model.")
    if config.save and len(config.model) != 1:
        raise UserError("--save keeps the evaluation of one model; name one with --model.")
    if config.near_duplicates and not config.store:
        raise UserError("--near_duplicates needs the training text to look in; name its store with --store.")
    _check_record(config)
    of_text = [name for name in ("save", "per_token", "continuations") if getattr(config, name)]
    if of_text and not config.store and not config.input:
        raise UserError(f"--{of_text[0]} needs a text to score; give --store STORE or --input REF.")
    for task in config.tasks:
        if Path(task).suffix in (".yaml", ".yml") and not Path(task).is_file():
            raise UserError(f"There is no task file {task}; give one of the harness's YAML files, or a task's name.")
    # Under torchrun the documents are shared out; what must see all of them in one place is refused by name.
    alone = [name for name in ("per_token", "continuations", "tasks") if getattr(config, name)]
    if alone and world()[1] > 1:
        raise UserError(f"--{alone[0]} works in one process only; run it without torchrun.")


def _check_record(config: configs.EvaluateConfig) -> None:
    if config.record is None:
        return
    if not config.tasks:
        raise UserError("--record keeps the scores of tasks; name them with --tasks, such as --tasks pt.")
    if config.model != configs.EvaluateConfig().model:
        raise UserError("--record takes the run's own two models, before and after; leave --model out.")
    run = run_directory(config.record)
    if read_status(run) != "finished":
        raise UserError(f"{run} is not a finished run; name the directory of a training that has ended.")
    _check_model_of(run)


def _compare(config: configs.CompareConfig) -> None:
    if (len(config.models), len(config.evaluations)) not in ((2, 0), (0, 2)):
        raise UserError("Name two models with --model A B, or two saved evaluations with --evaluations A B.")
    if config.evaluations:
        from cartilha.evaluation.saved import load_evaluation  # with pyarrow, which not every command needs

        for path in config.evaluations:
            load_evaluation(Path(path))
    else:
        _scored_text(config)
        _check_places(config)


def _vocab(config: configs.VocabConfig) -> None:
    if config.extend is not None:
        if config.advise:
            raise UserError("--advise tries several sizes by itself; leave out either it or --extend.")
        if not config.output:
            raise UserError("There is no place for the extended model; name a directory with --output.")
        output = Path(config.output)
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            raise UserError(f"{config.output} holds something already; choose another --output for the extended model.")


def _inspect(config: configs.InspectConfig) -> None:
    if config.mix and config.block is None:
        raise UserError("--mix is for the blocks of a mixture; say which one with --block.")
    _check_mix_of(config.mix, config.what)


def _explore(config: configs.ExploreConfig) -> None:
    _check_mix_of(config.mix, config.store)
    if not config.models and not config.store:
        raise UserError("There is nothing to explore; name one or two models with --model, or a store with --store.")
    if len(config.models) > 2:
        raise UserError(f"The page compares 2 models at most, not {len(config.models)}; leave some out.")
    if config.proxy and not re.fullmatch(r"https?://[\w.-]+(:\d+)?/?", config.proxy):
        raise UserError(f"{config.proxy} is no address of a proxy; give --proxy one such as https://host.example.")
    _check_extra("gradio", "The explorer", "explorer")
    listen(config.port).close()


def _merge(config: configs.MergeConfig) -> None:
    run = run_directory(config.run)
    source = resolve_model(str(run))
    folder = source.path if source.kind == "directory" else None
    if folder is None or not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{config.run} is not a directory with a trained model; name that of a run.")
    if config.add is None:
        if adapter_base(folder) is None:
            raise UserError(
                f"{config.run} holds a whole model and no adapter, so there is nothing to merge; add an "
                "instruction-tuned model with --add."
            )
        if config.base is not None:
            raise UserError("--base is the model that --add subtracts; give --add too, or leave --base out.")
    elif config.base is None and not (run / "results.json").is_file():
        raise UserError(f"{config.run} does not record what it was trained from; name that model with --base.")
    for name, reference in (("add", config.add), ("base", config.base)):
        if reference is not None:
            other = resolve_model(reference)
            if other.kind == "random" or (other.path is not None and adapter_base(other.path) is not None):
                raise UserError(f"--{name} takes a whole model with files, not {reference}; merge an adapter first.")
    output = Path(config.output or run / ("instruct" if config.add else "merged"))
    if output.exists():
        raise UserError(f"{output} is there already; choose another --output for the merged model.")
    _check_places(configs.EvaluateConfig(model=(), store=config.store))


def _push(config: configs.PushConfig) -> None:
    folder = run_directory(config.run) / "model"
    if (base := adapter_base(folder)) is not None:
        if resolve_model(base).kind != "hub":
            raise UserError(
                f"{folder} holds an adapter of {base}, which is not on the hub; push the whole model, which "
                f"`cartilha merge {config.run}` makes."
            )
    else:
        _check_model_of(run_directory(config.run))


def _check_model_of(run: Path) -> None:
    folder = run / "model"
    if adapter_base(folder) is None and not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no trained model; `cartilha train --resume auto` finishes a run.")


# Commands that import neither torch nor transformers check the rest themselves.
_CHECKS: dict[type[Any], tuple[Callable[[Any], None], ...]] = {
    configs.RunConfig: (_job,),
    configs.TrainConfig: (_check_adapter, _check_batch, _train),
    configs.CheckConfig: (_check_places,),
    configs.PlanConfig: (_plan, _check_adapter, _check_batch, _check_memory, _check_places),
    configs.InspectConfig: (_inspect,),
    configs.EvaluateConfig: (_evaluate, _scored_text, _check_places),
    configs.CompareConfig: (_compare,),
    configs.GenerateConfig: (check_decoding, _check_places),
    configs.VocabConfig: (_vocab, _check_places),
    configs.ExploreConfig: (_explore, _check_places),
    configs.MergeConfig: (_merge,),
    configs.PushConfig: (_push,),
}
