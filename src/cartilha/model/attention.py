"""Attention in which no document sees another: one function, registered once, for every supported architecture.

transformers hands a registered attention function no mask, so this one honours causality, the scale and a sliding
window itself. The boundaries of the documents travel explicitly with each call (`Segments`); an architecture with
something this function does not know (soft caps, sinks, biases) keeps its own and runs one document a row (`rows.py`).

Three ways to compute the same thing, chosen from the hardware:
  varlen    CUDA of capability 8 and above in half precision: torch's variable-length flash attention.
  segments  CPU: one causal call a segment, so that neither other documents nor the future cost anything
            (`segment_attention.py`).
  mask      elsewhere (T4, MPS), and with dropout on a CPU: one call with a block mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from cartilha.errors import UserError
from cartilha.machine.devices import to_device
from cartilha.model.long_rope import choose_by_document
from cartilha.model.rows import refuse_what_cannot_run
from cartilha.model.segment_attention import HAS_KERNELS, causal_mask, segment_attention

ATTENTION_NAME = "cartilha_documents"

# Architectures for which tests/peer proves: same loss as transformers, and no document sees another.
SUPPORTED_MODEL_TYPES = (
    "opt",
    "llama",
    "gpt2",
    "gpt_neox",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "smollm3",
    "olmo2",
    "phi3",
)

# What torch's variable-length attention can be told: 2.10 has neither scale nor window, 2.11 no `enable_gqa`.
VARLEN_SETTINGS = frozenset(inspect.signature(varlen_attn).parameters)

ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop")  # as configurations name it

# `kept` computes nothing: it keeps what flash attention keeps for its backward pass (for the memory plan).
Kernel = Literal["varlen", "segments", "mask", "kept"]


@dataclass(frozen=True)
class Segments:
    """Where the pieces of documents of a batch begin and end, in the form that the kernel takes.

    Tensors of one shape for all batches, apart from `lengths`, which the CPU's kernel alone has: a compiled model
    would be compiled anew for every Python value that changes.

    Attributes:
        row_length: Positions a row; no segment crosses a row's end.
        kernel: How attention is computed.
        lengths: For `segments`: of each segment in row-major order; they sum to the batch's num_rows * row_length.
        boundaries: For `varlen`: cumulative lengths from 0, int32, shape (capacity + 1,); the total is repeated at the
            end, as segments of no length.
        mask: For `mask`: True where a query may look, shape (num_rows, 1, row_length, row_length).
    """

    row_length: int
    kernel: Kernel
    lengths: tuple[int, ...] = ()
    boundaries: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @classmethod
    def of(
        cls, lengths: Sequence[int], row_length: int, device: torch.device, kernel: Kernel, capacity: int = 0
    ) -> Segments:
        """The segments of these lengths.

        Args:
            lengths: In row-major order.
            row_length: Positions a row.
            device: Where the model is.
            kernel: How attention is computed.
            capacity: Segments that `boundaries` has room for at least, so that batches with fewer have the same shape.
        """
        if kernel == "segments":
            return cls(row_length, kernel, lengths=tuple(lengths))
        if kernel == "varlen":
            return cls(row_length, kernel, boundaries=_boundaries(lengths, capacity, device))
        if kernel == "mask":
            return cls(row_length, kernel, mask=_block_mask(lengths, row_length, device))
        return cls(row_length, kernel)


def _boundaries(lengths: Sequence[int], capacity: int, device: torch.device) -> torch.Tensor:
    cumulative = np.zeros(max(capacity, len(lengths)) + 1, np.int32)
    cumulative[1 : len(lengths) + 1] = np.cumsum(lengths)
    cumulative[len(lengths) + 1 :] = cumulative[len(lengths)]
    return to_device(cumulative, device)


def _block_mask(lengths: Sequence[int], row_length: int, device: torch.device) -> torch.Tensor:
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    segment = to_device(numbers, device).view(-1, 1, row_length, 1)
    return (segment == segment.transpose(2, 3)) & causal_mask(row_length, None, device)


def choose_kernel(device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> Kernel:
    """How attention is computed on this hardware in this compute dtype."""
    if device_type == "cuda" and capability is not None and capability >= (8, 0) and dtype != torch.float32:
        return "varlen"
    return "segments" if device_type == "cpu" else "mask"


def head_size(config: PretrainedConfig) -> int:
    """Numbers of an attention head; of the largest where layers differ (Gemma 4)."""
    layers = getattr(config, "per_layer_config", None) or [config]
    default = config.hidden_size // config.num_attention_heads
    return max(int(getattr(layer, "head_dim", None) or default) for layer in layers)


def obstacle(kernel: Kernel, config: PretrainedConfig, *, training: bool) -> str | None:
    """Why a kernel cannot compute a model, so that it goes under a mask: the reason in words; None where it can."""
    if kernel not in ("varlen", "segments"):
        return None
    size = head_size(config)
    if kernel == "varlen" and (size % 8 or size > 256):
        return f"flash attention takes heads of 8, 16, ... 256 numbers, and this model's have {size}"
    if training and any(getattr(config, name, 0.0) for name in ATTENTION_DROPOUT):
        return "it knows no dropout of attention weights, which this model is trained with"
    if kernel == "segments" and not HAS_KERNELS:
        return "this version of torch does not have it"
    return None


def document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment.

    Args:
        module: The attention layer (transformers passes it; unused).
        query: Shape (num_rows, num_heads, row_length, head_size).
        key: Shape (num_rows, num_key_value_heads, row_length, head_size); likewise value.
        value: See key.
        attention_mask: None: the mask follows from the segments.
        segments: The boundaries of the documents.
        scaling: Factor of the scores; None for 1 / sqrt(head_size).
        dropout: Dropout probability of the attention weights.
        sliding_window: Positions that a query sees at most, itself included; None for all.
        **kwargs: What transformers passes to every attention function and this one has no use for.

    Returns:
        The output, shape (num_rows, row_length, num_heads, head_size), and None for the weights.
    """
    assert attention_mask is None, "transformers built a mask although our attention is registered without one"
    assert kwargs.get("softcap") is None, "soft caps are refused when the model is loaded"
    num_rows, num_heads, row_length, head_size = query.shape
    assert row_length == segments.row_length
    repeats = num_heads // key.shape[1]
    if segments.kernel == "varlen":
        output = _varlen(query, key, value, segments, scaling, sliding_window)
    elif segments.kernel == "segments":
        assert not dropout, "goes under a mask: see `obstacle`"
        output = segment_attention(query, key, value, segments.lengths, scaling, sliding_window)
    elif segments.kernel == "kept":
        output = _KeptByFlashAttention.apply(query, key, value)
    else:
        mask = segments.mask
        assert mask is not None
        if sliding_window is not None and sliding_window < row_length:
            mask = mask & causal_mask(row_length, sliding_window, mask.device)
        attended = F.scaled_dot_product_attention(
            query, _repeat(key, repeats), _repeat(value, repeats), attn_mask=mask, dropout_p=dropout, scale=scaling
        )
        output = attended.transpose(1, 2)
    return output.reshape(num_rows, row_length, num_heads, head_size), None


