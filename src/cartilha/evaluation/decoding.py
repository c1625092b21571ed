"""How a model chooses the next token: what can be asked for, and a description of it."""

from __future__ import annotations

from cartilha.config import GenerateConfig
from cartilha.errors import UserError


def check_decoding(config: GenerateConfig) -> None:
    """Refuse sampling and beams at once, and numbers out of their range."""
    if config.do_sample and config.num_beams > 1:
        raise UserError("Sampling and beams were both asked for; use --do_sample or --num_beams, not both.")
    if config.max_new_tokens < 1 or config.num_beams < 1:
        raise UserError("max_new_tokens and num_beams must be 1 or more.")
    if config.do_sample and (config.temperature <= 0 or not 0 < config.top_p <= 1 or config.top_k < 1):
        raise UserError("Sampling needs temperature above 0, top_k of 1 or more, and top_p above 0 and at most 1.")


def describe_mode(config: GenerateConfig) -> str:
    """How the next token is chosen, in a few words."""
    if config.do_sample:
        return f"sampled (temperature {config.temperature:g}, top_k {config.top_k}, top_p {config.top_p:g})"
    return f"beam search ({config.num_beams})" if config.num_beams > 1 else "greedy"
