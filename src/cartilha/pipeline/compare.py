"""`compare`: two models on the same documents, or two saved evaluations of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cartilha.config import CompareConfig
from cartilha.errors import UserError, log
from cartilha.evaluation.compare import Comparison, compare_documents, shared_documents
from cartilha.evaluation.measures import make_evaluation
from cartilha.evaluation.saved import SavedEvaluation, load_evaluation
from cartilha.evaluation.scorer import load_scorer
from cartilha.machine.devices import choose_device
from cartilha.pipeline.evaluate import score_held_out
from cartilha.pipeline.held_out import held_out
from cartilha.pipeline.preflight import preflight
from cartilha.reporting.notebook import comparison_html


@dataclass(frozen=True)
class CompareResult:
    """Two models' records, as `evaluate --json` gives them, and the second against the first.

    The comparison is over the documents that both tokenizers keep whole; `num_left_out` counts the others.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    comparison: Comparison
    num_left_out: int

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        both = [self.first, self.second]
        return {
            "models": [record["model"] for record in both],
            "protocols": [record["protocol"] for record in both],
            "corpus_hash": self.first["corpus_hash"],
            **asdict(self.comparison),
            "num_documents_left_out": self.num_left_out,
            "loss_by_position": [record.get("positions", []) for record in both],
            "evaluations": both,
        }

    def _repr_html_(self) -> str:
        """Notebooks show both models and their difference."""
        return comparison_html(self.to_dict())


def compare(config: CompareConfig) -> CompareResult:
    """Compare two models; a UserError says if they were scored on different documents, or parts of them."""
    preflight(config)
    if config.evaluations:
        first, second = (load_evaluation(Path(path)) for path in config.evaluations)
    else:
        device = choose_device(config.device)
        first, second = (_score(ref, config, device) for ref in config.models)
    chosen = shared_documents(first, second)
    _refuse_unlike(first, second)
    if len(chosen) < 2:
        raise UserError("Fewer than two documents survive both tokenizers, which is too few to compare.")
    comparison = compare_documents(first, second, chosen)
    return CompareResult(first.record, second.record, comparison, len(first.doc_ids) - len(chosen))


def _score(ref: str, config: CompareConfig, device: torch.device) -> SavedEvaluation:
    text = held_out(config)
    scorer = load_scorer(ref, text.store, config, device)
    documents, scores = score_held_out(scorer, text)
    record = make_evaluation(scorer, documents, scores, seconds=0.0).to_dict()
    return SavedEvaluation.of(record, documents, scores.nll)


def _refuse_unlike(first: SavedEvaluation, second: SavedEvaluation) -> None:
    """Refuse evaluations of different parts of the documents; report other differences."""
    one, other = first.record["protocol"], second.record["protocol"]
    if one["name"] != other["name"]:
        names = f"{one['name']} and {other['name']}"
        raise UserError(f"The two evaluations have the protocols {names}; use the same for both.")
    settings = ("window", "stride", "dtype")
    unlike = [f"{name} {one[name]} and {other[name]}" for name in settings if one[name] != other[name]]
    if unlike:
        log.warning(
            "The two are not scored alike (%s), which shows in the difference; --window and --stride make them equal.",
            "; ".join(unlike),
        )
    if one["name"] != "full" and not np.array_equal(first.num_bytes, second.num_bytes):
        raise UserError(
            f"The protocol {one['name']} cuts these documents at other places under the two tokenizers, so they cannot "
            "be compared; use --protocol full."
        )
