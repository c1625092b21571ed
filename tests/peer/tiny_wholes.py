"""A tiny model of any type that reads more than text, in which every part matters."""

from __future__ import annotations

from typing import Any

import torch
from tiny_types import NUM_IDS, tiny_config
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from cartilha.model.parts import auto_class

MOST_PARAMETERS = 40_000_000
IMAGE_ID = NUM_IDS - 1

# What configurations of the parts beside the text call their sizes.
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "hidden_dim", "d_model", "width", "proj_size", "projection_dim"), 64),
    **dict.fromkeys(("intermediate_size", "out_hidden_size", "encoder_ffn_dim", "encoder_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "layers", "encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("patch_size", "num_mel_bins"), 16),
    "image_size": 32, "vocab_size": NUM_IDS,
}  # fmt: skip
MARKS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_id",
         "boi_token_id", "eoi_token_id")  # fmt: skip
ROTATED = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}  # in three directions

# What single types need besides, in the part for text.
OF_TEXT: dict[str, dict[str, Any]] = {
    **{name: {"rope_parameters": ROTATED} for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")},
    **{
        name: {"rope_parameters": {**ROTATED, "mrope_section": [4, 2, 2]}}
        for name in ("glm46v", "glm4v", "glm_ocr", "glmga")
    },
    "glm4v_moe": {"rope_parameters": {**ROTATED, "mrope_section": [2, 1, 1]}},
}


def _named(base: PretrainedConfig, sizes: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in sizes.items() if hasattr(base, name)}


def _types() -> list[str]:
    """Types of which transformers has a model that reads text and something else."""
    names = {
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    names.discard("shieldgemma2")  # a classifier
    return sorted(name for name in names if "text_config" in CONFIG_MAPPING[name].sub_configs)


WHOLES = tuple(_types())


def whole_config(model_type: str) -> PretrainedConfig:
    """Two layers for text and one for all else."""
    kind = CONFIG_MAPPING[model_type]
    base, parts = kind(), {}
    for name, kind_of_part in kind.sub_configs.items():
        part = getattr(base, name, None)
        if part is None and name == "vision_config":  # Gemma 4 has one only where it is asked for
            part = kind_of_part()
        if part is None:
            continue
        if name == "text_config":
            parts[name] = {**tiny_config(part.model_type).to_dict(), **OF_TEXT.get(model_type, {})}
        else:
            parts[name] = {"model_type": part.model_type, **_named(part, SIZES)}
    config: PretrainedConfig = kind(**parts, **_named(base, dict.fromkeys(MARKS, IMAGE_ID)))
    return config


def tiny_whole(model_type: str, noise: float = 0.1) -> PreTrainedModel:
    """With weights far from their initial values."""
    config = whole_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto_class(config).from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model
