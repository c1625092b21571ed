"""`evaluate`: what models score on held-out text, under one protocol each, before or after any training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cartilha.config import CompareConfig, EvaluateConfig, GenerateConfig
from cartilha.console import progress
from cartilha.errors import UserError, counted
from cartilha.evaluation.compressed import CompressedText
from cartilha.evaluation.continuation import continue_prompts
from cartilha.evaluation.continuation_scores import continuation_measures
from cartilha.evaluation.corpus import SHARD_CHARS, ScoredCorpus, score_corpus, score_in_shares
from cartilha.evaluation.documents import ScoredDocuments, encode_documents
from cartilha.evaluation.downstream import check_tasks, run_tasks
from cartilha.evaluation.measures import Evaluation, make_evaluation
from cartilha.evaluation.nll import TokenRows, score_documents
from cartilha.evaluation.saved import save_evaluation, token_file
from cartilha.evaluation.scorer import Scorer, make_scorer
from cartilha.machine.devices import choose_device, choose_dtype
from cartilha.machine.processes import is_main_process, world
from cartilha.model.load import load_model
from cartilha.pipeline.held_out import HeldOut, UnigramCollector, held_out, model_tokenizer
from cartilha.pipeline.preflight import preflight
from cartilha.tokens.store import batches

log = logging.getLogger("cartilha")

# Of tokens scored a second time in both dtypes: a twentieth of the corpus, between these.
LEAST_DRIFT_TOKENS, MAX_DRIFT_TOKENS = 128, 2_000
CONTINUATION_TOKENS = 120  # enough for the 32 words that are scored, at three to four tokens a word


@dataclass(frozen=True)
class EvaluatedModel:
    """One model's figures, and what else was asked for.

    Attributes:
        evaluation: Perplexity, bits per byte and what stands beside them.
        contamination: Share of the documents whose exact text is in the store's training side; None without a store.
        near_duplicates: Likewise of those with a near-duplicate there, with `--near_duplicates`.
        dtype_drift: Where the compute dtype is not float32: how its nll differs from float32's on the first documents,
            mean nats a token and the largest difference of a document's mean.
        continuations: chrF, BLEU, ROUGE-L and so on, with `--continuations`.
        tasks: The harness's results by task, with `--tasks`.
    """

    evaluation: Evaluation
    contamination: float | None
    near_duplicates: float | None = None
    dtype_drift: dict[str, float] | None = None
    continuations: dict[str, Any] | None = None
    tasks: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        asked = ("near_duplicates", "dtype_drift", "continuations", "tasks")
        extra = {name: getattr(self, name) for name in asked if getattr(self, name) is not None}
        return {**self.evaluation.to_dict(), "contamination": self.contamination, **extra}


@dataclass(frozen=True)
class EvaluateResult:
    """One evaluation a model, over the same documents.

    Attributes:
        models: In the order in which they were named.
        wall_seconds: From the call to the last figure: loading, scoring and all that stands beside.
    """

    models: tuple[EvaluatedModel, ...] = field(default=())
    wall_seconds: float = 0.0

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The models' figures."""
        return tuple(model.evaluation for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        models = [model.to_dict() for model in self.models]
        shared = {name: models[0][name] for name in ("corpus_hash", "protocol")}
        return {**shared, "wall_seconds": self.wall_seconds, "models": models}


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Score the documents with each model.

    Raises:
        UserError: No text, no such protocol, a missing extra, or a model that cannot be loaded.
    """
    started = time.perf_counter()
    preflight(config)
    text = held_out(config)
    check_tasks(config.tasks)
    if text.split == "train":
        log.warning("Scoring the training text: these figures say what was learnt by heart, not how good the model is.")
    compressed = text.compressed() if is_main_process() else None  # in the background from here on
    with token_file(Path(config.per_token)) if config.per_token else nullcontext() as tokens:
        models = []
        for ref in config.model:
            scorer = scorer_for(ref, text, config)
            take = None if tokens is None else partial(tokens.add, ref)
            models.append(_evaluate_model(scorer, text, compressed, config, take))
            del scorer
    return EvaluateResult(tuple(models), time.perf_counter() - started)


def scorer_for(ref: str, text: HeldOut, config: EvaluateConfig | CompareConfig) -> Scorer:
    """Load a model and settle how it is scored."""
    tokenizer = model_tokenizer(ref, text.store)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    loaded = load_model(ref, device, tokenizer=tokenizer)
    scorer = make_scorer(loaded, tokenizer, dtype, config.protocol, config.window, config.stride)
    if config.prefix_token is None:
        return scorer
    prefix_id = tokenizer.backend.token_to_id(config.prefix_token)
    if prefix_id is None:
        raise UserError(
            f"The tokenizer has no token {config.prefix_token!r}; leave --prefix_token out to use bos, else eos."
        )
    return replace(scorer, protocol=replace(scorer.protocol, prefix_id=int(prefix_id)))


def score_held_out(
    scorer: Scorer,
    text: HeldOut,
    *,
    take_rows: Callable[[TokenRows], None] | None = None,
    unigram: UnigramCollector | None = None,
) -> ScoredCorpus:
    """One pass over the text with one model."""
    with progress(f"Scoring with {scorer.loaded.reference}", text.num_tokens(scorer.tokenizer), "tokens") as advance:
        return score_corpus(
            scorer,
            text.documents(),
            advance=advance,
            take_rows=take_rows,
            observe=(lambda scored: None) if unigram is None else unigram.observe,
        )


def _evaluate_model(
    scorer: Scorer,
    text: HeldOut,
    compressed: CompressedText | None,
    config: EvaluateConfig,
    take_rows: Callable[[TokenRows], None] | None,
) -> EvaluatedModel:
    rank, num_ranks = world()
    fits = text.store is not None and scorer.tokenizer.fingerprint() == text.store.fingerprint
    unigram = (
        UnigramCollector(text.store, scorer.vocabulary_size) if text.store is not None and fits and rank == 0 else None
    )
    started = time.perf_counter()
    corpus = score_held_out(scorer, text, take_rows=take_rows, unigram=unigram if num_ranks == 1 else None)
    seconds = time.perf_counter() - started
    if unigram is not None and num_ranks > 1:  # this process has scored a part of the documents only
        for shard in batches(text.documents(), max_chars=SHARD_CHARS):
            unigram.observe(encode_documents(shard, scorer.tokenizer, scorer.protocol.first_tokens, allow_empty=True))
    evaluation = make_evaluation(
        scorer,
        corpus.documents,
        corpus.scores,
        seconds,
        baselines=(unigram.figures() if unigram else {}) | (compressed.figures() if compressed else {}),
    )
    contamination = text.share_in_training(corpus.documents.text_hashes)
    evaluation = replace(evaluation, notes=(*evaluation.notes, *_extra_notes(text, contamination)))
    for note in evaluation.notes:
        log.warning("%s", note)
    result = EvaluatedModel(
        evaluation,
        contamination,
        text.share_near_training() if config.near_duplicates and rank == 0 else None,
        _dtype_drift(scorer, text, int(corpus.documents.num_tokens.sum())),
        _continuations(scorer, text, config),
        run_tasks(scorer.loaded, scorer.tokenizer, config.tasks),
    )
    if config.save and rank == 0:
        save_evaluation(Path(config.save), result.to_dict(), corpus.documents, corpus.scores.nll)
    return result


def _dtype_drift(scorer: Scorer, text: HeldOut, num_tokens_scored: int) -> dict[str, float] | None:
    """What half precision changes, on the first tokens: a number to hold against differences between models."""
    if scorer.dtype == torch.float32:
        return None
    left = min(MAX_DRIFT_TOKENS, max(LEAST_DRIFT_TOKENS, num_tokens_scored // 20))
    scored = encode_documents(
        text.first_characters(8 * left), scorer.tokenizer, scorer.protocol.first_tokens, allow_empty=True
    )
    ids = []
    for own in scored.ids:
        ids.append(own[:left])
        left -= len(ids[-1])
    scored = replace(scored, ids=ids)
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
    """Greedy continuations of held-out documents against what they go on with."""
    if config.continuations is None:
        return None

    def continue_texts(prompts: list[str]) -> list[str]:
        settings = GenerateConfig(prompt=tuple(prompts), max_new_tokens=CONTINUATION_TOKENS)
        with progress("Continuing", float(len(prompts)), "texts") as advance:
            found = []
            for prompt in settings.prompt:
                found += continue_prompts(scorer.loaded, scorer.tokenizer, replace(settings, prompt=(prompt,)))
                advance(1.0)
        return [continuation.text[len(continuation.prompt) :] for continuation in found]

    scores = continuation_measures(list(text.documents()), continue_texts, config.continuations)
    if scores.num_continuations < config.continuations:
        log.warning(
            "Only %s can be continued: the others are too short.", counted(scores.num_continuations, "document")
        )
    return {**scores.to_dict(), "mode": "greedy", "max_new_tokens": CONTINUATION_TOKENS}


def evaluate_loaded(
    scorer: Scorer, documents: ScoredDocuments, title: str = "Evaluating"
) -> tuple[Evaluation, np.ndarray]:
    """Score prepared documents with a loaded model (validation during training): the figures, and each one's nll."""
    started = time.perf_counter()
    with progress(title, float(documents.num_tokens.sum()), "tokens") as advance:
        scores = score_in_shares(scorer, documents, advance)
    evaluation = make_evaluation(scorer, documents, scores, time.perf_counter() - started)
    for note in evaluation.notes:
        log.warning("%s", note)
    return evaluation, scores.nll
