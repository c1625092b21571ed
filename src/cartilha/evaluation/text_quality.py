"""Scores of texts as text to learn from: their perplexity under a model, and what a classifier says of them.

They are computed in float32 on a CPU and in the device's own type elsewhere, never in a type that a measurement of
speed chose, so that the same machine gives the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cartilha.errors import UserError, first_line
from cartilha.evaluation.documents import ScoredDocuments
from cartilha.evaluation.nll import score_documents
from cartilha.evaluation.scorer import make_scorer
from cartilha.machine.devices import choose_device, choose_dtype
from cartilha.model.configuration import place_of
from cartilha.model.load import UNREADABLE, load_model
from cartilha.model_reference import resolve_model
from cartilha.tokens.tokenizer import TextTokenizer

MAX_CLASSIFIED_TOKENS = 512  # what most encoders take
TEXTS_PER_FORWARD = {"cpu": 8, "cuda": 128, "mps": 32}

Scorer = Callable[[Sequence[np.ndarray]], np.ndarray]  # from the ids of documents to their scores


def scorer_of(signal: str, reference: str, tokenizer: TextTokenizer) -> Scorer:
    """What computes `perplexity`, or the `score` of a classifier, of documents given by ids of the tokenizer.

    A UserError says that the model cannot be loaded, or is no classifier.
    """
    return _perplexity(reference, tokenizer) if signal == "perplexity" else _classifier(reference, tokenizer)


def _device() -> tuple[torch.device, torch.dtype]:
    device = choose_device("auto")
    return device, choose_dtype("float32" if device.type == "cpu" else "auto", device)


def _perplexity(reference: str, tokenizer: TextTokenizer) -> Scorer:
    device, dtype = _device()
    scorer = make_scorer(load_model(reference, device, tokenizer=tokenizer), tokenizer, dtype)

    def score(ids: Sequence[np.ndarray]) -> np.ndarray:
        documents = ScoredDocuments.of_ids(ids)
        return np.asarray(np.exp(score_documents(scorer, documents).nll / np.maximum(1, documents.num_tokens)))

    return score


def _classifier(reference: str, tokenizer: TextTokenizer) -> Scorer:
    """The value of a classifier's only output, else the number of the label that it expects: sum of i * p(i)."""
    device, dtype = _device()
    model, encode = load_classifier(reference)
    torch.nn.Module.to(model, device)
    longest = min(MAX_CLASSIFIED_TOKENS, encode.model_max_length, getattr(model.config, "max_position_embeddings", 512))

    @torch.inference_mode()
    def score(ids: Sequence[np.ndarray]) -> np.ndarray:
        texts = tokenizer.decode_batch(ids)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length need little padding
        result = np.zeros(len(texts))
        at_once = TEXTS_PER_FORWARD.get(device.type, 8)
        for begin in range(0, len(order), at_once):
            own = order[begin : begin + at_once]
            found = [texts[i] for i in own]
            batch = encode(found, truncation=True, max_length=longest, padding=True, return_tensors="pt").to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(**batch).logits.float()
            if logits.shape[1] == 1:
                result[own] = logits[:, 0].cpu().numpy()
            else:
                labels = torch.arange(logits.shape[1], device=device)
                result[own] = (logits.softmax(-1) * labels).sum(-1).cpu().numpy()
        return result

    return score


def load_classifier(reference: str) -> tuple[Any, Any]:
    """A classifier of texts, in float32, and its tokenizer; a UserError says that it is none, or cannot be loaded."""
    source = resolve_model(reference)
    if source.kind not in ("hub", "directory"):
        raise UserError(f"--classifier takes a hub id or a directory, not {reference}.")
    place = place_of(source)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # Code that comes with a model is never run.
        encode: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        result: Any = AutoModelForSequenceClassification.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except UNREADABLE as error:
        what = first_line(error)[:200] if Path(place).is_dir() else "it cannot be found"
        raise UserError(f"The classifier {reference} cannot be loaded ({what}).") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, report = result
    if report["missing_keys"]:  # transformers would go on with random values
        raise UserError(
            f"{reference} is no classifier of texts: it has no weights for {sorted(report['missing_keys'])[0]}; name a"
            " model that was trained as AutoModelForSequenceClassification."
        )
    if encode.pad_token is None:
        encode.pad_token = encode.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = encode.pad_token_id
    return model.eval(), encode
