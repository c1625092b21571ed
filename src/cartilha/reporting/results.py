"""What a run directory says, as typed records.

Read leniently: the report of a run that was killed, or that still goes on, is worth the most. What is not there or not
readable becomes None or empty, and `RunRecord.missing` names it; only a path that is no run at all is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cartilha.errors import UserError
from cartilha.reporting.lenient import fill, integer, items, mapping, number, read_lines, read_object, read_text, text
from cartilha.reporting.surprisal import Surprisal, read_surprisal

FORMAT_VERSION = 1
RUN_FILES = ("results.json", "metrics.jsonl", "samples.jsonl", "config.yaml")
EXPECTED_KEYS = ("status", "settings", "corpus", "packing", "epochs", "evaluations", "machine", "versions")
STATUSES = ("running", "finished", "interrupted", "out_of_memory", "failed")


@dataclass(frozen=True)
class Settings:
    """What was asked of the training; `blocks_per_step` is the batch of the results table."""

    model: str | None = None
    store: str | None = None
    block_size: int | None = None
    epochs: int | None = None
    max_steps: int | None = None
    num_steps: int | None = None
    batch_tokens: int | None = None
    blocks_per_step: int | None = None
    micro_batch_size: int | None = None
    lr: float | None = None
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None

    @property
    def batch(self) -> int | None:
        """Blocks an optimizer step."""
        if self.blocks_per_step is None and self.batch_tokens and self.block_size:
            return self.batch_tokens // self.block_size
        return self.blocks_per_step


@dataclass(frozen=True)
class Corpus:
    """Which text was trained on and which was held out."""

    num_train_documents: int | None = None
    num_train_tokens: int | None = None
    num_validation_documents: int | None = None
    num_validation_tokens: int | None = None
    train_hash: str | None = None
    validation_hash: str | None = None
    tokenizer_fingerprint: str | None = None


@dataclass(frozen=True)
class Packing:
    """Blocks an epoch, and the share of their positions that is padding."""

    num_blocks: int | None = None
    padding_share: float | None = None


@dataclass(frozen=True)
class EpochRecord:
    """One line of the epoch table; losses in nats a token."""

    epoch: int | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step of `metrics.jsonl`; `loss` in nats a token."""

    step: int | None = None
    epoch: int | None = None
    tokens: int | None = None
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote at some step, its prompt included."""

    step: int | None = None
    prompt: str | None = None
    text: str | None = None
    mode: str | None = None


@dataclass(frozen=True)
class Protocol:
    """How an evaluation was done; two figures may be compared only where the hashes agree."""

    name: str | None = None
    window: int | None = None
    stride: int | None = None
    prefix_id: int | None = None
    dtype: str | None = None
    hash: str | None = None


@dataclass(frozen=True)
class DomainFigures:
    """The measures of one domain."""

    perplexity: float | None = None
    bits_per_byte: float | None = None
    num_documents: int | None = None
    num_bytes: int | None = None


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss (nats a token) of the tokens from a position in their documents up to the next record's."""

    begin: int
    loss: float


