"""GGUF models, converted once to plain float32 weights, which are kept in the user's cache."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cartilha.errors import UserError, log, missing_extra
from cartilha.model_reference import ModelSource, conversion_directory, unreadable
from cartilha.storage import new_directory
from cartilha.tokens.tokenizer import gguf_tokenizer


def converted_gguf(source: ModelSource) -> Path:
    """The directory with the converted model of a GGUF file, which is made if it is not there."""
    assert source.path is not None
    directory = conversion_directory(source.path) / "model"
    if not (directory / "config.json").is_file():
        log.warning(
            "Converting %s to float32 weights, once; they are kept in the cache (%s).", source.path.name, directory
        )
        model = convert_gguf(source.path)
        try:
            with new_directory(directory, exist_ok=True) as temporary:
                model.save_pretrained(temporary)
        except OSError as error:
            raise UserError(
                f"The float32 weights of {source.ref} cannot be written to {directory} ({error}); "
                "free some space there or name another place in the environment variable CARTILHA_CACHE."
            ) from error
    return directory


def convert_gguf(path: Path) -> PreTrainedModel:
    """The model in a GGUF file as a plain float32 model; needs the extra `demo`.

    `save_pretrained` refuses a model with GGUF's quantisation settings, so the weights are copied into a fresh model of
    the same shape. Special ids become those of our tokenizer: `<|endoftext|>` where a chat model names its own marks.
    """
    tokenizer = gguf_tokenizer(path)
    transformers_logging.disable_progress_bar()
    try:
        quantized = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except (ImportError, ValueError, KeyError, OSError) as error:
        if "accelerate" in str(error):
            raise missing_extra("Reading GGUF models", "demo") from error
        raise unreadable(str(path), path.parent, error) from error
    settings = quantized.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "unk_token_id"):
        settings.pop(name, None)
    config = AutoConfig.for_model(**settings)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    with warnings.catch_warnings(action="ignore"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    return model
