"""How the model reads English before and after the training: what it forgets while it learns another text.

results.json, `english`                     bits per byte of the English sample, before and after, and their difference
evaluations/english-step-00000000.parquet   the nll of each text before training
"""

from __future__ import annotations

import time
from typing import Any

from cartilha.console import progress
from cartilha.corpus.document import Document
from cartilha.corpus.english import english_sample
from cartilha.errors import log
from cartilha.evaluation.compare import compare_documents, shared_documents
from cartilha.evaluation.documents import encode_documents
from cartilha.evaluation.measures import make_evaluation
from cartilha.evaluation.nll import score_documents
from cartilha.evaluation.saved import SavedEvaluation, load_evaluation, save_evaluation
from cartilha.machine.processes import is_main_process
from cartilha.runs.files import RunWriter
from cartilha.runs.setup import Run

KEPT = ("perplexity", "bits_per_byte", "bits_per_byte_interval", "num_tokens", "num_bytes", "num_documents", "protocol")


def score_english(run: Run, record: RunWriter, step: int) -> None:
    """Score the English sample with the weights of `step`, 0 before training.

    Called in the main process, which keeps the figures; of a sharded model in all of them.
    """
    started = time.perf_counter()
    texts = [Document(text, f"english-{number}", "english", "english") for number, text in enumerate(english_sample())]
    documents = encode_documents(texts, run.scorer.tokenizer)
    with progress("English sample", float(documents.num_tokens.sum()), "tokens") as advance:
        scores = score_documents(run.scorer, documents, advance=advance)
    if not is_main_process():
        return
    evaluation = make_evaluation(run.scorer, documents, scores, time.perf_counter() - started).to_dict()
    row = {"step": step, **{name: evaluation[name] for name in KEPT}}
    saved = SavedEvaluation.of(evaluation, documents, scores.nll)
    if step == 0:
        save_evaluation(run.path / "evaluations" / "english-step-00000000.parquet", saved)
        record.update(english={"before": row})
    else:
        before = (record.values.get("english") or {}).get("before")
        record.update(english={"before": before, "after": row, **_difference(run, saved)})
    shown = "refused" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
    log.info("English sample %s training: bits per byte %s.", "after" if step else "before", shown)


def _difference(run: Run, after: SavedEvaluation) -> dict[str, Any]:
    """What the training changed, text by text; empty where there is nothing to compare with."""
    path = run.path / "evaluations" / "english-step-00000000.parquet"
    if not path.is_file():
        return {}
    before = load_evaluation(path)
    same = before.text_hashes == after.text_hashes
    if not same or before.record["protocol"]["hash"] != run.scorer.protocol.hash:
        return {}
    chosen = shared_documents(before, after)
    if len(chosen) < len(after.doc_ids):
        return {}
    found = compare_documents(before, after, chosen, num_listed=0)
    names = ("bits_per_byte_difference", "bits_per_byte_difference_interval", "p_value")
    return {name: getattr(found, name) for name in names}
