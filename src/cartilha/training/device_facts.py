"""What known cards hold and compute, and what a token costs: enough to plan before a card is rented."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from cartilha.model.adapters import Adapter
from cartilha.model.attention import FALLBACK, KERNELS, head_size
from cartilha.model.load import look_at
from cartilha.model.products import cpu_product_dtype
from cartilha.model.rows import ROWS
from cartilha.training.trace import Computation

GIB = 2**30


@dataclass(frozen=True)
class DeviceFacts:
    """A device as the plan sees it."""

    name: str  # as `--device` takes it
    memory_bytes: int  # what programs can use of it
    dtype: torch.dtype
    kernel: str  # a name in `attention.KERNELS`, or `ROWS`
    peak_flops: float  # operations per second of dense matrix products in that dtype: the maker's figure, or measured
    share: float  # of the peak that training is expected to reach, counted by 6N + attention
    overhead_bytes: int  # the program and the device's context
    max_tokens: int  # tokens per forward pass beyond which a larger micro-batch brings nothing
    kind: str = "cuda"  # or `mps`, `cpu`
    total_bytes: int | None = None  # of a GPU, where `memory_bytes` is what is free of it
    sheet_flops: float | None = None  # the maker's figure, where `peak_flops` was measured

    @property
    def is_host(self) -> bool:
        """Whether its memory is the host's, which also holds the copy of a checkpoint that is being written."""
        return self.kind != "cuda"

    @property
    def ideal_flops(self) -> float:
        """Operations per second that its use is a share of: the maker's figure if it is known, else the measured."""
        return self.sheet_flops or self.peak_flops

    def computation(
        self, *, checkpointing: bool, dropout: bool = False, adapter: Adapter | None = None, lean: bool = False
    ) -> Computation:
        """How a training step is computed there; with weights in half precision never in float32."""
        how = Computation(self.dtype, self.kernel, self.kind == "cpu", checkpointing, dropout, adapter)
        if self.kind == "cuda":
            how = replace(how, gpu_bytes=self.total_bytes or self.memory_bytes)
        if self.dtype == torch.float32 and (lean or (adapter is not None and adapter.in_half)):
            how = replace(how, dtype=torch.bfloat16)
        return replace(how, weights=torch.bfloat16) if lean else how

    def for_model(self, config: PretrainedConfig, *, dropout: bool = False) -> DeviceFacts:
        """The device as it computes this model: in rows, or under a mask where its own kernel cannot."""
        how = look_at(config, config.model_type).how
        if not how.packed:
            return replace(self, kernel=ROWS)
        is_hindered = KERNELS[self.kernel].hindrance(config, how.needs, training=dropout)
        return replace(self, kernel=FALLBACK) if is_hindered else self


CONTEXT_BYTES = int(0.6 * GIB)  # CUDA's context with its kernels, and the workspaces of the matrix products
# Python, torch, transformers, pyarrow, pandas, resident when step 1 begins: 370 MiB of their own, the rest of files.
PROGRAM_BYTES = int(0.535 * GIB)
# Tokens per forward pass on a CPU. With products in float32, larger ones brought two cores 4 to 8 % for 950 MB; with
# products in bf16, where every micro-batch casts the weights, 10 % (docs/log.md).
FLOAT32_TOKENS_PER_THREAD, HALF_TOKENS_PER_THREAD, MAX_TOKENS_CPU = 256, 1024, 4096
TOKENS_LAPTOP = 8 * FLOAT32_TOKENS_PER_THREAD
MAX_TOKENS_GPU = 131_072  # and no more than fit

# Memory is what nvidia-smi shows as total. The shares are cautious: for an A100 the exercise's own rule (40 %), for an
# H100 what llm.c publishes for this size (468 k tokens/s, 35 % by 6N), for a T4 less, since it has no flash attention.
_KNOWN = (
    DeviceFacts("t4", int(14.75 * GIB), torch.float16, "mask", 65e12, 0.25, CONTEXT_BYTES, MAX_TOKENS_GPU),
    DeviceFacts("l4", int(22.5 * GIB), torch.bfloat16, "varlen", 121e12, 0.35, CONTEXT_BYTES, MAX_TOKENS_GPU),
    DeviceFacts("a100-40gb", int(39.4 * GIB), torch.bfloat16, "varlen", 312e12, 0.40, CONTEXT_BYTES, MAX_TOKENS_GPU),
    DeviceFacts("a100-80gb", int(79.2 * GIB), torch.bfloat16, "varlen", 312e12, 0.40, CONTEXT_BYTES, MAX_TOKENS_GPU),
    DeviceFacts("h100", int(79.1 * GIB), torch.bfloat16, "varlen", 989e12, 0.35, CONTEXT_BYTES, MAX_TOKENS_GPU),
    # A laptop with eight AVX2 cores and 16 GiB, of which a browser takes a part.
    DeviceFacts("cpu", 10 * GIB, torch.float32, "segments", 0.5e12, 0.6, PROGRAM_BYTES, TOKENS_LAPTOP, kind="cpu"),
)
KNOWN_DEVICES = {facts.name: facts for facts in _KNOWN}


def max_tokens_on_this_cpu(dtype: torch.dtype) -> int:
    """Tokens per forward pass beyond which a larger micro-batch brings this CPU little, computing in `dtype`."""
    in_float32 = cpu_product_dtype(dtype) == torch.float32
    per_thread = FLOAT32_TOKENS_PER_THREAD if in_float32 else HALF_TOKENS_PER_THREAD
    return min(MAX_TOKENS_CPU, per_thread * torch.get_num_threads())


def parameter_flops(num_parameters: int, num_frozen: int = 0) -> int:
    """Operations per token that training takes for parameters: 6 for each (2 forward, 4 backward; arXiv:2001.08361).

    The parameters are those that compute a token, without idle experts. Those that are frozen below an adapter take 4,
    since they have no gradient of their own.
    """
    return 6 * num_parameters - 2 * num_frozen


def flops_per_token(config: PretrainedConfig, num_parameters: int, block_size: int, num_frozen: int = 0) -> int:
    """Operations per token of training: those of parameters (`parameter_flops`), and attention's.

    Its scores and weighted sums take 12 L d T (arXiv:2204.02311, appendix B), ignoring causality. Models that have no
    attention (Mamba) take only the former.
    """
    num_heads = getattr(config, "num_attention_heads", None)
    width = int(num_heads) * head_size(config) if num_heads else 0
    attention = 12 * int(config.num_hidden_layers) * width * block_size
    return parameter_flops(num_parameters, num_frozen) + attention


def utilization(facts: DeviceFacts, tokens_per_second: float, flops: int, flops_of_parameters: int) -> dict[str, Any]:
    """The share of a device's peak that training uses (MFU, arXiv:2204.02311), with and without attention's operations.

    Layers that are computed a second time count once.
    """
    return {
        "mfu": tokens_per_second * flops / facts.ideal_flops,
        "mfu_without_attention": tokens_per_second * flops_of_parameters / facts.ideal_flops,
        "peak_flops": facts.ideal_flops,
        "peak": "data sheet" if facts.sheet_flops else "measured",
    }
