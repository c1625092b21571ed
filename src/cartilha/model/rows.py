"""One document per row, for models that cannot run packed: states, convolutions, biases for distances, ...

Each piece of a document gets a row of its own, padded at the end, and the model reads it in its own way. No token sees
the padding that comes after it, so no document sees another. This is slower than packing, because of the padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from cartilha.blocks.packing import Batch
from cartilha.machine.devices import to_device
from cartilha.model.head import body_of, unsupported
from cartilha.model.long_rope import original_context

ROWS = "rows"  # instead of a kernel's name, where plans and records say how a model is computed


def row_groups(segment_lengths: np.ndarray, boundary: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of documents in rows, grouped by length so that less than half of each group is padding.

    The lengths, each at least 1, are those of all pieces of a batch in row-major order. Pieces of at most `boundary`
    are not grouped with longer ones. Yields two arrays of the shape (num_pieces, longest): positions in the flat batch,
    and False where the row is padded (with the piece's first position).
    """
    starts = np.cumsum(segment_lengths) - segment_lengths
    kinds = 2 * np.frexp(segment_lengths)[1]  # by the powers of two: 1, 2 and 3, 4 to 7, ...
    if boundary is not None:
        kinds += segment_lengths > boundary
    for kind in np.unique(kinds):
        begin, length = starts[kinds == kind, None], segment_lengths[kinds == kind, None]
        offset = np.arange(length.max())
        real = offset < length
        yield np.where(real, begin + offset, begin), real


def states_in_rows(
    model: PreTrainedModel, batch: Batch, *, with_routers: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Last hidden states of packed documents by a model with its own attention: (num_rows, row_length, hidden_size).

    And, if they are asked for, the logits of each layer's router: (num_rows * row_length, num_experts).
    """
    ids = batch.input_ids.reshape(-1)
    found, places = [], []
    routed: list[tuple[Tensor, ...]] = []
    asked = {"output_router_logits": True} if with_routers else {}
    for source, real in row_groups(batch.segment_lengths, original_context(model.config)):
        output = body_of(model)(
            input_ids=to_device(ids[source], model.device),
            attention_mask=to_device(real.astype(np.int64), model.device),
            use_cache=False,
            **asked,
        )
        kept = to_device(np.flatnonzero(real), model.device)
        found.append(output.last_hidden_state.flatten(0, 1)[kept])
        places.append(source[real])
        if with_routers:
            routed.append(tuple(logits.flatten(0, -2)[kept] for logits in output.router_logits))
    back = to_device(np.argsort(np.concatenate(places)), model.device)
    router_logits = tuple(torch.cat(layer)[back] for layer in zip(*routed, strict=True))
    return torch.cat(found)[back].view(*batch.input_ids.shape, -1), router_logits


def refuse_what_cannot_run(model: PreTrainedModel) -> None:
    """Refuse a model whose type is no plain decoder of text; `find_head_shape` looks at what it computes."""
    config = model.config
    if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise unsupported(model, "they have an encoder besides the decoder")
    if hasattr(config, "lsh_attn_chunk_length"):  # Reformer
        raise unsupported(model, "their attention draws random numbers, so that no figure comes out twice")
    if config.get_text_config() is not config or model.main_input_name != "input_ids":
        raise unsupported(model, "they read more than text")
