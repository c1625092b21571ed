"""Models, loaded and ready to score a text."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from cartilha.config import ComputeOptions, ScoringOptions
from cartilha.errors import UserError
from cartilha.evaluation.scorer import Scorer, make_scorer
from cartilha.machine.devices import choose_dtype
from cartilha.model.load import load_model
from cartilha.tokens.store import TokenStore, tokenizer_for

log = logging.getLogger("cartilha")


def load_scorer(ref: str, store: TokenStore | None, config: ComputeOptions, device: torch.device) -> Scorer:
    """Load a model and settle how it is scored: as `config` says, if it has options of scoring, else by default.

    A UserError says why it cannot be scored like this.
    """
    scoring = config if isinstance(config, ScoringOptions) else ScoringOptions()
    tokenizer = tokenizer_for(ref, store)
    if store is not None and tokenizer.fingerprint != store.fingerprint:
        log.warning("%s has another tokenizer than the store: the text is tokenized anew with the model's own.", ref)
    dtype = choose_dtype(config.dtype, device)
    loaded = load_model(ref, device, tokenizer=tokenizer)
    scorer = make_scorer(loaded, tokenizer, dtype, scoring.protocol, scoring.window, scoring.stride)
    if scoring.prefix_token is None:
        return scorer
    prefix_id = tokenizer.backend.token_to_id(scoring.prefix_token)
    if prefix_id is None:
        raise UserError(
            f"The tokenizer has no token {scoring.prefix_token!r}; leave --prefix_token out to use bos, else eos."
        )
    return replace(scorer, protocol=replace(scorer.protocol, prefix_id=int(prefix_id)))
