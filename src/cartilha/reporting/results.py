"""What a run directory says, as typed records.

The files are read leniently, because the report matters most for a run that was killed or still goes on. What is absent
or unreadable becomes None or empty, and `RecordedRun.missing` names it; only a path that is no run at all is refused.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
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
class RecordedSettings:
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
        """Blocks per optimizer step."""
        if self.blocks_per_step is None and self.batch_tokens and self.block_size:
            return self.batch_tokens // self.block_size
        return self.blocks_per_step


@dataclass(frozen=True)
class RecordedCorpus:
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
    """Blocks per epoch, and the share of their positions that is padding."""

    num_blocks: int | None = None
    padding_share: float | None = None


@dataclass(frozen=True)
class RecordedEpoch:
    """One line of the epoch table; losses in nats per token."""

    epoch: int | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One optimizer step of `metrics.jsonl`; `loss` in nats per token."""

    step: int | None = None
    loss: float | None = None
    lr: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote at some step, its prompt included."""

    step: int | None = None
    prompt: str | None = None
    text: str | None = None
    mode: str | None = None


@dataclass(frozen=True)
class RecordedProtocol:
    """How an evaluation was done; two figures may be compared only if the hashes agree."""

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
    """Mean loss (nats per token) of the tokens from a position in their documents up to the next record's."""

    begin: int
    loss: float


@dataclass(frozen=True)
class RecordedChange:
    """A held-out document before and after; `begins` is its beginning."""

    doc_id: str | None = None
    domain: str | None = None
    begins: str | None = None
    num_bytes: int | None = None
    bits_per_byte_first: float | None = None
    bits_per_byte_second: float | None = None


@dataclass(frozen=True)
class RecordedComparison:
    """The last evaluation against the one before training, document by document; `steps` are those of the two."""

    steps: tuple[int, ...] = ()
    bits_per_byte_difference: float | None = None
    bits_per_byte_difference_interval: tuple[float, float] | None = None
    p_value: float | None = None
    share_improved: float | None = None
    num_documents: int | None = None
    gained_most: tuple[RecordedChange, ...] = ()
    lost_most: tuple[RecordedChange, ...] = ()

    @property
    def step(self) -> int | None:
        """The step of the later evaluation."""
        return self.steps[-1] if self.steps else None


@dataclass(frozen=True)
class RecordedPlan:
    """What the run was expected to take (plan.json)."""

    micro_batch_size: int | None = None
    memory_bytes: int | None = None
    available_bytes: int | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class RecordedEvaluation:
    """The measures of the model at one step, and what they were measured on."""

    step: int | None = None
    perplexity: float | None = None
    word_perplexity: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_interval: tuple[float, float] | None = None
    bits_per_char: float | None = None
    num_tokens: int | None = None
    num_bytes: int | None = None
    num_documents: int | None = None
    seconds: float | None = None
    protocol: RecordedProtocol = field(default_factory=RecordedProtocol)
    baselines: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    domains: Mapping[str, DomainFigures] = field(default_factory=dict)
    positions: tuple[PositionLoss, ...] = ()

    @property
    def measured_on(self) -> Hashable:
        """Protocol and amount of text; an evaluation without a recorded protocol shares them with no other."""
        return (self.protocol.hash, self.num_documents, self.num_bytes) if self.protocol.hash else id(self)

    def comparable_with(self, other: RecordedEvaluation) -> bool:
        """Whether both scored the same amount of text by the same protocol, as far as recorded."""
        return self.measured_on == other.measured_on


