"""What a run directory says, read leniently: the report matters most for a run that was killed or still goes on.

What is absent or unreadable becomes None or empty, and `RecordedRun.missing` names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cartilha.errors import UserError
from cartilha.reporting.lenient import (
    Record,
    by_name,
    integer,
    interval,
    items,
    many,
    mapping,
    number,
    read_lines,
    read_object,
    read_text,
    record,
    text,
)
from cartilha.reporting.surprisal import read_surprisal

T = TypeVar("T")
FORMAT_VERSION = 1
RUN_FILES = ("results.json", "metrics.jsonl", "samples.jsonl", "config.yaml")
EXPECTED_KEYS = ("status", "settings", "corpus", "packing", "epochs", "evaluations", "machine", "versions")
STATUSES = ("running", "finished", "interrupted", "out_of_memory", "failed")

SETTINGS = record(
    model=text,
    store=text,
    block_size=integer,
    epochs=integer,
    max_steps=integer,
    num_steps=integer,
    batch_tokens=integer,
    blocks_per_step=integer,
    micro_batch_size=integer,
    lr=number,
    seed=integer,
    dtype=text,
    device=text,
    optimizer=text,
    schedule=text,
    warmup_fraction=number,
    final_lr_fraction=number,
    mix_in_words=text,
    mix_end_in_words=text,
    patience=integer,
)
CORPUS = record(
    num_train_documents=integer,
    num_train_tokens=integer,
    num_validation_documents=integer,
    num_validation_tokens=integer,
    train_hash=text,
    validation_hash=text,
    tokenizer_fingerprint=text,
    language=text,
)
STEP = record(step=integer, loss=number, lr=number, tokens_per_second=number, memory_bytes=integer)
PROTOCOL = record(name=text, window=integer, stride=integer, prefix_id=integer, dtype=text, hash=text)
CHANGE = record(
    doc_id=text, domain=text, begins=text, num_bytes=integer, bits_per_byte_first=number, bits_per_byte_second=number
)
COMPARISON = record(
    steps=many(integer),
    bits_per_byte_difference=number,
    bits_per_byte_difference_interval=interval,
    p_value=number,
    share_improved=number,
    num_documents=integer,
    gained_most=many(CHANGE),
    lost_most=many(CHANGE),
)
DOMAIN = record(perplexity=number, bits_per_byte=number, num_documents=integer, num_bytes=integer)


def _positions(value: Any) -> dict[int, float]:
    """The mean loss of the tokens from each position in their documents up to the next."""
    rows = [(integer(row.get("from")), number(row.get("loss"))) for row in map(mapping, items(value))]
    return {begin: loss for begin, loss in rows if begin is not None and loss is not None}


EVALUATION = record(
    model=text,
    step=integer,
    perplexity=number,
    word_perplexity=number,
    bits_per_byte=number,
    bits_per_byte_interval=interval,
    bits_per_char=number,
    num_tokens=integer,
    num_bytes=integer,
    num_documents=integer,
    seconds=number,
    protocol=PROTOCOL,
    baselines=by_name(by_name(number)),
    domains=by_name(DOMAIN),
    positions=_positions,
)
ENGLISH = record(
    before=lambda value: EVALUATION(value) if isinstance(value, dict) else None,
    after=lambda value: EVALUATION(value) if isinstance(value, dict) else None,
    bits_per_byte_difference=number,
    bits_per_byte_difference_interval=interval,
)
SHARE = record(name=text, word=text, pool=number, chosen=number)
SELECTION = record(
    num_documents=integer,
    num_tokens=integer,
    pool_documents=integer,
    pool_tokens=integer,
    target_documents=integer,
    target_tokens=integer,
    divergence=by_name(number),
    histogram=record(edges=many(number), pool=many(integer), chosen=many(integer)),
    shares=by_name(many(SHARE)),
    words=by_name(many(SHARE)),
    highest=many(record(doc_id=text, weight=number, begins=text)),
    lowest=many(record(doc_id=text, weight=number, begins=text)),
)
SOURCE = record(
    store=text, domain=text, share=number, end_share=number, documents_read=integer, tokens_read=integer, passes=number
)
TASK_SCORE = record(
    task=text,
    metric=text,
    num_questions=integer,
    higher_is_better=lambda value: value is not False,
    before=number,
    before_interval=interval,
    after=number,
    after_interval=interval,
    difference=number,
    difference_interval=interval,
)
TASKS = record(lists=by_name(integer), harness=text, scores=many(TASK_SCORE))
UTILIZATION = record(mfu=number, mfu_without_attention=number, peak_flops=number, peak=text)
RUN = record(
    name=text,
    status=lambda value: value if value in STATUSES else "unknown",
    error=text,
    resumed_from_step=many(integer),
    settings=SETTINGS,
    corpus=CORPUS,
    packing=record(num_blocks=integer, padding_share=number),
    epochs=many(record(epoch=integer, train_loss=number, validation_loss=number, seconds=number)),
    samples=many(record(step=integer, prompt=text, text=text, mode=text)),
    comparison=lambda value: COMPARISON(value) if isinstance(value, dict) else None,
    sources=many(SOURCE),
    tasks=TASKS,
    energy=record(joules=number, seconds=number, source=text),
    english=lambda value: ENGLISH(value) if isinstance(value, dict) else None,
    ended_by=text,
    model_step=integer,
    selection=lambda value: SELECTION(value) if isinstance(value, dict) else None,
    plan=record(
        micro_batch_size=integer,
        memory_bytes=integer,
        available_bytes=integer,
        tokens_per_second=number,
        utilization=UTILIZATION,
    ),
    tokens_per_second=number,
    tokens_per_second_after_first_step=number,
    utilization=UTILIZATION,
    memory_bytes=integer,
    seconds=number,
    notices=many(text),
    machine=by_name(lambda value: value),
    versions=by_name(lambda value: value),
)


class RecordedRun(Record):
    """Everything that the run directory `path` says: what `RUN` reads, `surprisal`, the text of `config`, and these.

    Attributes:
        name: By default its directory's.
        status: One of `STATUSES`, or `unknown` if there is no `results.json`.
        steps: In order of step; if a resumed run repeated a step, its later record.
        evaluations: In order of step: those of `results.json`, and those that only `metrics.jsonl` has.
        before, after: The latest evaluations before and after training began that may be compared, none of them after
            the step whose weights `RUN/model` holds; if there is no such pair, the first and the last. `after` may be
            older than the last step. Either may be None.
        missing: What was absent or unreadable, such as `samples.jsonl` or `results.json: epochs`.
    """

    @property
    def batch(self) -> int | None:
        """Blocks per optimizer step."""
        settings = self.settings
        blocks: int | None = settings.blocks_per_step
        if blocks is None and settings.batch_tokens and settings.block_size:
            return int(settings.batch_tokens // settings.block_size)
        return blocks

    @property
    def device_name(self) -> str | None:
        """The device as people call it, else its type."""
        return text(self.machine.get("device_name")) or self.settings.device


def load_run(path: str | Path) -> RecordedRun:
    """Read a run directory, whatever state it is in; a UserError says that it is none, or of a newer cartilha."""
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"There is no run directory {path}; give the --output directory of a `cartilha train`.")
    if not any((directory / name).is_file() for name in RUN_FILES):
        raise UserError(f"{path} is not a run directory: it has none of {', '.join(RUN_FILES)}.")
    missing: list[str] = []
    results = _read_results(directory, missing)
    metrics = read_lines(directory / "metrics.jsonl", missing)
    config = read_text(directory / "config.yaml", missing)
    results["settings"] = results.get("settings") or _settings_of_config(config)
    results["samples"] = read_lines(directory / "samples.jsonl", missing)
    surprisal = read_surprisal(directory / "surprisal.parquet", missing)
    results["plan"] = read_object(directory / "plan.json", missing)
    run = RecordedRun(path=directory, config=config, surprisal=surprisal, missing=missing, **vars(RUN(results)))
    run.name = run.name or directory.resolve().name
    run.steps = _steps(metrics)
    run.evaluations = _evaluations(results, metrics)
    # The result is that of the weights in RUN/model, which may not be the last ones.
    last = math.inf if run.model_step is None else run.model_step
    run.before, run.after = _headline([one for one in run.evaluations if (one.step or 0) <= last])
    return run


def _read_results(directory: Path, missing: list[str]) -> dict[str, Any]:
    if (results := read_object(directory / "results.json", missing)) is None:
        return {}
    version = integer(results.get("format_version"))
    if version is not None and version > FORMAT_VERSION:
        raise UserError(
            f"{directory} was written by a newer cartilha (format {version}, this one reads {FORMAT_VERSION}); "
            "upgrade with: pip install --upgrade cartilha"
        )
    missing.extend(f"results.json: {key}" for key in EXPECTED_KEYS if key not in results)
    return results


def _settings_of_config(config: str | None) -> dict[str, Any]:
    """The training settings in `config.yaml`, for a run without `results.json`."""
    try:
        loaded = mapping(yaml.safe_load(config or ""))
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        return {}
    return {**loaded, **mapping(loaded.get("train"))}


def _steps(metrics: list[dict[str, Any]]) -> list[Record]:
    found = map(STEP, (line for line in metrics if "evaluation" not in line))
    by_step = {one.step: one for one in found if one.step is not None}
    return [by_step[step] for step in sorted(by_step)]


def _evaluations(results: dict[str, Any], metrics: list[dict[str, Any]]) -> list[Record]:
    lines = [{**mapping(line["evaluation"]), "step": line.get("step")} for line in metrics if "evaluation" in line]
    found = list(map(evaluation, items(results.get("evaluations"))))
    known = {one.step for one in found}
    by_step = {one.step: one for one in map(evaluation, lines) if one.step not in known}
    return sorted([*found, *by_step.values()], key=lambda one: one.step or 0)


def evaluation(value: Any) -> Record:
    """The measures of the model at one step, from the object that a run recorded.

    Two evaluations may be compared if their `measured_on` are equal: protocol and amount of text. One without a
    recorded protocol equals no other.
    """
    found = EVALUATION(value)
    protocol = found.protocol.hash
    found.measured_on = (protocol, found.num_documents, found.num_bytes) if protocol else object()
    return found


def _headline(evaluations: list[Record]) -> tuple[Record | None, Record | None]:
    before, after = [one for one in evaluations if not one.step], [one for one in evaluations if one.step]
    pairs = ((early, late) for late in reversed(after) for early in before if early.measured_on == late.measured_on)
    return next(pairs, (before[0] if before else None, after[-1] if after else None))


def grouped(values: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The values in groups of equal keys, in the order in which the keys appear."""
    groups: dict[Hashable, list[T]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return list(groups.values())
