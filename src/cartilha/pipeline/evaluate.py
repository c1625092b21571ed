"""`evaluate`: what models score on held-out text, under one protocol each, before or after any training."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cartilha.config import EvaluateConfig
from cartilha.console import progress
from cartilha.corpus.document import Document
from cartilha.corpus.readers import read_documents
from cartilha.errors import UserError
from cartilha.evaluation.documents import ScoredDocuments, encode_documents
from cartilha.evaluation.measures import Evaluation, make_evaluation
from cartilha.evaluation.nll import document_nll
from cartilha.evaluation.windows import Protocol, first_tokens, make_protocol
from cartilha.model.forward import head_weight
from cartilha.model.load import LoadedModel, load_model
from cartilha.runtime import choose_device, choose_dtype
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer

log = logging.getLogger("cartilha")


@dataclass(frozen=True)
class EvaluateResult:
    """One evaluation a model, over the same documents."""

    corpus_hash: str
    evaluations: tuple[Evaluation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        models = [evaluation.to_dict() for evaluation in self.evaluations]
        return {"corpus_hash": self.corpus_hash, "protocol": models[0]["protocol"], "models": models}


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Score the documents with each model.

    Raises:
        UserError: No text or both kinds of it, no such protocol, or a model that cannot be loaded.
    """
    first_tokens(config.protocol)
    store, documents = _documents(config)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    evaluations = []
    for ref in config.model:
        tokenizer = _tokenizer(ref, store)
        loaded = load_model(ref, device, tokenizer=tokenizer)
        prefix_id = _prefix_id(config.prefix_token, tokenizer)
        protocol = make_protocol(
            config.protocol,
            config.window,
            config.stride,
            prefix_id=prefix_id,
            dtype=str(dtype).removeprefix("torch."),
            context_length=loaded.context_length,
        )
        scored = encode_documents(documents, tokenizer, protocol.first_tokens)
        evaluations.append(evaluate_loaded(loaded, scored, protocol, dtype))
        del loaded
    return EvaluateResult(evaluations[0].corpus_hash, tuple(evaluations))


def evaluate_loaded(
    loaded: LoadedModel, documents: ScoredDocuments, protocol: Protocol, dtype: torch.dtype, title: str = "Evaluating"
) -> Evaluation:
    """Score prepared documents with a loaded model; the notes that a reader needs are logged too."""
    started = time.perf_counter()
    with progress(title, float(documents.num_tokens.sum()), "tokens") as advance:
        nll = document_nll(loaded.model, documents, protocol, dtype, advance)
    evaluation = make_evaluation(
        loaded.ref,
        protocol,
        documents,
        nll,
        vocabulary_size=head_weight(loaded.model).shape[0],
        seconds=time.perf_counter() - started,
    )
    for note in evaluation.notes:
        log.warning("%s", note)
    return evaluation


def _documents(config: EvaluateConfig) -> tuple[TokenStore | None, Sequence[Document]]:
    if bool(config.store) == bool(config.input):
        raise UserError("Give the text to score either as --store STORE or as --input REF, one of the two.")
    if config.store:
        store = TokenStore(config.store)
        return store, store.validation_documents()[: config.limit_documents]
    documents = read_documents(
        config.input,
        text_column=config.text_column,
        encoding=config.encoding,
        invalid_bytes=config.invalid_bytes,
        limit_documents=config.limit_documents,
    )
    return None, list(documents)


def _tokenizer(ref: str, store: TokenStore | None) -> TextTokenizer:
    """The model's own tokenizer; random: models without one take the store's."""
    if ref.startswith("random:") and not ref.startswith("random:tiny"):
        if store is None:
            raise UserError(f"{ref} has no tokenizer of its own; evaluate it on a store.")
        return store.tokenizer()
    tokenizer = load_tokenizer(ref)
    if store is not None and tokenizer.fingerprint() != store.fingerprint:
        log.warning(
            "%s has another tokenizer than the store: the held-out text is tokenized anew with the model's own.", ref
        )
    return tokenizer


def _prefix_id(token: str | None, tokenizer: TextTokenizer) -> int:
    if token is None:
        return tokenizer.prefix_id
    token_id = tokenizer.backend.token_to_id(token)
    if token_id is None:
        raise UserError(f"The tokenizer has no token {token!r}; leave --prefix_token out to use bos, else eos.")
    return int(token_id)