@dataclass(frozen=True)
class DocumentChange:
    """A held-out document before and after; `begins` is its beginning."""

    doc_id: str | None = None
    domain: str | None = None
    begins: str | None = None
    num_bytes: int | None = None
    bits_per_byte_first: float | None = None
    bits_per_byte_second: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The evaluation of `step` against the one before training, document by document."""

    step: int | None = None
    bits_per_byte_difference: float | None = None
    bits_per_byte_difference_interval: tuple[float, float] | None = None
    p_value: float | None = None
    share_improved: float | None = None
    num_documents: int | None = None
    gained_most: tuple[DocumentChange, ...] = ()
    lost_most: tuple[DocumentChange, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What the run was expected to take (plan.json)."""

    micro_batch_size: int | None = None
    memory_bytes: int | None = None
    available_bytes: int | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The measures of the model at one step, and what they were measured on."""

    step: int | None = None
    epoch: int | None = None
    model: str | None = None
    perplexity: float | None = None
    word_perplexity: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_interval: tuple[float, float] | None = None
    bits_per_char: float | None = None
    num_tokens: int | None = None
    num_bytes: int | None = None
    num_chars: int | None = None
    num_words: int | None = None
    num_documents: int | None = None
    seconds: float | None = None
    protocol: Protocol = field(default_factory=Protocol)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    domains: Mapping[str, DomainFigures] = field(default_factory=dict)
    positions: tuple[PositionLoss, ...] = ()

    def comparable_with(self, other: Evaluation) -> bool:
        """Whether both scored the same amount of text by the same protocol; what is not recorded is not comparable."""
        if self.protocol.hash is None or self.protocol.hash != other.protocol.hash:
            return False
        return (self.num_documents, self.num_bytes) == (other.num_documents, other.num_bytes)


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run directory says.

    Attributes:
        status: One of `STATUSES`, or `unknown` where there is no `results.json`.
        steps: In order of step; where a resumed run repeated a step, the later record.
        evaluations: In order of step; those of `results.json`, and those that only `metrics.jsonl` has.
        config: The text of `config.yaml`.
        missing: What was not there or not readable: `samples.jsonl`, `results.json: epochs`, and the like.
    """

    path: Path
    name: str
    status: str = "unknown"
    error: str | None = None
    resumed_from_step: tuple[int, ...] = ()
    settings: Settings = field(default_factory=Settings)
    corpus: Corpus = field(default_factory=Corpus)
    packing: Packing = field(default_factory=Packing)
    epochs: tuple[EpochRecord, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    samples: tuple[Sample, ...] = ()
    comparison: Comparison | None = None
    surprisal: Surprisal | None = None
    plan: Plan | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    notices: tuple[str, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    config: str | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def before(self) -> Evaluation | None:
        """The evaluation before step 1."""
        return self._headline()[0]

    @property
    def after(self) -> Evaluation | None:
        """The last evaluation after training began; it may be older than the last step (see its `step`)."""
        return self._headline()[1]

    @property
    def device_name(self) -> str | None:
        """The device as people call it, else its type."""
        return text(self.machine.get("device_name")) or self.settings.device

    def _headline(self) -> tuple[Evaluation | None, Evaluation | None]:
        """The latest pair that may be compared; without one, the first and the last as they are."""
        before = [evaluation for evaluation in self.evaluations if not evaluation.step]
        after = [evaluation for evaluation in self.evaluations if evaluation.step]
        for late in reversed(after):
            for early in before:
                if early.comparable_with(late):
                    return early, late
        return (before[0] if before else None), (after[-1] if after else None)


def load_run(path: str | Path) -> RunRecord:
    """Read a run directory, whatever state it is in.

    Raises:
        UserError: The path is no run directory, or a newer cartilha wrote it.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"There is no run directory {path}; give the --output directory of a `cartilha train`.")
    if not any((directory / name).is_file() for name in RUN_FILES):
        raise UserError(f"{path} is not a run directory: it has none of {', '.join(RUN_FILES)}.")
    missing: list[str] = []
    results = _read_results(directory, missing)
    metrics = read_lines(directory / "metrics.jsonl", missing)
    config = read_text(directory / "config.yaml", missing)
    machine, versions = mapping(results.get("machine")), mapping(results.get("versions"))
    status = text(results.get("status"))
    return RunRecord(
        path=directory,
        name=text(results.get("name")) or directory.resolve().name,
        status=status if status in STATUSES else "unknown",
        error=text(results.get("error")),
        resumed_from_step=tuple(step for step in map(integer, items(results.get("resumed_from_step"))) if step),
        settings=fill(Settings, results.get("settings") or _settings_of_config(config)),
        corpus=fill(Corpus, results.get("corpus")),
        packing=fill(Packing, results.get("packing")),
        epochs=tuple(fill(EpochRecord, epoch) for epoch in items(results.get("epochs"))),
        evaluations=_evaluations(results, metrics),
        steps=_steps(metrics),
        samples=tuple(fill(Sample, line) for line in read_lines(directory / "samples.jsonl", missing)),
        comparison=_comparison(results),
        surprisal=read_surprisal(directory / "surprisal.parquet", missing),
        plan=None if (plan := read_object(directory / "plan.json", missing)) is None else fill(Plan, plan),
        tokens_per_second=number(results.get("tokens_per_second")),
        memory_bytes=integer(results.get("memory_bytes")),
        seconds=number(results.get("seconds")),
        notices=tuple(str(notice) for notice in items(results.get("notices"))),
        machine=machine,
        versions=versions,
        config=config,
        missing=missing,
    )


def _read_results(directory: Path, missing: list[str]) -> dict[str, Any]:
    results = read_object(directory / "results.json", missing)
    if results is None:
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
    """The training settings of `config.yaml`, for a run that wrote no `results.json`."""
    try:
        loaded = mapping(yaml.safe_load(config or ""))
    except (yaml.YAMLError, ValueError):  # a ValueError is a date that does not exist
        return {}
    return {**loaded, **mapping(loaded.get("train"))}


def _steps(metrics: list[dict[str, Any]]) -> tuple[StepRecord, ...]:
    by_step: dict[int, StepRecord] = {}
    for line in metrics:
        if "evaluation" not in line:
            record = fill(StepRecord, line)
            if record.step is not None:
                by_step[record.step] = record
    return tuple(by_step[step] for step in sorted(by_step))


def _evaluations(results: dict[str, Any], metrics: list[dict[str, Any]]) -> tuple[Evaluation, ...]:
    found = [_evaluation(mapping(raw)) for raw in items(results.get("evaluations"))]
    known = {evaluation.step for evaluation in found}
    extra: dict[int | None, Evaluation] = {}
    for line in metrics:
        if "evaluation" in line:
            evaluation = _evaluation({**mapping(line["evaluation"]), **_position(line)})
            if evaluation.step not in known:
                extra[evaluation.step] = evaluation
    return tuple(sorted([*found, *extra.values()], key=lambda evaluation: evaluation.step or 0))


def _position(line: dict[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in ("step", "epoch") if key in line}


def _evaluation(raw: dict[str, Any]) -> Evaluation:
    baselines = {
        name: {key: figure for key, value in mapping(figures).items() if (figure := number(value)) is not None}
        for name, figures in mapping(raw.get("baselines")).items()
    }
    return fill(
        Evaluation,
        raw,
        protocol=fill(Protocol, raw.get("protocol")),
        baselines=baselines,
        domains={name: fill(DomainFigures, figures) for name, figures in mapping(raw.get("domains")).items()},
        positions=_positions(raw),
    )


def _positions(raw: dict[str, Any]) -> tuple[PositionLoss, ...]:
    found = [
        (integer(mapping(row).get("from")), number(mapping(row).get("loss"))) for row in items(raw.get("positions"))
    ]
    return tuple(PositionLoss(begin, loss) for begin, loss in found if begin is not None and loss is not None)


def _comparison(results: dict[str, Any]) -> Comparison | None:
    raw = mapping(results.get("comparison"))
    steps = items(raw.get("steps"))
    if len(steps) != 2:
        return None
    return fill(
        Comparison,
        raw,
        step=integer(steps[1]),
        gained_most=tuple(fill(DocumentChange, row) for row in items(raw.get("gained_most"))),
        lost_most=tuple(fill(DocumentChange, row) for row in items(raw.get("lost_most"))),
    )
