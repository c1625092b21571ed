"""A model with everything that scoring a text with it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from cartilha.errors import UserError, log
from cartilha.evaluation.windows import Protocol, make_protocol
from cartilha.machine.devices import choose_dtype, dtype_name
from cartilha.model.configuration import NO_LIMIT
from cartilha.model.head import head_of
from cartilha.model.load import LoadedModel, load_model
from cartilha.option_groups import ComputeOptions, ScoringOptions
from cartilha.tokens.store import TokenStore, tokenizer_for
from cartilha.tokens.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Scorer:
    """A model, its tokenizer and the protocol that it scores under."""

    loaded: LoadedModel
    tokenizer: TextTokenizer
    protocol: Protocol

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the protocol."""
        dtype: torch.dtype = getattr(torch, self.protocol.dtype)
        return dtype

    @property
    def vocabulary_size(self) -> int:
        """Rows of the head: the perplexity of the uniform model."""
        return len(head_of(self.loaded.model).weight)

    @cached_property
    def unused_ids(self) -> torch.Tensor:
        """Rows of the head that no token uses, int64, on the model's device."""
        ids = unused_ids(self.loaded, self.tokenizer)
        return torch.tensor(ids, dtype=torch.long, device=self.loaded.model.device)

    def in_dtype(self, dtype: torch.dtype) -> Scorer:
        """The same model and windows in another compute dtype."""
        return replace(self, protocol=replace(self.protocol, dtype=dtype_name(dtype)))


def make_scorer(
    loaded: LoadedModel,
    tokenizer: TextTokenizer,
    dtype: torch.dtype,
    protocol: str = "full",
    window: int | None = None,
    stride: int | None = None,
) -> Scorer:
    """A scorer with the defaults of `make_protocol`, and the tokenizer's own prefix."""
    made = make_protocol(
        protocol,
        window,
        stride,
        prefix_id=tokenizer.prefix_id,
        dtype=dtype_name(dtype),
        context_length=loaded.context_length,
    )
    if loaded.context_length == NO_LIMIT:
        log.info(
            "%s names no longest text: it is scored in windows of %d tokens (--window takes others), and trained in "
            "blocks of any length (--block_size).",
            *(loaded.reference, made.window),
        )
    return Scorer(loaded, tokenizer, made)


def load_scorer(ref: str, store: TokenStore | None, config: ComputeOptions, device: torch.device) -> Scorer:
    """Load a model and settle how it is scored: as `config` says, if it has options of scoring, else by default.

    A UserError says why it cannot be scored like this.
    """
    scoring = config if isinstance(config, ScoringOptions) else ScoringOptions()
    tokenizer = tokenizer_for(ref, store)
    if store is not None and tokenizer.fingerprint != store.fingerprint:
        log.warning("%s has another tokenizer than the store: the text is tokenized anew with the model's own.", ref)
    dtype, weights = choose_dtype(config.dtype, device), getattr(torch, scoring.load_dtype)
    if weights == torch.bfloat16 and dtype == torch.float32:
        dtype = torch.bfloat16  # which float32 could not make more exact
    loaded = load_model(ref, device, tokenizer=tokenizer, dtype=weights)
    scorer = make_scorer(loaded, tokenizer, dtype, scoring.protocol, scoring.window, scoring.stride)
    if (prefix := scoring.prefix_token) is None:
        return scorer
    prefix_id = tokenizer.backend.token_to_id(prefix)
    if prefix_id is None:
        raise UserError(f"The tokenizer has no token {prefix!r}; leave --prefix_token out to use bos, else eos.")
    return replace(scorer, protocol=replace(scorer.protocol, prefix_id=int(prefix_id)))


def unused_ids(loaded: LoadedModel, tokenizer: TextTokenizer) -> list[int]:
    """Rows of the head that no token uses (OPT has seven): they decode to nothing and are never written."""
    used = set(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    return [i for i in range(len(head_of(loaded.model).weight)) if i not in used]
