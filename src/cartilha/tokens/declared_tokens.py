"""The tokens that a tokenizer's files add to its vocabulary, in the order in which transformers numbers them.

They are listed in `added_tokens_decoder` (tokenizer_config.json), in added_tokens.json, or only as special tokens. A
token that the vocabulary lacks gets the next free id, whatever id the file gives it: models are trained with the ids of
`AutoTokenizer`, which does the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from cartilha.errors import UserError
from cartilha.storage import refuse_lfs_pointer

END_OF_TEXT = "<|endoftext|>"

# The order in which transformers numbers the special tokens that no vocabulary has.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GPT2 = "GPT2Tokenizer"
CLASS_OF_TYPE = {"gpt2": GPT2, "opt": GPT2}  # by the model's type, if no file names the tokenizer's class


@dataclass(frozen=True)
class DeclaredTokens:
    """What the files beside a vocabulary say about its tokens; those in `added` are in the order of their ids.

    Special tokens have a name (`bos_token` and so on; their text is None if a file says null) or are `unnamed`. The
    `defaults` of the tokenizer's class are for names that no file mentions.
    """

    added: list[AddedToken]
    special: dict[str, str | None]
    unnamed: list[str]
    defaults: dict[str, str]

    def add_to(self, backend: Tokenizer) -> None:
        """Give an id to each declared token that the tokenizer lacks."""
        backend.add_tokens(self.added)
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        special = {**dict.fromkeys(NAMES), **self.defaults, **self.special}
        contents = [content for content in (*special.values(), *self.unnamed) if content and content not in known]
        backend.add_tokens([AddedToken(content, special=True) for content in dict.fromkeys(contents)])


def declared_tokens(directory: Path) -> DeclaredTokens:
    """What the files in a directory declare, as transformers reads them."""
    config = read_tokenizer_json(directory / "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder")
    # If there is one, special_tokens_map.json and added_tokens.json are out of date, and transformers ignores them.
    older = read_tokenizer_json(directory / "special_tokens_map.json") if decoder is None else {}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = {**config, **older, **(extra if isinstance(extra, dict) else {})}
    special = {name: _content(value) for name, value in named.items() if _is_token(name, value)}
    extra = [] if isinstance(extra, dict) else extra
    unnamed = _contents([*extra, *older.get("extra_special_tokens", [])])
    if decoder is None:
        known, ids = {*special.values(), *unnamed}, read_tokenizer_json(directory / "added_tokens.json")
        added = [AddedToken(token, special=token in known) for token in sorted(ids, key=ids.__getitem__)]
        unnamed = unnamed or _contents(older.get("additional_special_tokens", []))
    else:
        added = [_added(decoder[token_id], special) for token_id in sorted(decoder, key=int)]
    unsaid = ("bos_token", "eos_token", "unk_token") if tokenizer_class(directory) == GPT2 else ()
    return DeclaredTokens(added, special, unnamed, dict.fromkeys(unsaid, END_OF_TEXT))


def tokenizer_class(directory: Path) -> str | None:
    """The class of a tokenizer, without `Fast` at its end; None if no file names it."""
    model = read_tokenizer_json(directory / "config.json")
    model_type = model.get("model_type")
    config = read_tokenizer_json(directory / "tokenizer_config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if name is None or str(model_type).startswith("qwen"):  # transformers ignores what Qwen's files say
        return CLASS_OF_TYPE.get(str(model_type), model_type)
    return str(name).removesuffix("Fast")


def _is_token(name: str, value: Any) -> bool:
    """Whether a setting is a special token; under a name that transformers does not know, it must be marked as one."""
    if not name.endswith("_token") or isinstance(value, bool):
        return False
    return not isinstance(value, dict) or name in NAMES or "__type" in value


def _content(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _contents(values: list[Any]) -> list[str]:
    return [content for content in map(_content, values) if content]


def _added(settings: dict[str, Any], special: dict[str, str | None]) -> AddedToken:
    flags = {name: settings[name] for name in ("lstrip", "rstrip", "normalized", "single_word") if name in settings}
    content = settings["content"]
    return AddedToken(content, special=settings.get("special") or content in special.values(), **flags)


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The contents of one of a model's JSON files; empty if it does not exist; a UserError if it is not JSON."""
    if not path.is_file():
        return {}
    refuse_lfs_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch the model's files again.") from error
    return value if isinstance(value, dict) else {}
