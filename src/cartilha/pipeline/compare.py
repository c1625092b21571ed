"""`compare`: two models on the same documents, or two saved evaluations of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cartilha.config import CompareConfig
from cartilha.errors import UserError
from cartilha.evaluation.compare import Comparison, compare_documents
from cartilha.evaluation.measures import make_evaluation
from cartilha.evaluation.saved import SavedEvaluation, load_evaluation, saved_evaluation
from cartilha.pipeline.evaluate import score_held_out, scorer_for
from cartilha.pipeline.held_out import held_out
from cartilha.pipeline.preflight import preflight

log = logging.getLogger("cartilha")


@dataclass(frozen=True)
class CompareResult:
    """The second model against the first.

    Attributes:
        first: The first model's record, as `evaluate --json` gives it; second likewise.
        comparison: Over the documents that both tokenizers keep whole.
        num_left_out: Documents that one of the tokenizers does not keep.
    """

    first: dict[str, Any]
    second: dict[str, Any]
    comparison: Comparison
    num_left_out: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "models": [self.first["model"], self.second["model"]],
            "protocols": [self.first["protocol"], self.second["protocol"]],
            "corpus_hash": self.first["corpus_hash"],
            **self.comparison.to_dict(),
            "num_documents_left_out": self.num_left_out,
            "loss_by_position": [self.first.get("positions", []), self.second.get("positions", [])],
            "evaluations": [self.first, self.second],
        }


def compare(config: CompareConfig) -> CompareResult:
    """Compare two models.

    Raises:
        UserError: Not two of them, different documents, or protocols that score different parts of them.
    """
    preflight(config)
    if config.evaluations:
        first, second = (load_evaluation(Path(path)) for path in config.evaluations)
    else:
        first, second = (_score(ref, config) for ref in config.models)
    if first.text_hashes != second.text_hashes:
        raise UserError("The two evaluations are of different documents; score the same text with both models.")
    protocols = [saved.record["protocol"] for saved in (first, second)]
    names = [protocol["name"] for protocol in protocols]
    if names[0] != names[1]:
        raise UserError(f"The two evaluations have the protocols {names[0]} and {names[1]}; use the same for both.")
    settings = [{name: protocol[name] for name in ("window", "stride", "dtype")} for protocol in protocols]
    if settings[0] != settings[1]:
        log.warning(
            "The two are not scored alike (%s): a part of the difference is the protocol's; --window and --stride "
            "make them equal.",
            "; ".join(
                f"{name} {first_value} and {settings[1][name]}"
                for name, first_value in settings[0].items()
                if first_value != settings[1][name]
            ),
        )
    if names[0] != "full" and not np.array_equal(first.num_bytes, second.num_bytes):
        raise UserError(
            f"The protocol {names[0]} cuts these documents at other places under the two tokenizers, so they cannot be "
            "compared; use --protocol full."
        )
    kept = first.round_trips & second.round_trips & (first.num_bytes > 0)
    if kept.sum() < 2:
        raise UserError("Fewer than two documents survive both tokenizers, which is too few to compare.")
    chosen = np.flatnonzero(kept)
    comparison = compare_documents(
        first.nll[kept],
        second.nll[kept],
        first.num_bytes[kept],
        [first.doc_ids[i] for i in chosen],
        domains=[first.domains[i] for i in chosen],
    )
    return CompareResult(first.record, second.record, comparison, int((~kept).sum()))


def _score(ref: str, config: CompareConfig) -> SavedEvaluation:
    text = held_out(config)
    scorer = scorer_for(ref, text, config)
    corpus = score_held_out(scorer, text)
    evaluation = make_evaluation(scorer, corpus.documents, corpus.scores, seconds=0.0)
    return saved_evaluation(evaluation.to_dict(), corpus.documents, corpus.scores.nll)