@dataclass(frozen=True)
class RecordedRun:
    """Everything that a run directory says.

    Attributes:
        status: One of `STATUSES`, or `unknown` if there is no `results.json`.
        steps: In order of step; if a resumed run repeated a step, its later record.
        evaluations: In order of step: those of `results.json`, and those that only `metrics.jsonl` has.
        config: The text of `config.yaml`.
        missing: What was absent or unreadable, such as `samples.jsonl` or `results.json: epochs`.
    """

    path: Path
    name: str
    status: str = "unknown"
    error: str | None = None
    resumed_from_step: tuple[int, ...] = ()
    settings: RecordedSettings = field(default_factory=RecordedSettings)
    corpus: RecordedCorpus = field(default_factory=RecordedCorpus)
    packing: Packing = field(default_factory=Packing)
    epochs: tuple[RecordedEpoch, ...] = ()
    evaluations: tuple[RecordedEvaluation, ...] = ()
    steps: tuple[RecordedStep, ...] = ()
    samples: tuple[Sample, ...] = ()
    comparison: RecordedComparison | None = None
    surprisal: Surprisal | None = None
    plan: RecordedPlan | None = None
    tokens_per_second: float | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    notices: tuple[str, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    config: str | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def before(self) -> RecordedEvaluation | None:
        """The evaluation before step 1."""
        return self._headline[0]

    @property
    def after(self) -> RecordedEvaluation | None:
        """The last evaluation after training began; it may be older than the last step (see its `step`)."""
        return self._headline[1]

    @property
    def device_name(self) -> str | None:
        """The device as people call it, else its type."""
        return text(self.machine.get("device_name")) or self.settings.device

    @cached_property
    def _headline(self) -> tuple[RecordedEvaluation | None, RecordedEvaluation | None]:
        """The latest pair that may be compared; if there is none, the first and the last evaluation."""
        before = [evaluation for evaluation in self.evaluations if not evaluation.step]
        after = [evaluation for evaluation in self.evaluations if evaluation.step]
        pairs = ((early, late) for late in reversed(after) for early in before if early.comparable_with(late))
        return next(pairs, (before[0] if before else None, after[-1] if after else None))


def load_run(path: str | Path) -> RecordedRun:
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
    status = text(results.get("status"))
    others: dict[str, Any] = {
        "settings": results.get("settings") or _settings_of_config(config),
        "samples": read_lines(directory / "samples.jsonl", missing),
        "surprisal": read_surprisal(directory / "surprisal.parquet", missing),
        "plan": read_object(directory / "plan.json", missing),
    }
    return fill(
        RecordedRun,
        {**results, **others},
        path=directory,
        name=text(results.get("name")) or directory.resolve().name,
        status=status if status in STATUSES else "unknown",
        evaluations=_evaluations(results, metrics),
        steps=_steps(metrics),
        surprisal=others["surprisal"],
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
    """The training settings in `config.yaml`, for a run without `results.json`."""
    try:
        loaded = mapping(yaml.safe_load(config or ""))
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        return {}
    return {**loaded, **mapping(loaded.get("train"))}


def _steps(metrics: list[dict[str, Any]]) -> tuple[RecordedStep, ...]:
    records = [fill(RecordedStep, line) for line in metrics if "evaluation" not in line]
    by_step = {record.step: record for record in records if record.step is not None}
    return tuple(by_step[step] for step in sorted(by_step))


def _evaluations(results: dict[str, Any], metrics: list[dict[str, Any]]) -> tuple[RecordedEvaluation, ...]:
    found = [_evaluation(mapping(raw)) for raw in items(results.get("evaluations"))]
    known = {evaluation.step for evaluation in found}
    lines = [{**mapping(line["evaluation"]), "step": line.get("step")} for line in metrics if "evaluation" in line]
    by_step = {evaluation.step: evaluation for evaluation in map(_evaluation, lines)}
    found += [evaluation for step, evaluation in by_step.items() if step not in known]
    return tuple(sorted(found, key=lambda evaluation: evaluation.step or 0))


def _evaluation(raw: dict[str, Any]) -> RecordedEvaluation:
    rows = [mapping(row) for row in items(raw.get("positions"))]
    found = [(integer(row.get("from")), number(row.get("loss"))) for row in rows]
    positions = [PositionLoss(begin, loss) for begin, loss in found if begin is not None and loss is not None]
    return fill(RecordedEvaluation, raw, positions=tuple(positions))
