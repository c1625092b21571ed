"""Small models of several architectures, with fresh weights that are always the same."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cartilha.model.packed_or_rows import use_document_attention

NUM_IDS = 61
SIZES = {"vocab_size": NUM_IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},  # biases, and projections around the layers
    "gpt2": {"n_head": 4, "n_layer": 2, "n_embd": 32, "n_positions": 64},  # its layers are no nn.Linear
    "gpt_neox": {"intermediate_size": 64},  # head and embeddings apart
    "llama": {"intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"intermediate_size": 64, "num_key_value_heads": 1, "sliding_window": 7},
}


def tiny(name: str, *, packed: bool = True, **settings: Any) -> PreTrainedModel:
    """A model in evaluation mode, with attention within documents if it is `packed`, else with transformers' own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **SPECIAL, **(settings or ARCHITECTURES[name])})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if packed:
        use_document_attention(model)
    return model.eval()
