"""A tiny model of any causal type that transformers knows, in which every part matters.

Fresh weights would hide much: biases are zero, logits are too small for a cap, windows are longer than the text.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
NUM_IDS, CONTEXT, WINDOW = 61, 128, 5
MOST_PARAMETERS = 6_000_000

# What configurations call their sizes; a type takes those that it has. Single keys are selected (`index_topk`) beyond
# the text only: among equal scores torch chooses by the length of the row, in transformers' own batches, too.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "attention_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "linear_num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), NUM_IDS),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "mamba_head_dim", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "hidden_size_per_layer_input", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("num_key_value_heads", "n_mamba_heads", "linear_num_key_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "head_dim": 16, "rotary_dim": 16, "q_lora_rank": 32, "kv_lora_rank": 16, "num_kv_shared_layers": 0,
    "query_pre_attn_scalar": 16, "linear_num_value_heads": 4, "mamba_d_ssm": 128, "conv_kernel": 4,
    "mamba_chunk_size": 16,
    "index_topk": 2 * CONTEXT, "index_topk_blocks": 2, "index_block_size": 4, "index_n_heads": 2, "index_head_dim": 16,
    "expert_ffn_hidden_size": 64, "zero_expert_num": 2, "moe_topk": 2, "moe_k": 2, "moe_num_experts": 4,
}  # fmt: skip
BOTH = ["sliding_attention", "full_attention"]
ROTATED = {"rope_type": "default", "rope_theta": 10_000.0}
OF_BYTES = {"hidden_size": 64, "hidden_size_global": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
            "intermediate_size": 96, "vocab_size": NUM_IDS}  # fmt: skip
OF_IMAGES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}

# What single types need or have besides; None leaves the type's own default.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_config": {**OF_BYTES, "num_hidden_layers": 1}, "decoder_config": OF_BYTES,
            "global_config": OF_BYTES, "patcher_config": OF_BYTES, "encoder_hash_byte_group_vocab": 500},
    "cohere": {"logit_scale": 1.7},
    "cohere_compass_text": {"layer_types": BOTH, "rope_parameters": dict.fromkeys(BOTH, ROTATED)},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "layer_types": BOTH},
    "falcon": {"head_dim": None},
    "gemma2": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"layer_types": BOTH},
    "gemma4_text": {"head_dim": None, "num_attention_heads": None, "num_key_value_heads": None, "hidden_size": 256,
                    "layer_types": BOTH},
    "git": {"vision_config": {"num_hidden_layers": 1, **OF_IMAGES}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "num_layers": 2},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "laguna": {"layer_types": BOTH},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
    "mellum": {"layer_types": BOTH},
    "minicpm3": {"dim_model_base": 10},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "modernbert-decoder": {"layer_types": BOTH},
    "phi4_multimodal": {"vision_config": {"num_hidden_layers": 1, **OF_IMAGES},
                        "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1,
                                         "num_attention_heads": 2, "ext_pw_out_channel": 32,
                                         "nemo_conv_channels": 32}},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": {"use_sliding_window": True},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 8],
                 "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
                 "attention_head_size": 16, "feed_forward_size": 64, "num_buckets": 4},
    "smollm3": {"use_sliding_window": True, "no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},
    "xlnet": {"d_inner": 96, "max_position_embeddings": None},
    "xlstm": {"v_head_dim": None},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": None},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4, "attention_head_dim": 32,
               "attention_hidden_size": None, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str) -> PretrainedConfig:
    """Two layers, with windows, caps and scales small enough to matter."""
    kind = CONFIG_MAPPING[model_type]
    base, settings = kind(), {}
    for name, value in SIZES.items():
        try:
            if hasattr(base, name):
                settings[name] = value
        except Exception:  # an attribute that differs by layer
            continue
    if "qk_rope_head_dim" in settings:  # latent attention: head_dim is the rotated part, and each query has its key
        settings.update(head_dim=settings["qk_rope_head_dim"], num_key_value_heads=4)
    for name, value in SPECIAL.get(model_type, {}).items():
        settings.pop(name, None)
        if value is not None:
            settings[name] = value
    config: PretrainedConfig = kind(**settings)
    return config


def tiny_model(model_type: str, noise: float = 0.1) -> PreTrainedModel:
    """With weights far from their initial values."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model
