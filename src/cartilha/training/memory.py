"""How many blocks a forward pass may hold: activations estimated from the model's shape against the free memory."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from cartilha.model.forward import head_weight
from cartilha.model.loss import CHUNK_TOKENS

ADAM_STATE_BYTES = 12  # gradient and two moments of a parameter, float32; the weights themselves are already there
SAFETY = 0.8  # share of the free memory that is planned with
MAX_MICRO_TOKENS_CPU = 4096  # beyond this a CPU gains nothing and its caches lose
MAX_MICRO_TOKENS_GPU = 32_768


def activation_bytes_per_token(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes that the backward pass keeps for a token, estimated from the layers' widths.

    A layer keeps about its inputs to each matrix, normalised states, attention inputs and the feed-forward's hidden
    states, here counted as 12 hidden sizes and 4 feed-forward sizes, of which half stay float32 under autocast.
    """
    config = model.config
    hidden = int(config.hidden_size)
    inner = next(
        int(getattr(config, name))
        for name in ("intermediate_size", "ffn_dim", "n_inner", "hidden_size")
        if getattr(config, name, None)
    )
    if config.model_type == "gpt2" and getattr(config, "n_inner", None) is None:
        inner = 4 * hidden
    values = int(config.num_hidden_layers) * (12 * hidden + 4 * inner)
    bytes_per_value = 4 if dtype == torch.float32 else 3
    return values * bytes_per_value


def fixed_bytes(model: PreTrainedModel, num_parameters: int, dtype: torch.dtype) -> int:
    """Bytes that training takes whatever the micro-batch: gradients, moments, the cast weights, one chunk of logits."""
    head = head_weight(model)
    num_ids = head.shape[0]
    compute = torch.finfo(dtype).bits // 8
    chunk = CHUNK_TOKENS * num_ids * (8 + compute)
    head_gradient = head.numel() * 4
    cast = 0 if dtype == torch.float32 else num_parameters * compute
    return num_parameters * ADAM_STATE_BYTES + chunk + head_gradient + cast


def plan_micro_batch(
    model: PreTrainedModel,
    *,
    num_parameters: int,
    block_size: int,
    blocks_per_step: int,
    dtype: torch.dtype,
    free_bytes: int,
) -> int:
    """The largest micro-batch (in blocks, at least 1) planned to fit; a divisor of the step where one is near."""
    room = SAFETY * free_bytes - fixed_bytes(model, num_parameters, dtype)
    per_block = activation_bytes_per_token(model, dtype) * block_size
    limit = MAX_MICRO_TOKENS_CPU if model.device.type == "cpu" else MAX_MICRO_TOKENS_GPU
    fitting = max(1, min(int(room // per_block), limit // block_size, blocks_per_step))
    divisors = [size for size in range(1, fitting + 1) if blocks_per_step % size == 0]
    return divisors[-1] if divisors[-1] * 2 > fitting else fitting