def _repeat(heads: torch.Tensor, repeats: int) -> torch.Tensor:
    """Give each query head its key-value head: dim 1 grows by `repeats`."""
    return heads if repeats == 1 else heads.repeat_interleave(repeats, dim=1)


def _flat(heads: torch.Tensor) -> torch.Tensor:
    """(rows, heads, length, size) to (rows * length, heads, size)."""
    return heads.transpose(1, 2).reshape(-1, heads.shape[1], heads.shape[3])


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    boundaries = segments.boundaries
    assert boundaries is not None
    # The longest segment is bounded by the row, a constant: a changing maximum would recompile a compiled model.
    longest = segments.row_length
    dtype = query.dtype if query.dtype != torch.float32 else torch.get_autocast_dtype(query.device.type)
    window = (-1, 0) if sliding_window is None or sliding_window >= longest else (sliding_window - 1, 0)
    settings: dict[str, Any] = {"scale": scaling, "window_size": window}
    if "window_size" not in VARLEN_SETTINGS:
        if window[0] >= 0:
            raise UserError(
                f"Attention with a window of {sliding_window} positions needs torch 2.11 or later on this GPU; install "
                f"a later one, or use --block_size {sliding_window}."
            )
        settings = {"is_causal": True}
        if scaling is not None:  # it divides by this root in any case
            query = query * (scaling * query.shape[3] ** 0.5)
    if "enable_gqa" in VARLEN_SETTINGS:  # without it, fewer keys than queries need no mention
        settings["enable_gqa"] = query.shape[1] != key.shape[1]
    output = varlen_attn(
        _flat(query).to(dtype),
        _flat(key).to(dtype),
        _flat(value).to(dtype),
        boundaries,
        boundaries,
        longest,
        longest,
        **settings,
    )
    assert isinstance(output, torch.Tensor)
    return output


class _KeptByFlashAttention(torch.autograd.Function):
    """Keeps queries, keys, values, outputs and the softmax's normaliser; the values themselves are meaningless."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.transpose(1, 2).contiguous()
        ctx.save_for_backward(query, key, value, output, output.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


AttentionInterface.register(ATTENTION_NAME, document_attention)


def knows_attention(config: PretrainedConfig) -> bool:
    """Whether models of this configuration run on packed documents; others run one document a row."""
    return str(config.model_type) in SUPPORTED_MODEL_TYPES


def use_document_attention(model: PreTrainedModel) -> None:
    """Switch a model, in place, to attention within documents; one whose attention is not known keeps its own.

    Raises:
        UserError: It is no plain decoder of text.
    """
    if knows_attention(model.config):
        model.set_attn_implementation(ATTENTION_NAME)
        choose_by_document(model)
    else:
        refuse_what_cannot_run(model)


@contextmanager
def transformers_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model attends as transformers' own does: for generation, and wherever no boundaries are given."""
    if knows_attention(model.config):
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        use_document_attention(model)
