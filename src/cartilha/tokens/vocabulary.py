"""A byte-level BPE tokenizer extended by merges learnt on a corpus; it keeps every id, token and merge.

The old merges rank before the new ones: encoding first does what the old tokenizer does, then applies the new merges.
No text costs more tokens than before, in any language, and every text that survived decode(encode(text)) still does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cartilha.errors import UserError
from cartilha.storage import write_json
from cartilha.tokens.merges import Merge, MergeLearner
from cartilha.tokens.tokenizer import TextTokenizer

OUTDATED_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model")  # tokenizer.json replaces them


@dataclass(frozen=True)
class Extension:
    """A tokenizer with new tokens, whose ids follow each other from `first_id` on.

    `pieces` has for each new token the ids of the old ones that it replaces, at least two. The numbers of tokens are
    those of the text that it was learnt on.
    """

    tokenizer: TextTokenizer
    first_id: int
    pieces: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_tokens_before: int


@dataclass(frozen=True)
class LearntMerges:
    """Merges learnt for a tokenizer on a text, which takes `num_tokens_before` tokens without them."""

    tokenizer: TextTokenizer
    merges: Sequence[Merge]
    num_tokens_before: int

    @property
    def num_new(self) -> int:
        """New tokens that they make; a merge may make one that exists already."""
        return sum(merge.is_new for merge in self.merges)


def check_extendable(tokenizer: TextTokenizer, name: str) -> None:
    """Refuse a tokenizer that is not byte-level BPE by a `UserError`."""
    description = _described(tokenizer.backend)
    model = description["model"]
    if model["type"] != "BPE":
        kind = model["type"]
    elif model.get("byte_fallback"):
        kind = "BPE with byte fallback, as SentencePiece makes it"
    elif not _has_byte_level(description["pre_tokenizer"]) or not _has_byte_level(description["decoder"]):
        kind = "BPE over characters, not bytes"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        kind = "BPE with marks inside or at the end of words"
    else:
        return
    raise UserError(
        f"The tokenizer of {name} is of the kind {kind}, whose vocabulary cannot be extended here; "
        "choose a model with byte-level BPE (OPT, GPT-2, Llama 3, SmolLM, Qwen)."
    )


def count_words(tokenizer: TextTokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, as the tokenizer's own splitter cuts and spells it."""
    backend, counts = tokenizer.backend, Counter[str]()
    for text in texts:
        normalized = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized))
    return counts


def num_tokens(tokenizer: TextTokenizer, word_counts: Counter[str]) -> int:
    """Tokens of a text whose words `count_words` has counted."""
    model = tokenizer.backend.model
    return sum(count * len(model.tokenize(word)) for word, count in word_counts.items())


def learn_merges(tokenizer: TextTokenizer, word_counts: Counter[str], num_new: int) -> LearntMerges:
    """Merges that make `num_new` new tokens, or fewer if no pair is left that occurs twice."""
    model = tokenizer.backend.model
    learner = MergeLearner(
        word_counts,
        lambda word: [token.id for token in model.tokenize(word)],
        tokenizer.backend.get_vocab(with_added_tokens=True),
        tokenizer.num_ids,
        whole_words=bool(_described(tokenizer.backend)["model"].get("ignore_merges")),
    )
    before = learner.num_tokens
    return LearntMerges(tokenizer, _first_new_tokens(learner, num_new), before)


def extend(learnt: LearntMerges, num_new: int | None = None) -> Extension:
    """The tokenizer with the merges appended that make the first `num_new` tokens; with all of them by default."""
    tokenizer = learnt.tokenizer
    merges = learnt.merges if num_new is None else _first_new_tokens(learnt.merges, num_new)
    description = _described(tokenizer.backend)
    vocabulary = description["model"]["vocab"]
    # Outside of the model's vocabulary, tokenizers would renumber the added tokens from the vocabulary's size on.
    for token in description["added_tokens"]:
        vocabulary.setdefault(token["content"], token["id"])
    names = {i: token for token, i in vocabulary.items()}
    pieces: dict[int, tuple[int, ...]] = {}
    as_text = any(isinstance(merge, str) for merge in description["model"]["merges"])
    for merge in merges:
        left, right = names[merge.left], names[merge.right]
        description["model"]["merges"].append(f"{left} {right}" if as_text else [left, right])
        if merge.is_new:
            names[merge.result] = left + right
            vocabulary[left + right] = merge.result
            pieces[merge.result] = (*pieces.get(merge.left, (merge.left,)), *pieces.get(merge.right, (merge.right,)))
    backend = Tokenizer.from_str(json.dumps(description))
    backend.encode_special_tokens = True
    extended, before = replace(tokenizer, backend=backend, directory=None), learnt.num_tokens_before
    after = merges[-1].num_tokens if merges else before
    return Extension(extended, tokenizer.num_ids, tuple(pieces.values()), after, before)


def _first_new_tokens(merges: Iterable[Merge], num_new: int) -> list[Merge]:
    """The merges up to the one that makes the last of `num_new` new tokens; all of them if they make fewer."""
    chosen: list[Merge] = []
    left = num_new
    for merge in merges if num_new else ():
        chosen.append(merge)
        left -= merge.is_new
        if not left:
            break
    return chosen


def save_extended(base: TextTokenizer, extended: TextTokenizer, directory: Path) -> None:
    """Write the extended tokenizer for `AutoTokenizer`, with the settings in the files of the base."""
    base.save(directory)
    for name in OUTDATED_FILES:
        (directory / name).unlink(missing_ok=True)
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    # Other classes build a splitter of their own and ignore the one in tokenizer.json.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    description = _described(extended.backend)
    if description["post_processor"] is None and config.get("add_bos_token") and base.bos_id is not None:
        description["post_processor"] = _begins_with(base.bos_id, str(base.backend.id_to_token(base.bos_id)))
    write_json(directory / "tokenizer.json", description)
    write_json(directory / "tokenizer_config.json", config)


def _begins_with(token_id: int, token: str) -> dict[str, Any]:
    """The post-processor of tokenizer.json that does what `add_bos_token` does for vocab.json and merges.txt."""
    first = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": special}


def _described(backend: Tokenizer) -> dict[str, Any]:
    return dict(json.loads(backend.to_str()))


def _has_byte_level(part: Any) -> bool:
    """Whether the description of a pre-tokenizer or decoder has a ByteLevel step."""
    return '"type": "ByteLevel"' in json.dumps(part)
