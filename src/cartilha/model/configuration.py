"""What a model's configuration tells without its weights: where it is, its length, its shape with fewer layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from cartilha.errors import UserError
from cartilha.model.gguf import converted_gguf
from cartilha.model.parts import text_config
from cartilha.model_reference import (
    MODEL_FILES,
    RANDOM_SHAPES,
    ModelSource,
    adapter_base,
    download,
    download_model,
    resolve_model,
    unreadable,
)
from cartilha.storage import refuse_lfs_pointer
from cartilha.tokens.tokenizer import TextTokenizer

NO_LIMIT = 1 << 20  # positions of models that count distances instead, or carry a state


def model_config(reference: str, tokenizer: TextTokenizer | None = None) -> PretrainedConfig:
    """The configuration of a MODEL's decoder of text; see `whole_config`, and `parts` for models that have others."""
    return text_config(whole_config(reference, tokenizer))


def whole_config(reference: str, tokenizer: TextTokenizer | None = None) -> PretrainedConfig:
    """The configuration of a MODEL, with the tokenizer's rows and ids for `random:`; quantised ones are refused."""
    source = resolve_model(reference)
    if source.kind == "random":
        return _random_config(source.name, tokenizer)
    place = place_of(source, with_weights=False)
    if (base := adapter_base(Path(place))) is not None:
        return whole_config(base, tokenizer)
    refuse_lfs_pointer(Path(place) / "config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise unreadable(reference, place, error) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else vars(quantization)
        raise UserError(
            f"The weights of {reference} are quantised (quant_method {settings.get('quant_method')}), and such weights "
            "are neither trained nor scored here; use the model that they were made from."
        )
    return config


def place_of(source: ModelSource, with_weights: bool = True) -> str:
    """The directory that transformers loads a model from; a hub model is fetched, whole or without its weights."""
    if source.kind == "hub":
        return str(download_model(source) if with_weights else download(source, MODEL_FILES))
    return str(converted_gguf(source) if source.kind == "gguf" else source.path)


def _random_config(name: str, tokenizer: TextTokenizer | None) -> PretrainedConfig:
    config = AutoConfig.for_model(**RANDOM_SHAPES[name])
    if tokenizer is not None:
        config.bos_token_id, config.eos_token_id = tokenizer.prefix_id, tokenizer.end_id
        config.pad_token_id = tokenizer.pad_id
        if not name.startswith("tiny"):
            # OPT keeps seven spare rows above its tokenizer; other vocabularies are rounded up to full tiles of eight.
            rows = -(-tokenizer.num_ids // 8) * 8
            config.vocab_size = max(rows, config.vocab_size) if config.vocab_size - rows < 64 else rows
    return config


def context_length(config: PretrainedConfig) -> int:
    """Most positions that a model of this configuration takes; `NO_LIMIT` where it does not say (BLOOM, Mamba)."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions")
    lengths = (getattr(config, name, None) for name in names)
    return next((length for length in lengths if isinstance(length, int) and length > 0), NO_LIMIT)


def with_layers(settings: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """A configuration's settings with fewer layers; lists with an entry per layer are cut, too.

    A pair of limits (Mamba 2's `time_step_limit`) is no such list, although a model of two layers has as many.
    """
    names = [name for name in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(settings.get(name), int)]
    before = settings[names[0]] if names else None
    cut = {
        name: value[:num_layers]
        if isinstance(value, list) and len(value) == before and not name.endswith("_limit")
        else value
        for name, value in settings.items()
    }
    return {**cut, **dict.fromkeys(names, num_layers)}
