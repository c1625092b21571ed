"""A model's weights in safetensors files, read tensor by tensor, so that no file is ever in memory as a whole.

transformers maps the files: what it has read of them counts as memory of the process beside the weights themselves,
which makes 3.4 bytes per bfloat16 weight where 2 are enough (docs/scale.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards that its index names; empty where there are none."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return [folder / name for name in sorted(set(places.values()))]


def _slices(files: list[Path]) -> dict[str, Any]:
    """The tensors of these files by name, none of them read yet."""
    found: dict[str, Any] = {}
    for path in files:
        file = safe_open(path, framework="pt", backend="pread")
        found |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    return found


def is_stored_in_bfloat16(folder: Path) -> bool:
    """Whether a model's weights are in safetensors files, all of them as bfloat16."""
    return {tensor.get_dtype() for tensor in _slices(weight_files(folder)).values()} == {"BF16"}


def read_model(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> tuple[Any, dict[str, Any]] | None:
    """The model with weights in `dtype`, and transformers' report of missing and unused ones.

    None where its weights are not in safetensors files, or no class for it is known: transformers then loads it itself.
    """
    files = weight_files(folder)
    kinds: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    kind = kinds.get(type(config), None)
    if not files or not hasattr(kind, "from_pretrained"):  # some types have several classes
        return None
    slices = _slices(files)
    model, report = kind.from_pretrained(None, config=config, state_dict=slices, dtype=dtype, output_loading_info=True)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, report
