"""Embedding rows for the tokens that extend a vocabulary, made from the rows of the tokens that they replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cartilha.errors import HubUnreachableError, UserError
from cartilha.model.configuration import context_length, place_of
from cartilha.model.head import head_of
from cartilha.model.load import LoadedModel, load_model
from cartilha.model.parts import resize, text_config
from cartilha.model_reference import adapter_base, resolve_model
from cartilha.tokens.tokenizer import TextTokenizer

ROWS_MULTIPLE = 8  # as tensor cores need
LEANING = 0.5  # weight of each piece relative to its neighbour, where input rows and head are separate


@dataclass(frozen=True)
class ModelShape:
    """What a vocabulary costs in a model."""

    num_rows: int  # of the token embeddings, used or not
    width: int  # numbers per row
    is_tied: bool  # the head is the same matrix
    num_parameters: int  # of the whole model, tied weights counted once
    context_length: int  # most positions that the model takes

    @property
    def row_parameters(self) -> int:
        """Parameters that a new row adds."""
        return self.width * (1 if self.is_tied else 2)

    def relative_cost(self, num_new_rows: int) -> float:
        """Cost per token in matrix products with so many new rows, relative to the cost without (6N, head included)."""
        body = self.num_parameters - self.num_rows * self.row_parameters
        head = self.num_rows * self.width
        return (body + head + num_new_rows * self.width) / (body + head)


def model_shape(reference: str, tokenizer: TextTokenizer) -> ModelShape | None:
    """The shape of a MODEL argument, without its weights if possible; None for a folder with a tokenizer alone."""
    source = resolve_model(reference)
    is_adapter = source.path is not None and adapter_base(source.path) is not None
    if source.kind in ("random", "gguf") or is_adapter:
        return shape_of(load_model(reference, torch.device("cpu"), tokenizer=tokenizer).model)
    try:
        config = text_config(AutoConfig.from_pretrained(place_of(source, with_weights=False), trust_remote_code=False))
        with torch.device("meta"):
            return shape_of(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except (OSError, ValueError, KeyError, HubUnreachableError):
        return None


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a loaded model."""
    rows, head = input_rows(model), head_of(model).weight
    return ModelShape(rows.shape[0], rows.shape[1], rows is head, model.num_parameters(), context_length(model.config))


def input_rows(model: PreTrainedModel) -> Tensor:
    """The token embeddings, shape (num_rows, width)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def extend_embeddings(loaded: LoadedModel, pieces: Sequence[Sequence[int]], first_id: int) -> None:
    """Give a model on the CPU rows for new tokens, in place; spare rows are used first, and old rows stay.

    `pieces` are, for each new token, the ids of the tokens that it replaces; `first_id` is the first new id. A new row
    is the mean of the rows of those tokens. Where the head is a separate matrix, the mean of input rows leans to the
    last piece (the new token is read where the last piece was read), and the mean of the head's rows leans to the first
    piece (it is predicted where the first piece was predicted). Tied rows must serve for both, and for them the plain
    mean is best (docs/log.md). A model with fewer rows than the old tokens need is refused.
    """
    model = loaded.model
    old_rows = head_of(model).weight.shape[0]
    if any(max(ids) >= old_rows for ids in pieces):  # an unused [PAD] may lie beyond the rows; it gets one here
        raise UserError(
            f"{loaded.reference} has {old_rows} rows for a tokenizer of {first_id} ids; they do not belong together."
        )
    num_needed = first_id + len(pieces)
    if num_needed > old_rows:
        num_needed = -(-num_needed // ROWS_MULTIPLE) * ROWS_MULTIPLE
        resize(model, loaded.other_parts, num_needed)
    inputs, head = input_rows(model), head_of(model)
    sides = [(inputs, 1.0)] if inputs is head.weight else [(inputs, 1 / LEANING), (head.weight, LEANING)]
    if head.bias is not None:
        sides.append((head.bias[:, None], LEANING))
    with torch.no_grad():
        for matrix, ratio in sides:
            # Rows of no token are the mean row: its logit is average, far below those of likely tokens.
            matrix[old_rows:] = matrix[:old_rows].mean(dim=0)
            for i, ids in enumerate(pieces):
                weights = torch.tensor([ratio**place for place in range(len(ids))], dtype=matrix.dtype)
                matrix[first_id + i] = (weights / weights.sum()) @ matrix[list(ids)]
