"""Embedding rows for the tokens that extend a vocabulary, made from the rows of the tokens that they replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cartilha.errors import HubUnreachableError, UserError
from cartilha.model.configuration import context_length
from cartilha.model.head import head_of, head_weight
from cartilha.model.load import LoadedModel, load_model
from cartilha.model_reference import resolve_model
from cartilha.tokens.tokenizer import TextTokenizer

ROWS_MULTIPLE = 8  # as tensor cores need
LEANING = 0.5  # weight of each piece relative to its neighbour, where input rows and head are separate


@dataclass(frozen=True)
class ModelShape:
    """What a vocabulary costs in a model.

    Attributes:
        num_rows: Rows of the token embeddings, used or not.
        width: Numbers per row.
        is_tied: Whether the head is the same matrix.
        num_parameters: Of the whole model, tied weights counted once.
        context_length: Most positions that the model takes.
    """

    num_rows: int
    width: int
    is_tied: bool
    num_parameters: int
    context_length: int

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
    if source.kind in ("random", "gguf"):
        return shape_of(load_model(reference, torch.device("cpu"), tokenizer=tokenizer).model)
    try:
        config = AutoConfig.from_pretrained(str(source.path or source.name), trust_remote_code=False)
        with torch.device("meta"):
            return shape_of(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except (OSError, ValueError, KeyError, HubUnreachableError):
        return None


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a loaded model."""
    rows, head = input_rows(model), head_weight(model)
    return ModelShape(rows.shape[0], rows.shape[1], rows is head, model.num_parameters(), context_length(model.config))


def input_rows(model: PreTrainedModel) -> Tensor:
    """The token embeddings, shape (num_rows, width)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def extend_embeddings(loaded: LoadedModel, pieces: Sequence[Sequence[int]], first_id: int) -> None:
    """Give a model rows for new tokens, in place; spare rows from `first_id` on are used first, and old rows stay.

    A new row is the mean of the rows of the tokens that it replaces. Where the head is a separate matrix, the mean of
    input rows leans to the last piece (the new token is read where the last piece was read), and the mean of the head's
    rows leans to the first piece (it is predicted where the first piece was predicted). Tied rows must serve for both,
    and for them the plain mean is best (docs/log.md).

    Args:
        loaded: On the CPU.
        pieces: For each new token the ids of the tokens that it replaces.
        first_id: Id of the first new token.

    Raises:
        UserError: The model has fewer rows than the old tokens need.
    """
    model = loaded.model
    old_rows = head_weight(model).shape[0]
    if any(max(ids) >= old_rows for ids in pieces):  # an unused [PAD] may lie beyond the rows; it gets one here
        raise UserError(
            f"{loaded.reference} has {old_rows} rows for a tokenizer of {first_id} ids; they do not belong together."
        )
    num_needed = first_id + len(pieces)
    if num_needed > old_rows:
        num_needed = -(-num_needed // ROWS_MULTIPLE) * ROWS_MULTIPLE
        model.resize_token_embeddings(num_needed, mean_resizing=False)
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
