"""Text written by a model from a prompt; a prompt's trailing space is healed instead of breaking the next word."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cartilha.config import GenerateConfig
from cartilha.errors import UserError, counted
from cartilha.evaluation.decoding import check_decoding, describe_mode
from cartilha.evaluation.scorer import unused_ids
from cartilha.machine.devices import seed_everything
from cartilha.model.attention import transformers_attention
from cartilha.model.head import head_weight
from cartilha.model.load import LoadedModel
from cartilha.tokens.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Continuation:
    """A prompt and what the model made of it; `text` includes the prompt."""

    prompt: str
    text: str
    mode: str
    num_new_tokens: int


class _BeginWith(LogitsProcessor):
    """Allows only the given ids as the first new token."""

    def __init__(self, prompt_length: int, allowed: torch.Tensor) -> None:
        self.prompt_length = prompt_length
        self.allowed = allowed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] != self.prompt_length:
            return scores
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.allowed] = scores[:, self.allowed]
        return masked  # type: ignore[return-value]


def continue_prompts(loaded: LoadedModel, tokenizer: TextTokenizer, config: GenerateConfig) -> list[Continuation]:
    """Continue each prompt.

    Args:
        loaded: The model; its attention is switched to transformers' own while it writes, and back.
        tokenizer: The model's.
        config: Prompts and how the next token is chosen.

    Raises:
        UserError: A prompt and its continuation do not fit the model's context, or the choices contradict each other.
    """
    check_decoding(config)
    seed_everything(config.seed)
    with transformers_attention(loaded.model):
        return [_continue(loaded, tokenizer, prompt, config) for prompt in config.prompt]


@torch.inference_mode()
def _continue(loaded: LoadedModel, tokenizer: TextTokenizer, prompt: str, config: GenerateConfig) -> Continuation:
    stripped = prompt.rstrip(" ")
    healed = len(stripped) < len(prompt)
    ids = [tokenizer.prefix_id, *(int(i) for i in tokenizer.encode([stripped])[0])]
    if len(ids) + config.max_new_tokens > loaded.context_length:
        raise UserError(
            f"A prompt of {counted(len(ids), 'token')} and {counted(config.max_new_tokens, 'new one')} do not fit the "
            f"model's context of {loaded.context_length}; shorten the prompt or use a smaller --max_new_tokens."
        )
    device = loaded.model.device
    processors = LogitsProcessorList()
    unused, num_rows = unused_ids(loaded, tokenizer), len(head_weight(loaded.model))
    if healed:
        processors.append(_BeginWith(len(ids), _ids_that_begin_with_space(tokenizer).to(device)))
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=config.do_sample,
        num_beams=config.num_beams,
        repetition_penalty=config.repetition_penalty,
        bos_token_id=tokenizer.prefix_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id if tokenizer.pad_id in range(num_rows) else tokenizer.end_id,
        suppress_tokens=unused or None,
        **(
            {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
            if config.do_sample
            else {}
        ),
    )
    prompt_ids = torch.tensor([ids], device=device)
    output = loaded.model.generate(  # type: ignore[operator]
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), generation_config=settings, logits_processor=processors
    )
    new = output[0, len(ids) :].tolist()
    if new and new[-1] in (tokenizer.end_id, settings.pad_token_id):
        new = new[: next(i for i, token in enumerate(new) if token in (tokenizer.end_id, settings.pad_token_id))]
    # Decoded together: a byte-level token alone may be half a character.
    text = tokenizer.decode(ids[1:] + new)[len(tokenizer.decode(ids[1:])) :]
    if healed:
        text = text.removeprefix(" ")
    return Continuation(prompt, prompt + text, describe_mode(config), len(new))


def _ids_that_begin_with_space(tokenizer: TextTokenizer) -> torch.Tensor:
    """Ids whose text begins with a space (written Ġ by byte-level tokenizers, ▁ by SentencePiece)."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    return torch.tensor(sorted(i for token, i in vocabulary.items() if token.startswith(("Ġ", "▁", " "))))
