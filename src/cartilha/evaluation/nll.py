"""The nll of documents under a model: windows packed into rows, scored in one pass, summed in float64."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from cartilha.blocks.packing import IGNORE_INDEX, Batch
from cartilha.errors import UserError
from cartilha.evaluation.documents import ScoredDocuments
from cartilha.evaluation.windows import Protocol, Window, document_windows
from cartilha.model.forward import scored_nll

TOKENS_PER_FORWARD = {"cpu": 4096, "cuda": 32_768, "mps": 8192}


@dataclass(frozen=True)
class _Placed:
    """A window of a document."""

    document: int
    window: Window


def document_nll(
    model: PreTrainedModel,
    documents: ScoredDocuments,
    protocol: Protocol,
    dtype: torch.dtype,
    advance: Callable[[float], None] = lambda amount: None,
) -> np.ndarray:
    """Minus the sum of ln p(token | context) over each document's tokens, in nats: float64, shape (num_documents,).

    Args:
        model: In evaluation mode, with attention within documents.
        documents: What to score; every token is scored exactly once.
        protocol: Window, stride and prefix.
        dtype: Compute dtype.
        advance: Told the number of tokens scored after each forward pass.

    Raises:
        UserError: A document has a token whose nll is not finite; it is named, never dropped.
    """
    was_training = model.training
    model.eval()
    windows = [
        _Placed(document, window)
        for document, ids in enumerate(documents.ids)
        for window in document_windows(len(ids), protocol.window, protocol.stride)
    ]
    sums = np.zeros(len(documents.ids))
    num_scored = np.zeros(len(documents.ids), np.int64)
    for rows in _batches(windows, TOKENS_PER_FORWARD.get(model.device.type, 4096)):
        batch = _batch(rows, documents.ids, protocol.prefix_id)
        nll = scored_nll(model, batch, dtype).double().cpu().numpy()
        owner = np.repeat(
            [placed.document for row in rows for placed in row], [p.window.num_scored for row in rows for p in row]
        )
        if not np.isfinite(nll).all():
            name = documents.doc_ids[owner[~np.isfinite(nll)][0]]
            raise UserError(
                f"The model gives a token of the document {name} a probability that is not a number above zero; "
                "try --dtype float32, and check the model's weights."
            )
        np.add.at(sums, owner, nll)
        np.add.at(num_scored, owner, 1)
        advance(len(nll))
    model.train(was_training)
    assert (num_scored == documents.num_tokens).all(), "every token is scored exactly once"
    return sums


def _batches(windows: Sequence[_Placed], max_tokens: int) -> Iterator[list[list[_Placed]]]:
    """Rows of windows, longest windows first, each row filled up with shorter ones (best fit decreasing)."""
    order = sorted(windows, key=lambda placed: -placed.window.num_inputs)
    rows: list[list[_Placed]] = []
    begin = 0
    while begin < len(order):
        # Rows are as long as the longest window left; a batch takes what fills its rows, from the long end on.
        row_length = order[begin].window.num_inputs
        num_rows = max(1, max_tokens // row_length)
        rows = [[] for _ in range(num_rows)]
        room: list[tuple[int, int]] = sorted((row_length, row) for row in range(num_rows))
        while begin < len(order):
            length = order[begin].window.num_inputs
            place = bisect.bisect_left(room, (length, -1))
            if place == len(room):
                break
            left, row = room.pop(place)
            rows[row].append(order[begin])
            bisect.insort(room, (left - length, row))
            begin += 1
        yield [row for row in rows if row]


def _batch(rows: Sequence[Sequence[_Placed]], ids: Sequence[np.ndarray], prefix_id: int) -> Batch:
    """The rows as inputs and targets; the rest of a row is padding, a segment of its own without targets."""
    row_length = max(sum(placed.window.num_inputs for placed in row) for row in rows)
    shape = (len(rows), row_length)
    input_ids, position_ids = np.full(shape, prefix_id, np.int64), np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORE_INDEX, np.int64)
    segments: list[int] = []
    for row, placed_windows in enumerate(rows):
        at = 0
        for placed in placed_windows:
            window, document = placed.window, ids[placed.document]
            end = at + window.num_inputs
            first = at + (1 if window.first_input < 0 else 0)  # position 0 of a first window holds the prefix
            input_ids[row, first:end] = document[max(0, window.first_input) : window.past - 1]
            targets[row, end - window.num_scored : end] = document[window.first_target : window.past]
            position_ids[row, at:end] = np.arange(end - at)
            segments.append(end - at)
            at = end
        if at < row_length:
            position_ids[row, at:] = np.arange(row_length - at)
            segments.append(row_length - at)
    return Batch(input_ids, targets, position_ids, np.array(segments, np.int64))
