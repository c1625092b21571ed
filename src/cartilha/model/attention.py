"""Attention in which no document sees another: one function, registered once, for every supported architecture.

transformers hands a registered attention function no mask, so this one honours causality, the scale and a sliding
window itself. The boundaries of the documents travel explicitly with each call, as a `Kernel`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig

from cartilha.errors import UserError
from cartilha.machine.devices import to_device
from cartilha.model.flash_attention_3 import flash_attention_3
from cartilha.model.segment_attention import HAS_KERNELS, Scoring, causal_mask, segment_attention, weighed

ATTENTION_NAME = "cartilha_documents"

CAPPED, SINKS = "a soft cap on the scores", "attention sinks"  # what some models need besides a scale and a window

ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop")  # as configurations name it


@dataclass(frozen=True)
class Kernel(ABC):
    """A way to compute attention; an instance holds the boundaries of one batch's documents.

    With `one_graph`, torch.compile needs one graph for all batches: boundaries are tensors of one shape, since every
    Python value that changes needs another graph.
    """

    name: ClassVar[str]  # in records and in plan.json
    takes_dropout: ClassVar[bool] = False  # can drop attention weights
    one_graph: ClassVar[bool] = True
    computes: ClassVar[frozenset[str]] = frozenset()  # of `CAPPED` and `SINKS`
    counts_tokens_only: ClassVar[bool] = True  # its memory depends on the number of tokens, not on that of the rows

    row_length: int  # positions per row; no segment crosses a row's end

    @classmethod
    @abstractmethod
    def of(cls, lengths: Sequence[int], row_length: int, device: torch.device, capacity: int = 0) -> Self:
        """The boundaries of segments of these lengths (in row-major order; they sum to num_rows * row_length).

        Boundaries have room for `capacity` segments at least, so that batches with fewer have the same shape.
        """

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Causal attention within each segment.

        Queries have the shape (num_rows, num_heads, row_length, head_size), keys and values fewer heads, perhaps. The
        result is reshaped to (num_rows, row_length, num_heads, head_size).
        """

    @classmethod
    def is_for(cls, device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> bool:
        """Whether it is the kernel of choice on this device (with this CUDA capability) in this compute dtype."""
        return False

    @classmethod
    def hindrance(cls, config: PretrainedConfig, needs: frozenset[str], *, training: bool) -> str | None:
        """Why a model that asks for `needs` goes under `FALLBACK`; None where it need not."""
        missing = sorted(needs - cls.computes)
        return f"it does not compute {' and '.join(missing)}" if missing else cls.obstacle(config, training=training)

    @classmethod
    def obstacle(cls, config: PretrainedConfig, *, training: bool) -> str | None:
        """Why it cannot compute a model of this configuration; None where it can."""
        if training and not cls.takes_dropout and any(getattr(config, name, 0.0) for name in ATTENTION_DROPOUT):
            return "it knows no dropout of attention weights, which this model is trained with"
        return None

    @classmethod
    def traced(cls, num_rows: int, row_length: int) -> Kernel:
        """For tensors without contents, one document per row: a kernel that keeps as much for the backward pass."""
        return cls.of((row_length,) * num_rows, row_length, torch.device("cpu"))


KERNELS: dict[str, type[Kernel]] = {}
FALLBACK = "mask"  # the name of the one that computes everything


def register(kernel: type[Kernel]) -> type[Kernel]:
    """Add a kernel to `KERNELS`; of several for the same hardware the one that was registered last is chosen."""
    KERNELS[kernel.name] = kernel
    return kernel


def choose_kernel(device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> str:
    """The name of the kernel for this hardware and compute dtype."""
    return next(name for name in reversed(KERNELS) if KERNELS[name].is_for(device_type, capability, dtype))


@register
@dataclass(frozen=True)
class _Mask(Kernel):
    """One call under a block mask, which computes every model on every device (T4 and MPS have nothing faster)."""

    name = FALLBACK
    takes_dropout = True
    counts_tokens_only = False
    computes = frozenset({CAPPED, SINKS})

    mask: Tensor  # True where a query may look, shape (num_rows, 1, row_length, row_length)
    added: Tensor  # the same, as what torch's kernels add to scores; made once, not in each layer anew

    @classmethod
    def of(cls, lengths: Sequence[int], row_length: int, device: torch.device, capacity: int = 0) -> Self:
        numbers = np.repeat(np.arange(len(lengths)), lengths)
        segment = to_device(numbers, device).view(-1, 1, row_length, 1)
        return cls._of_mask((segment == segment.transpose(2, 3)) & causal_mask(row_length, None, device))

    @classmethod
    def _of_mask(cls, mask: Tensor) -> Self:
        kind = mask.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        return cls(mask.shape[3], mask, torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf))

    @classmethod
    def is_for(cls, device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> bool:
        return True

    @classmethod
    def traced(cls, num_rows: int, row_length: int) -> Kernel:
        return cls._of_mask(torch.ones(num_rows, 1, row_length, row_length, dtype=torch.bool))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        mask, kind = self.mask, query.device.type
        windowed = scoring.sliding_window is not None and scoring.sliding_window < self.row_length
        if windowed:
            mask = mask & causal_mask(self.row_length, scoring.sliding_window, mask.device)
        if not scoring.is_plain:
            return weighed(query, key, value, mask, scoring)
        if not windowed:  # autocast gives all the same dtype
            mask = self.added if torch.is_autocast_enabled(kind) else self.added.to(query.dtype)
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:  # each query head is given its key-value head
            key, value = (heads.repeat_interleave(repeats, dim=1) for heads in (key, value))
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=scoring.dropout, scale=scoring.scaling
        )
        return attended.transpose(1, 2)


@register
@dataclass(frozen=True)
class _BySegment(Kernel):
    """One causal call per segment, on CPUs: neither other documents nor the future cost anything."""

    name = "segments"
    one_graph = False
    computes = frozenset({CAPPED, SINKS})

    lengths: tuple[int, ...]  # of the segments, in row-major order

    @classmethod
    def of(cls, lengths: Sequence[int], row_length: int, device: torch.device, capacity: int = 0) -> Self:
        return cls(row_length, tuple(lengths))

    @classmethod
    def is_for(cls, device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> bool:
        return device_type == "cpu"

    @classmethod
    def obstacle(cls, config: PretrainedConfig, *, training: bool) -> str | None:
        missing = None if HAS_KERNELS else "this version of torch does not have it"
        return super().obstacle(config, training=training) or missing

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        return segment_attention(query, key, value, self.lengths, scoring)


# What torch's variable-length attention can be told: 2.10 has neither scale nor window, 2.11 no `enable_gqa`.
VARLEN_SETTINGS = frozenset(inspect.signature(varlen_attn).parameters)


@register
@dataclass(frozen=True)
class _Varlen(Kernel):
    """torch's variable-length flash attention, on CUDA of capability 8 and above in half precision."""

    name = "varlen"

    # Cumulative lengths from 0, int32, shape (capacity + 1,); the total is repeated at the end: segments of no length.
    boundaries: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], row_length: int, device: torch.device, capacity: int = 0) -> Self:
        cumulative = np.zeros(max(capacity, len(lengths)) + 1, np.int32)
        cumulative[1 : len(lengths) + 1] = np.cumsum(lengths)
        cumulative[len(lengths) + 1 :] = cumulative[len(lengths)]
        boundaries = to_device(cumulative, device)
        torch._dynamo.mark_dynamic(boundaries, 0)  # one graph for all numbers of segments
        return cls(row_length, boundaries)

    @classmethod
    def is_for(cls, device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> bool:
        return device_type == "cuda" and capability is not None and capability >= (8, 0) and dtype != torch.float32

    @classmethod
    def obstacle(cls, config: PretrainedConfig, *, training: bool) -> str | None:
        size = head_size(config)
        if size % 8 or size > 256:
            return f"flash attention takes heads of 8, 16, ... 256 numbers, and this model's have {size}"
        return super().obstacle(config, training=training)

    @classmethod
    def traced(cls, num_rows: int, row_length: int) -> Kernel:
        return _TracedVarlen.of((row_length,) * num_rows, row_length, torch.device("cpu"))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        sliding_window = scoring.sliding_window
        longest = self.row_length  # a constant bound: a changing maximum would recompile a compiled model
        dtype = query.dtype if query.dtype != torch.float32 else torch.get_autocast_dtype(query.device.type)
        window = (-1, 0) if sliding_window is None or sliding_window >= longest else (sliding_window - 1, 0)
        settings: dict[str, Any] = {"scale": scoring.scaling, "window_size": window}
        if "window_size" not in VARLEN_SETTINGS:
            if window[0] >= 0:
                raise UserError(
                    f"Attention with a window of {sliding_window} positions needs torch 2.11 or later on this GPU; "
                    f"install a later one, or use --block_size {sliding_window}."
                )
            settings = {"is_causal": True}
            if scoring.scaling is not None:  # it divides by this root in any case
                query = query * (scoring.scaling * query.shape[3] ** 0.5)
        if "enable_gqa" in VARLEN_SETTINGS:  # without it, fewer keys than queries need no mention
            settings["enable_gqa"] = query.shape[1] != key.shape[1]
        # (num_rows, num_heads, row_length, head_size) to (num_rows * row_length, num_heads, head_size)
        query, key, value = (heads.transpose(1, 2).flatten(0, 1).to(dtype) for heads in (query, key, value))
        output = varlen_attn(query, key, value, self.boundaries, self.boundaries, longest, longest, **settings)
        assert isinstance(output, Tensor)
        return output


@register
@dataclass(frozen=True)
class _FlashAttention3(_Varlen):
    """The same by FlashAttention-3, on CUDA of capability 9 where it is installed."""

    name = "flash attention 3"

    @classmethod
    def is_for(cls, device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> bool:
        is_hopper = capability is not None and capability[0] == 9
        return super().is_for(device_type, capability, dtype) and is_hopper and flash_attention_3(device_type)


class _TracedVarlen(_BySegment):
    """Computes nothing, and keeps what flash attention keeps for its backward pass."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        output: Tensor = _KeptByFlashAttention.apply(query, key, value)
        return output


class _KeptByFlashAttention(torch.autograd.Function):
    """Keeps queries, keys, values, outputs and the softmax's normaliser; the values themselves are meaningless."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.transpose(1, 2).contiguous()
        ctx.save_for_backward(query, key, value, output, output.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def head_size(config: PretrainedConfig) -> int:
    """Numbers per attention head; of the largest where layers differ (Gemma 4)."""
    default = config.hidden_size // config.num_attention_heads
    layers = getattr(config, "per_layer_config", None) or [config]
    joined = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    return max(joined, *(int(getattr(layer, "head_dim", None) or default) for layer in layers))


def document_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **layer: Any
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it, with the arguments and results of `Kernel.attend`.

    `layer` has the batch's `segments` (a `Kernel`), the layer's `scaling`, `sliding_window`, `dropout`, `softcap` and
    sinks (`s_aux`), and settings that transformers passes to every attention function and this one has no use for.
    """
    assert attention_mask is None, "transformers built a mask although our attention is registered without one"
    segments: Kernel = layer["segments"]
    assert query.shape[2] == segments.row_length
    scaling, widths = layer.get("scaling"), (query.shape[3], value.shape[3])
    if widths[0] != widths[1]:  # kernels take values of the keys' size (latent attention: arXiv:2405.04434)
        scaling = widths[0] ** -0.5 if scaling is None else scaling
        query, key, value = (F.pad(heads, (0, max(widths) - heads.shape[3])) for heads in (query, key, value))
    if scaling is not None:
        scaling *= getattr(module, "factor_of_kernel", 1.0)  # see query_factor.py
    scoring = Scoring(
        *(scaling, layer.get("sliding_window"), layer.get("dropout", 0.0)),
        *(layer.get("softcap"), layer.get("s_aux")),
    )
    attended = segments.attend(query, key, value, scoring).reshape(query.transpose(1, 2).shape)
    return attended if widths[0] == widths[1] else attended[..., : widths[1]], None


AttentionInterface.register(ATTENTION_NAME, document_attention)
