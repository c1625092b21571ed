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
from cartilha.runtime import to_device

PROBE_TOKENS = 16
SAME_STATES = 1e-3  # of their spread; what a position sees and should not moves them by far more


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


def row_groups(segment_lengths: np.ndarray) -> list[RowGroup]:
    """Pieces of documents in rows, grouped so that less than half of a group's places are filling.

    Args:
        segment_lengths: Of all pieces of a batch in row-major order, each at least 1, shape (num_segments,).
    """
    starts = np.cumsum(segment_lengths) - segment_lengths
    powers = np.frexp(segment_lengths)[1]  # 1, 2 and 3, 4 to 7, ...
    groups = []
    for power in np.unique(powers):
        begin, length = starts[powers == power, None], segment_lengths[powers == power, None]
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
    for group in row_groups(batch.segment_lengths):
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


@torch.no_grad()
def prove_rows(model: PreTrainedModel) -> None:
    """Run a few tokens through the model to see that `states_in_rows`, and the head after it, are what it computes.

    Two things would make every figure wrong: a position that sees what comes after it, and logits that are not the
    last hidden states times the head (soft caps, scales). The head's output is replaced by known values of the size
    that makes any cap visible: they must come out as they went in.

    Raises:
        UserError: The model does something of the kind.
    """
    head = model.get_output_embeddings()
    num_ids = head.weight.shape[0]
    length = min(PROBE_TOKENS, _longest(model))
    ids = torch.arange(2 * length, device=model.device).view(2, length) * 7919 % num_ids
    ids[1, : length // 2] = ids[0, : length // 2]
    inputs: list[torch.Tensor] = []
    planted = torch.linspace(-500.0, 500.0, num_ids, device=model.device).expand(2, length, num_ids)

    def plant(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        inputs.append(arguments[0])
        return planted

    hook = head.register_forward_hook(plant)
    try:
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        logits = model(**arguments).logits
        states = model.base_model(**arguments).last_hidden_state
    finally:
        hook.remove()
    if len(inputs) != 1 or not torch.equal(logits, planted) or not _same(inputs[0], states):
        _refuse(model, "they change the logits after the head, or the hidden states before it (a soft cap or a scale)")
    if not _same(states[0, : length // 2], states[1, : length // 2]):
        _refuse(model, "a position sees what comes after it")


def _longest(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or PROBE_TOKENS)


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    spread = float(expected.std())
    return found.shape == expected.shape and float((found - expected).abs().max()) <= SAME_STATES * spread


def _refuse(model: PreTrainedModel, reason: str) -> NoReturn:
    raise UserError(
        f"Models of the type {model.config.model_type} are not supported, since {reason}; choose a decoder of text "
        "such as opt, gpt2, llama or qwen3."
    )
