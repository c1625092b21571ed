"""Attention within documents on a CPU: one causal call per segment, whose output is kept only once.

With `scaled_dot_product_attention` the output of every segment is kept beside the rows put together from them: 7 % of
what OPT-125M keeps. Here the kernels that it would choose are called directly, and read and write whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The kernels that scaled_dot_product_attention chooses on a CPU. They have no dropout, and torch may rename them.
HAS_KERNELS = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")


@dataclass(frozen=True)
class Scoring:
    """How an attention layer weighs what a query may see."""

    scaling: float | None = None  # factor of the scores; None for 1 / sqrt(head_size)
    sliding_window: int | None = None  # positions that a query sees at most, itself included; None for all
    dropout: float = 0.0  # probability that an attention weight is dropped
    softcap: float | None = None  # bound of the scores' size (Gemma 2: arXiv:2408.00118, section 2)
    sinks: Tensor | None = None  # scores of nothing, one for each head: shape (num_heads,) (arXiv:2309.17453)

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention computes it."""
        return self.softcap is None and self.sinks is None


def segment_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scoring: Scoring) -> Tensor:
    """Causal attention within each segment, without dropout, differentiable once in queries, keys and values.

    Shapes are those of `attention.Kernel.attend`. The lengths of the segments are in row-major order; none crosses a
    row's end, and together they fill the rows. bf16 is computed in float32: the CPU's attention is slower in bf16
    (docs/log.md).
    """
    assert not scoring.dropout, "such models are computed under a mask: see `Kernel.obstacle`"
    if not scoring.is_plain:
        return _weighed_segments(query, key, value, lengths, scoring)
    output: Tensor = _SegmentAttention.apply(query, key, value, lengths, scoring)
    return output


def weighed(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scoring: Scoring) -> Tensor:
    """Attention by its definition in float32, with caps and sinks: shape (num_rows, row_length, num_heads, head_size).

    `visible` is True where a query may look; its shape is broadcast to (num_rows, num_heads, row_length, row_length).
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(repeats, dim=1) if repeats > 1 else heads for heads in (key, value))
    scaling = query.shape[3] ** -0.5 if scoring.scaling is None else scoring.scaling
    scores = (query @ key.transpose(2, 3)).float() * scaling
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if scoring.sinks is not None:  # one more score to share the weight with, whose value is nothing
        sinks = scoring.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=3)
    weights = F.dropout(scores.softmax(dim=3)[..., : key.shape[2]], scoring.dropout, training=scoring.dropout > 0)
    return (weights.to(value.dtype) @ value).transpose(1, 2)


def _weighed_segments(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scoring: Scoring) -> Tensor:
    num_heads, row_length = query.shape[1:3]
    attended = []
    for row, positions in _segments(lengths, row_length):
        q, k, v = (_segment(heads, row, positions, num_heads) for heads in (query, key, value))
        visible = causal_mask(q.shape[2], scoring.sliding_window, q.device)
        attended.append(weighed(q, k, v, visible, scoring)[0])
    return torch.cat(attended).to(query.dtype).view(-1, row_length, num_heads, query.shape[3])


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scoring: Scoring
    ) -> Tensor:
        query, key, value = (_rows_of_numbers(heads) for heads in (query, key, value))
        output = query.new_empty(query.transpose(1, 2).shape)
        normalisers = []
        for row, positions in _segments(lengths, query.shape[2]):
            q, k, v = (_segment(heads, row, positions, query.shape[1]) for heads in (query, key, value))
            mask = _window_mask(q, scoring.sliding_window)
            attended, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, mask is None, attn_mask=mask, scale=scoring.scaling
            )
            output[row, positions] = attended[0].transpose(0, 1)
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, output, *normalisers)
        ctx.lengths, ctx.scoring = lengths, scoring
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *normalisers = ctx.saved_tensors
        grad_output = _rows_of_numbers(grad_outputs[0])
        gradients = [torch.empty_like(heads) for heads in (query, key, value)]
        num_heads, row_length = query.shape[1:3]
        segments = _segments(ctx.lengths, row_length)
        for (row, positions), normaliser in zip(segments, normalisers, strict=True):
            q, k, v = (_segment(heads, row, positions, num_heads) for heads in (query, key, value))
            by_output, attended = (
                _segment(rows.transpose(1, 2), row, positions, num_heads) for rows in (grad_output, output)
            )
            mask = _window_mask(q, ctx.scoring.sliding_window)
            by_segment = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                by_output, q, k, v, attended, normaliser, 0.0, mask is None, attn_mask=mask, scale=ctx.scoring.scaling
            )
            for gradient, by_heads in zip(gradients, by_segment, strict=True):
                gradient[row, :, positions] = _summed(by_heads[0], gradient.shape[1])
        return *gradients, None, None


def _rows_of_numbers(heads: Tensor) -> Tensor:
    """With a contiguous last dimension, as the kernels need it."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _segments(lengths: Sequence[int], row_length: int) -> Iterator[tuple[int, slice]]:
    """The row of each segment and its positions in it."""
    begin = 0
    for length in lengths:
        row, offset = divmod(begin, row_length)
        yield row, slice(offset, offset + length)
        begin += length


def _segment(heads: Tensor, row: int, positions: slice, num_heads: int) -> Tensor:
    """A segment in the dtype of the kernels, shape (1, num_heads, length, head_size)."""
    piece = heads[row : row + 1, :, positions]
    if piece.dtype == torch.bfloat16:
        piece = piece.float()
    return piece if piece.shape[1] == num_heads else piece.repeat_interleave(num_heads // piece.shape[1], dim=1)


def _summed(heads: Tensor, num_heads: int) -> Tensor:
    """The gradient of repeated heads: the sum over their copies, shape (num_heads, length, head_size)."""
    return heads if len(heads) == num_heads else heads.unflatten(0, (num_heads, -1)).sum(dim=1)


def _window_mask(query: Tensor, sliding_window: int | None) -> Tensor | None:
    """What is added to the scores of a segment longer than the window; None where causality is enough."""
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    return torch.full((length, length), -torch.inf, dtype=query.dtype).masked_fill_(
        causal_mask(length, sliding_window, query.device), 0.0
    )


def causal_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """True where position i may look at j: i - window < j <= i; shape (length, length)."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)
