"""Text written by a model from a prompt; a prompt's trailing space is healed instead of breaking the next word."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from cartilha.config import GenerateConfig
from cartilha.errors import UserError, counted, first_line, log
from cartilha.evaluation.decoding import check_decoding, describe_mode
from cartilha.evaluation.scorer import unused_ids
from cartilha.machine.devices import seed_everything
from cartilha.machine.memory import is_out_of_memory
from cartilha.model.head import head_of
from cartilha.model.load import LoadedModel
from cartilha.model.packed_or_rows import transformers_attention
from cartilha.model.sharding import in_dtype_of_layers
from cartilha.tokens.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Continuation:
    """A prompt and what the model made of it; `text` includes the prompt."""

    prompt: str
    text: str
    mode: str
    num_new_tokens: int


def continue_prompts(loaded: LoadedModel, tokenizer: TextTokenizer, config: GenerateConfig) -> list[Continuation]:
    """Continue each prompt; the model's attention is switched to transformers' own while it writes, and back.

    A UserError refuses what does not fit the model's context, and choices that contradict each other.
    """
    check_decoding(config)
    seed_everything(config.seed)
    with transformers_attention(loaded.model), in_dtype_of_layers(loaded.model):
        return [_continue(loaded, tokenizer, prompt, config) for prompt in config.prompt]


@torch.no_grad()  # in inference mode a sharded model would keep weights that cannot be trained
def _continue(loaded: LoadedModel, tokenizer: TextTokenizer, prompt: str, config: GenerateConfig) -> Continuation:
    stripped = prompt.rstrip(" ")
    healed = len(stripped) < len(prompt)
    ids = [tokenizer.prefix_id, *(int(i) for i in tokenizer.encode([stripped])[0])]
    if len(ids) + config.max_new_tokens > loaded.context_length:
        raise UserError(
            f"A prompt of {counted(len(ids), 'token')} and {counted(config.max_new_tokens, 'new one')} do not fit the "
            f"model's context of {loaded.context_length}; shorten the prompt or use a smaller --max_new_tokens."
        )
    num_rows = len(head_of(loaded.model).weight)
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=config.do_sample,
        num_beams=config.num_beams,
        repetition_penalty=config.repetition_penalty,
        bos_token_id=tokenizer.prefix_id,
        eos_token_id=tokenizer.end_id,
        pad_token_id=tokenizer.pad_id if tokenizer.pad_id in range(num_rows) else tokenizer.end_id,
        suppress_tokens=unused_ids(loaded, tokenizer) or None,
        begin_suppress_tokens=_ids_without_space(tokenizer, num_rows) if healed else None,
        **(sampling if config.do_sample else {}),
    )
    prompt_ids = torch.tensor([ids], device=loaded.model.device)
    output = _generated(loaded.model, prompt_ids, settings)
    ends = (tokenizer.end_id, settings.pad_token_id)
    new = output[0, len(ids) :].tolist()
    if new and new[-1] in ends:
        new = list(takewhile(lambda token: token not in ends, new))
    # Decoded together: a byte-level token alone may be half a character.
    text = tokenizer.decode(ids[1:] + new)[len(tokenizer.decode(ids[1:])) :]
    if healed:
        text = text.removeprefix(" ")
    return Continuation(prompt, prompt + text, describe_mode(config), len(new))


def _generated(model: PreTrainedModel, prompt_ids: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    """The prompt and the new ids: without transformers' cache where that cannot be used with this model."""
    generate: Any = model.generate  # torch types attributes as modules and tensors
    write = functools.partial(generate, prompt_ids, attention_mask=torch.ones_like(prompt_ids))
    try:
        if not getattr(model, "without_cache", False):
            ids: torch.Tensor = write(generation_config=settings)
            return ids
    except Exception as error:  # caches of some models serve other lengths or layers only (LFM 3 in transformers 5.23)
        if is_out_of_memory(error):
            raise
        name = model.config.model_type
        log.warning("Models of the type %s write without a cache, which is slower (%s).", name, first_line(error))
        model.without_cache = True  # type: ignore[assignment]
    settings.use_cache = False
    return cast(torch.Tensor, write(generation_config=settings))


def _ids_without_space(tokenizer: TextTokenizer, num_rows: int) -> list[int]:
    """Rows whose text does not begin with a space (written Ġ by byte-level tokenizers, ▁ by SentencePiece)."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=False)
    begin = {i for token, i in vocabulary.items() if token.startswith(("Ġ", "▁", " "))}
    return [i for i in range(num_rows) if i not in begin]
