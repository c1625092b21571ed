"""Models, loaded and ready to score a text."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from cartilha.config import CompareConfig, EvaluateConfig
from cartilha.errors import UserError
from cartilha.evaluation.scorer import Scorer, make_scorer
from cartilha.machine.devices import choose_dtype
from cartilha.model.load import load_model
from cartilha.tokens.store import TokenStore, tokenizer_for
from cartilha.tokens.tokenizer import TextTokenizer

log = logging.getLogger("cartilha")


def load_scorer(
    ref: str, store: TokenStore | None, config: EvaluateConfig | CompareConfig, device: torch.device
) -> Scorer:
    """Load a model and settle how it is scored; a UserError says why it cannot be scored like this."""
    tokenizer = model_tokenizer(ref, store)
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


def model_tokenizer(ref: str, store: TokenStore | None) -> TextTokenizer:
    """The tokenizer for a model; a warning says if the store was made with another one."""
    tokenizer = tokenizer_for(ref, store)
    if store is not None and tokenizer.fingerprint != store.fingerprint:
        log.warning("%s has another tokenizer than the store: the text is tokenized anew with the model's own.", ref)
    return tokenizer
