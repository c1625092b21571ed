"""What a check works with and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from cartilha.blocks.packing import PackedStream
from cartilha.corpus.document import Document
from cartilha.corpus.questions import QuestionRuns
from cartilha.evaluation.scorer import Scorer
from cartilha.tokens.packed import PackedDocuments
from cartilha.tokens.store import TokenStore

Outcome = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class CheckResult:
    """What a check found; `name` and `seconds` are filled in by what runs it."""

    name: str
    outcome: Outcome
    measured: str  # the figure that was found, in words
    expected: str  # what a sound set-up gives
    meaning: str  # of a failure (where the check does not apply: why not)
    remedy: str
    figures: dict[str, Any] = field(default_factory=dict)  # the numbers behind `measured`
    seconds: float = 0.0


@dataclass(frozen=True)
class Subject(Scorer):
    """What is checked: a model in float32, with attention within documents, and what is known of its run."""

    held_out: Sequence[Document]  # a sample of the text that would be scored, at least two documents
    training: Sequence[Document]  # a sample of the text that would be trained on
    store: TokenStore | None  # where both come from; None where they come from the primer
    block_size: int
    lr: float  # the peak of the run to come
    optimizer: str  # and its optimizer
    micro_batch_size: int
    planned_bytes: int | None  # memory that the run is planned to take; None where it could not be planned
    disk_bytes: int  # what the run's files still need at most
    output: Path  # where the run would write
    quick: bool  # whether to check with less of everything
    is_random: bool  # whether the model has fresh weights (`random:`)
    questions: QuestionRuns | None = None  # of benchmarks that the training text should not hold
    mixed: Sequence[Iterator[str]] = ()  # what the run reads of each other store
    # Nats of the held-out sample by compute dtype, kept by the checks that share them.
    scored: dict[torch.dtype, np.ndarray] = field(default_factory=dict, init=False)

    @property
    def model(self) -> PreTrainedModel:
        """The model that is checked."""
        return self.loaded.model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def disk(self) -> Path:
        """The directory nearest to the output that exists already."""
        return next(path for path in (self.output, *self.output.absolute().parents) if path.is_dir())

    def stream(self, texts: Sequence[Document], block_size: int, max_tokens: int | None = None) -> PackedStream:
        """Documents packed in the order given, each cut to its first `max_tokens` tokens."""
        ids = [tokens[:max_tokens] for tokens in self.tokenizer.encode([d.text for d in texts])]
        documents = PackedDocuments.from_ids(ids, self.tokenizer.prefix_id, self.tokenizer.end_id)
        return PackedStream(documents, block_size)


Check = Callable[[Subject], CheckResult]


@dataclass(frozen=True)
class Judgement:
    """The words of a check, written once; `judge` and `skip` fill in what was found."""

    expected: str
    meaning: str
    remedy: str

    def judge(self, passed: bool, measured: str, **figures: Any) -> CheckResult:
        """Passed or failed, with what was measured."""
        outcome: Outcome = "passed" if passed else "failed"
        return CheckResult("", outcome, measured, self.expected, self.meaning, self.remedy, figures)

    def skip(self, reason: str, **figures: Any) -> CheckResult:
        """Not applicable, and why."""
        return CheckResult("", "not applicable", reason, self.expected, reason, "", figures)
