"""One document a row: how models run whose attention we do not know (biases for distances, soft caps, sinks, ...).

Each piece of a document is put into a row of its own, padded at the end, and the model attends in its own way. Padding
that comes after a text is seen by none of its tokens, so that no document sees another by construction. It is slower
than packing: rows of a forward pass differ in length by less than a factor of two, and the shorter ones are filled up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from cartilha.blocks.packing import Batch
from cartilha.errors import UserError
from cartilha.machine.devices import to_device
from cartilha.model.head import HeadError, HeadShape, find_head_shape
from cartilha.model.long_rope import original_context


@dataclass(frozen=True)
class RowGroup:
    """Pieces of documents of similar length.

    Attributes:
        source: Which position of the flat batch stands at each place, shape (num_pieces, longest); a piece's first
            position where its row is filled up.
        real: Where a row is not filled up, same shape, booleans.
    """

    source: np.ndarray
    real: np.ndarray


def row_groups(segment_lengths: np.ndarray, boundary: int | None = None) -> list[RowGroup]:
    """Pieces of documents in rows, grouped so that less than half of a group's places are filling.

    Args:
        segment_lengths: Of all pieces of a batch in row-major order, each at least 1, shape (num_segments,).
        boundary: Pieces of at most this length are never grouped with longer ones; None where that does not matter.
    """
    starts = np.cumsum(segment_lengths) - segment_lengths
    kinds = 2 * np.frexp(segment_lengths)[1]  # by the powers of two: 1, 2 and 3, 4 to 7, ...
    if boundary is not None:
        kinds += segment_lengths > boundary
    groups = []
    for kind in np.unique(kinds):
        begin, length = starts[kinds == kind, None], segment_lengths[kinds == kind, None]
        offset = np.arange(length.max())
        real = offset < length
        groups.append(RowGroup(np.where(real, begin + offset, begin), real))
    return groups


def states_in_rows(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Last hidden states of a batch of packed documents, shape (num_rows, row_length, hidden_size).

    Args:
        model: With its own attention.
        batch: Blocks; each piece of a document is computed in a row of its own.
    """
    ids = batch.input_ids.reshape(-1)
    found, places = [], []
    for group in row_groups(batch.segment_lengths, original_context(model.config)):
        output = model.base_model(
            input_ids=to_device(ids[group.source], model.device),
            attention_mask=to_device(group.real.astype(np.int64), model.device),
            use_cache=False,
        )
        kept = to_device(np.flatnonzero(group.real), model.device)
        found.append(output.last_hidden_state.flatten(0, 1)[kept])
        places.append(group.source[group.real])
    back = to_device(np.argsort(np.concatenate(places)), model.device)
    return torch.cat(found)[back].view(*batch.input_ids.shape, -1)


def refuse_what_cannot_run(model: PreTrainedModel) -> None:
    """Refuse by name what is no plain decoder of text; what its weights do is looked at by `prove_rows`.

    Raises:
        UserError: With the reason.
    """
    config = model.config
    if getattr(model, "_is_stateful", False):
        _refuse(model, "they carry a state from token to token instead of looking back")
    if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        _refuse(model, "they have an encoder besides the decoder")
    if config.get_text_config() is not config or model.main_input_name != "input_ids":
        _refuse(model, "they read more than text")


def prove_rows(model: PreTrainedModel) -> HeadShape:
    """Run a few tokens through the model to see that `states_in_rows`, and the head after it, are what it computes.

    Raises:
        UserError: They are not: every figure would be wrong.
    """
    try:
        return find_head_shape(model)
    except HeadError as error:
        _refuse(model, str(error))


def _refuse(model: PreTrainedModel, reason: str) -> NoReturn:
    raise UserError(
        f"Models of the type {model.config.model_type} are not supported, since {reason}; choose a decoder of text "
        "such as opt, gpt2, llama or qwen3."
    )
