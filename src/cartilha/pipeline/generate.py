"""`generate`: text written by a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cartilha.config import GenerateConfig
from cartilha.evaluation.continuation import Continuation, continue_prompts
from cartilha.languages import DEFAULT, find_language
from cartilha.machine.devices import choose_device
from cartilha.model.load import load_model
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.result import Result
from cartilha.tokens.tokenizer import load_tokenizer


@dataclass(frozen=True)
class GenerateResult(Result):
    """What a model wrote after each prompt."""

    model: str
    continuations: tuple[Continuation, ...]


def generate(config: GenerateConfig) -> GenerateResult:
    """Continue each prompt with the model; a UserError names a prompt that does not fit its context."""
    preflight(config)
    config = config if config.prompt else replace(config, prompt=find_language(DEFAULT).prompts)
    tokenizer = load_tokenizer(config.model)
    dtype: torch.dtype = getattr(torch, config.load_dtype)
    loaded = load_model(config.model, choose_device(config.device), tokenizer=tokenizer, dtype=dtype)
    return GenerateResult(config.model, tuple(continue_prompts(loaded, tokenizer, config)))
