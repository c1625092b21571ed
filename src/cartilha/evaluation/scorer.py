"""A model with everything that scoring a text with it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from cartilha.evaluation.windows import Protocol, make_protocol
from cartilha.machine.devices import dtype_name
from cartilha.model.head import head_of
from cartilha.model.load import LoadedModel
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
        dtype = getattr(torch, self.protocol.dtype)
        assert isinstance(dtype, torch.dtype)
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
    """A scorer with the defaults of `make_protocol`, and the tokenizer's own prefix.

    Raises:
        UserError: No such protocol, or a window or stride that the model or the definition does not allow.
    """
    made = make_protocol(
        protocol,
        window,
        stride,
        prefix_id=tokenizer.prefix_id,
        dtype=dtype_name(dtype),
        context_length=loaded.context_length,
    )
    return Scorer(loaded, tokenizer, made)


def unused_ids(loaded: LoadedModel, tokenizer: TextTokenizer) -> list[int]:
    """Rows of the head that no token uses (OPT has seven): they decode to nothing and are never written."""
    used = set(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    return [i for i in range(len(head_of(loaded.model).weight)) if i not in used]
