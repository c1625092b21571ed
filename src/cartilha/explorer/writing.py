"""Writing with a model: token by token by hand, and greedy, sampled and beam search side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cartilha.config import GenerateConfig
from cartilha.evaluation.continuation import continue_prompts
from cartilha.explorer.choices import Shaping, shaped_probabilities
from cartilha.explorer.reading import Reader
from cartilha.explorer.wording import Refusal

NUM_BEAMS = 4


@dataclass(frozen=True)
class Draft:
    """A text that is being written token by token: the tokens that it began with, and those chosen since."""

    prompt_ids: tuple[int, ...]
    chosen: tuple[int, ...] = ()

    @property
    def ids(self) -> np.ndarray:
        """All tokens so far."""
        return np.array([*self.prompt_ids, *self.chosen], np.int64)

    def with_token(self, token_id: int) -> Draft:
        """The text with one token more."""
        return replace(self, chosen=(*self.chosen, token_id))


def begin(reader: Reader, prompt: str) -> Draft:
    """A draft that begins with a prompt; spaces at its end are left out, as tokens bring the space before them."""
    ids = reader.tokenizer.encode([prompt.rstrip(" ")])[0]
    return Draft(tuple(int(i) for i in ids))


def has_ended(reader: Reader, draft: Draft) -> bool:
    """Whether the end token was chosen."""
    return bool(draft.chosen) and draft.chosen[-1] == reader.tokenizer.end_id


def written(reader: Reader, draft: Draft) -> tuple[str, str]:
    """The prompt and what was written after it, as text; an end token is left out."""
    chosen = draft.chosen[:-1] if has_ended(reader, draft) else draft.chosen
    prompt = reader.tokenizer.decode(draft.prompt_ids)
    # Decoded together: a byte-level token alone may be half a character.
    whole = reader.tokenizer.decode([*draft.prompt_ids, *chosen])
    return (prompt, whole[len(prompt) :]) if whole.startswith(prompt) else ("", whole)


def next_logits(reader: Reader, draft: Draft) -> np.ndarray:
    """Logits of what may come next, shape (num_ids,), or a Refusal: the text fills the model's context."""
    if len(draft.ids) + 1 >= reader.loaded.context_length:
        raise Refusal("full", context=reader.loaded.context_length)
    return reader.logits(draft.ids, len(draft.ids))


def draw(reader: Reader, draft: Draft, shaping: Shaping, generator: np.random.Generator) -> int:
    """A token drawn from the shaped probabilities."""
    probabilities = shaped_probabilities(next_logits(reader, draft), shaping)
    return int(generator.choice(len(probabilities), p=probabilities))


def continuations(reader: Reader, prompt: str, num_tokens: int, shaping: Shaping, seed: int) -> dict[str, str]:
    """What `cartilha generate` writes after the prompt: `greedy`, `sampled` and `beam`.

    A prompt that does not fit the model's context is a Refusal.
    """
    num_prompt = 1 + len(begin(reader, prompt).ids)  # with the prefix
    if num_prompt + num_tokens > reader.loaded.context_length:
        raise Refusal("too_long", num_tokens=num_prompt, num_new=num_tokens, context=reader.loaded.context_length)
    base = GenerateConfig(prompt=(prompt,), max_new_tokens=num_tokens, seed=seed)
    shaped = {**vars(shaping), "top_k": shaping.top_k or reader.vocabulary_size}
    sampled = replace(base, do_sample=True, **shaped)
    ways = {"greedy": base, "sampled": sampled, "beam": replace(base, num_beams=NUM_BEAMS)}
    texts = {}
    for way, settings in ways.items():
        with reader.lock:
            texts[way] = continue_prompts(reader.loaded, reader.tokenizer, settings)[0].text[len(prompt) :]
    return texts
