"""What a run keeps beside each evaluation, so that the report can show the model learning.

samples.jsonl                           continuations of fixed prompts
surprisal.parquet                       each token of a few held-out documents
evaluations/step-00000123.parquet       the nll of each held-out document, as `compare --evaluations` reads it
results.json, `comparison`              this evaluation against the one before training, document by document
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cartilha.evaluation.compare import compare_documents, shared_documents
from cartilha.evaluation.continuation import continue_prompts
from cartilha.evaluation.measures import Evaluation
from cartilha.evaluation.saved import SavedEvaluation, load_evaluation, save_evaluation
from cartilha.evaluation.surprisal import add_surprisal, shown_documents
from cartilha.machine.processes import is_main_process
from cartilha.runs.files import RunWriter, add_samples
from cartilha.runs.setup import Run
from cartilha.training.streams import random_numbers_apart

NUM_LISTED = 5  # documents that gained most, and that lost most
TOKENS_OF_A_BEGINNING = 32  # by which a reader recognises a document


def take_snapshot(run: Run, record: RunWriter, evaluation: Evaluation, nll: np.ndarray) -> list[tuple[str, str]]:
    """Keep what the model writes and how it reads now.

    Called in the main process, which keeps it; of a sharded model in all of them.

    `nll` is that of each of the run's validation documents, in nats, in the evaluation just made. The comparison with
    the evaluation before training goes into `record`. Returns each prompt, and the prompt with its continuation.
    """
    if is_main_process():
        saved = SavedEvaluation.of(evaluation.to_dict(), run.validation, nll)
        save_evaluation(_saved(run.path, run.step), saved)
    with random_numbers_apart():
        run.loaded.model.train(False)  # without the dropout that training may have
        samples = continue_prompts(run.loaded, run.scorer.tokenizer, run.prompts)
        if is_main_process():
            add_samples(run.path, run.step, samples)
        add_surprisal(run.path / "surprisal.parquet", run.step, run.scorer, shown_documents(run.validation))
        run.loaded.model.train(run.config.dropout)
    if run.step and is_main_process():
        record.update(comparison=compare_with_first(run, run.step))
    return [(sample.prompt, sample.text) for sample in samples]


def _saved(path: Path, step: int) -> Path:
    return path / "evaluations" / f"step-{step:08d}.parquet"


def compare_with_first(run: Run, step: int) -> dict[str, Any] | None:
    """The evaluation after `step` against the one before training; None where the two cannot be paired."""
    paths = _saved(run.path, 0), _saved(run.path, step)
    if not all(path.is_file() for path in paths):
        return None
    first, now = map(load_evaluation, paths)
    if now.record["bits_per_byte"] is None:
        return None
    if first.text_hashes != now.text_hashes or first.record["protocol"]["hash"] != run.scorer.protocol.hash:
        return None
    chosen = shared_documents(first, now)
    if len(chosen) < 2:
        return None
    found = asdict(compare_documents(first, now, chosen, NUM_LISTED))
    place = {now.doc_ids[i]: i for i in chosen}
    for row in [*found["gained_most"], *found["lost_most"]]:
        i = place[row["doc_id"]]
        row["domain"] = now.domains[i]
        row["begins"] = run.scorer.tokenizer.decode(run.validation.ids[i][:TOKENS_OF_A_BEGINNING]).rstrip("\ufffd")
    return {"steps": [0, step], **found}
