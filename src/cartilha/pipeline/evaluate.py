"""`evaluate`: how well models predict held-out text."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cartilha.config import EvaluateConfig, GenerateConfig
from cartilha.console import progress
from cartilha.errors import counted, log
from cartilha.evaluation.baselines import UnigramCollector
from cartilha.evaluation.compressed import CompressedText
from cartilha.evaluation.continuation import continue_prompts
from cartilha.evaluation.continuation_scores import continuation_measures
from cartilha.evaluation.corpus import SHARD_CHARS, score_corpus
from cartilha.evaluation.documents import ScoredDocuments, encode_documents
from cartilha.evaluation.downstream import check_tasks, run_tasks, task_questions
from cartilha.evaluation.measures import Evaluation, make_evaluation
from cartilha.evaluation.nll import DocumentScores, TokenRows, score_documents
from cartilha.evaluation.saved import SavedEvaluation, save_evaluation, token_file
from cartilha.evaluation.scorer import Scorer, load_scorer
from cartilha.evaluation.task_scores import TaskScore
from cartilha.machine.devices import choose_device
from cartilha.machine.processes import is_main_process, world
from cartilha.pipeline.held_out import HeldOut, held_out
from cartilha.pipeline.preflight import preflight
from cartilha.reporting.notebook import evaluations_html
from cartilha.runs.tasks import tasks_of_run
from cartilha.tokens.store import batches

TakeRows = Callable[[TokenRows], None] | None

# Tokens that are scored again in both dtypes: a twentieth of the corpus, between these limits.
LEAST_DRIFT_TOKENS, MAX_DRIFT_TOKENS = 128, 2_000
CONTINUATION_TOKENS = 120  # enough for the 32 words that are scored, at three to four tokens per word


@dataclass(frozen=True)
class EvaluatedModel:
    """One model's figures (none where tasks alone were asked for), and what else was asked for.

    `contamination` is the share of the documents whose exact text is in the store's training side, `near_duplicates`
    that of those with a near-duplicate there. `dtype_drift` says how the nll in half precision differs from float32's
    on the first documents, as mean nats per token and as the largest difference of a document's mean.
    """

    model: str
    evaluation: Evaluation | None
    contamination: float | None = None  # None without a store
    near_duplicates: float | None = None
    dtype_drift: dict[str, float] | None = None
    continuations: dict[str, Any] | None = None  # chrF, BLEU, ROUGE-L and so on
    tasks: tuple[TaskScore, ...] | None = None
    model_commit: str | None = None  # of a hub model: the one that was read

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        asked = ("near_duplicates", "dtype_drift", "continuations", "model_commit")
        extra = {name: getattr(self, name) for name in asked if getattr(self, name) is not None}
        if self.tasks is not None:
            extra["tasks"] = [score.to_dict() for score in self.tasks]
        if self.evaluation is None:
            return {"model": self.model, **extra}
        return {**self.evaluation.to_dict(), "contamination": self.contamination, **extra}


@dataclass(frozen=True)
class EvaluateResult:
    """One evaluation for each model, over the same documents; the time includes loading the models."""

    models: tuple[EvaluatedModel, ...]
    wall_seconds: float
    task_questions: dict[str, Any] | None = None  # how many of the tasks' questions are in the store's training side
    datasets: tuple[dict[str, Any], ...] = ()  # of the hub, each with the commit that was read

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The models' figures."""
        return tuple(model.evaluation for model in self.models if model.evaluation is not None)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        models = [model.to_dict() for model in self.models]
        shared = {name: models[0][name] for name in ("corpus_hash", "protocol") if self.evaluations}
        questions = {} if self.task_questions is None else {"task_questions": self.task_questions}
        datasets = {"datasets": list(self.datasets)} if self.datasets else {}
        return {**shared, **datasets, "wall_seconds": self.wall_seconds, **questions, "models": models}

    def _repr_html_(self) -> str:
        """Notebooks show a row for each model."""
        return evaluations_html(model.to_dict() for model in self.models)


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Score the documents with each model, and run the tasks; without a text, the tasks alone.

    With `--record` the models are a run's own two, whose scores its record and its model card then have.
    """
    started = time.perf_counter()
    preflight(config)
    if config.record is None:
        return _evaluate(config, started)
    with tasks_of_run(config.record) as run:
        result = _evaluate(replace(config, model=run.models, record=None), started)
        before, after = (model.tasks or () for model in result.models)
        run.keep(config.tasks, before, after)
    return result


def _evaluate(config: EvaluateConfig, started: float) -> EvaluateResult:
    check_tasks(config.tasks)
    if not config.store and not config.input:
        device = choose_device(config.device)
        alone = tuple(_run_tasks_alone(ref, config, device) for ref in config.model)
        return EvaluateResult(alone, time.perf_counter() - started)
    text = held_out(config)
    questions = text.questions_in_training(task_questions(config.tasks)) if config.tasks else None
    if text.split == "train":
        log.warning("Scoring the training text: these figures say what was learnt by heart, not how good the model is.")
    compressed = text.compressed() if is_main_process() else None  # in the background from here on
    device = choose_device(config.device)  # which is logged: if the text is at fault, nothing else is
    with token_file(Path(config.per_token)) if config.per_token else nullcontext() as add_tokens:
        models = []
        for ref in config.model:
            scorer = load_scorer(ref, text.store, config, device)
            take = None if add_tokens is None else partial(add_tokens, ref)
            models.append(_evaluate_model(scorer, text, compressed, config, take))
            del scorer  # before the next model takes its memory
    return EvaluateResult(tuple(models), time.perf_counter() - started, questions, tuple(text.datasets()))


def _run_tasks_alone(ref: str, config: EvaluateConfig, device: torch.device) -> EvaluatedModel:
    scorer = load_scorer(ref, None, config, device)
    tasks = run_tasks(scorer.loaded, scorer.tokenizer, config.tasks)
    return EvaluatedModel(ref, None, tasks=tasks, model_commit=scorer.loaded.commit)


def _evaluate_model(
    scorer: Scorer, text: HeldOut, compressed: CompressedText | None, config: EvaluateConfig, take_rows: TakeRows
) -> EvaluatedModel:
    is_alone, is_main = world()[1] == 1, is_main_process()
    unigram = text.unigram(scorer) if is_main else None
    started = time.perf_counter()
    documents, scores = score_held_out(scorer, text, take_rows, unigram if is_alone else None)
    seconds = time.perf_counter() - started
    if unigram is not None and not is_alone:  # this process has scored only a part of the documents
        for shard in batches(text.documents(), max_chars=SHARD_CHARS):
            unigram.observe(encode_documents(shard, scorer.tokenizer, scorer.protocol.first_tokens, allow_empty=True))
    baselines = (unigram.figures() if unigram else {}) | (compressed.figures() if compressed else {})
    evaluation = make_evaluation(scorer, documents, scores, seconds, baselines)
    contamination = text.share_in_training(documents.text_hashes)
    evaluation = replace(evaluation, notes=(*evaluation.notes, *_extra_notes(text, contamination)))
    for note in evaluation.notes:
        log.warning("%s", note)
    result = EvaluatedModel(
        scorer.loaded.reference,
        evaluation,
        contamination,
        text.share_near_training() if config.near_duplicates and is_main else None,
        _dtype_drift(scorer, text, int(documents.num_tokens.sum())),
        _continuations(scorer, text, config),
        run_tasks(scorer.loaded, scorer.tokenizer, config.tasks),
        scorer.loaded.commit,
    )
    if config.save and is_main:
        save_evaluation(Path(config.save), SavedEvaluation.of(result.to_dict(), documents, scores.nll))
    return result


def score_held_out(
    scorer: Scorer, text: HeldOut, take_rows: TakeRows = None, unigram: UnigramCollector | None = None
) -> tuple[ScoredDocuments, DocumentScores]:
    """One pass over the text with one model."""
    with progress(f"Scoring with {scorer.loaded.reference}", text.num_tokens(scorer.tokenizer), "tokens") as advance:
        observe = (lambda scored: None) if unigram is None else unigram.observe
        return score_corpus(scorer, text.documents(), advance=advance, take_rows=take_rows, observe=observe)


def _dtype_drift(scorer: Scorer, text: HeldOut, num_tokens_scored: int) -> dict[str, float] | None:
    """What half precision changes, on the first tokens: a scale for differences between models."""
    if scorer.dtype == torch.float32:
        return None
    left = min(MAX_DRIFT_TOKENS, max(LEAST_DRIFT_TOKENS, num_tokens_scored // 20))
    first = text.first_characters(8 * left)
    scored = encode_documents(first, scorer.tokenizer, scorer.protocol.first_tokens, allow_empty=True)
    ids = []
    for own in scored.ids:
        ids.append(own[:left])
        left -= len(ids[-1])
    scored = scored.with_ids(ids)
    half, full = (score_documents(one, scored).nll for one in (scorer, scorer.in_dtype(torch.float32)))
    num_tokens = scored.num_tokens
    if not num_tokens.sum():
        return None
    return {
        "nats_per_token": float((half - full).sum() / num_tokens.sum()),
        "largest_of_a_document": float(np.abs((half - full) / np.maximum(num_tokens, 1)).max()),
        "num_tokens": int(num_tokens.sum()),
    }


def _extra_notes(text: HeldOut, contamination: float | None) -> list[str]:
    notes = []
    if text.split == "train":
        notes.append("This is the training text: the figures are not those of a held-out text.")
    elif contamination:
        notes.append(f"{contamination:.1%} of these documents are in the store's training text, word for word.")
    if is_main_process() and text.beginning[1]:
        notes.append("The compressors were given the first few megabytes of the text only.")
    return notes


def _continuations(scorer: Scorer, text: HeldOut, config: EvaluateConfig) -> dict[str, Any] | None:
    """Greedy continuations of held-out documents, compared with how the documents continue."""
    if config.continuations is None:
        return None

    def continue_texts(prompts: list[str]) -> list[str]:
        written = []
        with progress("Continuing", float(len(prompts)), "texts") as advance:
            for prompt in prompts:
                settings = GenerateConfig(prompt=(prompt,), max_new_tokens=CONTINUATION_TOKENS)
                (continuation,) = continue_prompts(scorer.loaded, scorer.tokenizer, settings)
                written.append(continuation.text[len(prompt) :])
                advance(1.0)
        return written

    scores = continuation_measures(list(text.documents()), continue_texts, config.continuations)
    if scores.num_continuations < config.continuations:
        documents = counted(scores.num_continuations, "document")
        log.warning("Only %s can be continued: the others are too short.", documents)
    return {**scores.to_dict(), "mode": "greedy", "max_new_tokens": CONTINUATION_TOKENS}
