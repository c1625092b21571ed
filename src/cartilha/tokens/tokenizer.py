"""A model's tokenizer as this project uses it: text to ids with nothing added, and back.

Text is tokenized without special tokens, and a literal `</s>` in it stays text. Loading needs neither torch nor
transformers, except for the rare tokenizers that only transformers can convert, and then a line says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cartilha.errors import UserError, missing_extra
from cartilha.storage import new_directory, write_json
from cartilha.tokens.byte_level import CHARACTER_BYTES
from cartilha.tokens.sources import TOKENIZER_FILES, ModelSource, conversion_directory, download, resolve_model

log = logging.getLogger("cartilha")

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TextTokenizer:
    """Encodes text as the model reads it.

    Attributes:
        backend: The `tokenizers` object, set so that special tokens in text stay text.
        bos_id: Beginning of text, or None where the tokenizer has none.
        eos_id: End of text, or None where the tokenizer has none.
        pad_id: Padding, or None.
        directory: Where the files came from; None for a tokenizer made here (GGUF, `random:tiny`).
    """

    backend: Tokenizer
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    directory: Path | None = None

    @property
    def prefix_id(self) -> int:
        """The token put before each document as context: bos, else eos."""
        prefix = self.bos_id if self.bos_id is not None else self.eos_id
        assert prefix is not None, "load_tokenizer refuses tokenizers with neither"
        return prefix

    @property
    def end_id(self) -> int:
        """The token that ends each document in training: eos, else bos."""
        end = self.eos_id if self.eos_id is not None else self.bos_id
        assert end is not None, "load_tokenizer refuses tokenizers with neither"
        return end

    @cached_property
    def num_ids(self) -> int:
        """One more than the largest id that a token has; looked up once, for it takes a thirtieth of a second."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without any special token: arrays of uint32, shape (num_tokens,)."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; special tokens are kept."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def decode_batch(self, ids: Sequence[np.ndarray]) -> list[str]:
        """The text of each sequence of ids; special tokens are kept."""
        return list(self.backend.decode_batch([i.tolist() for i in ids], skip_special_tokens=False))

    def fingerprint(self) -> str:
        """The same for tokenizers that give the same ids; see `_fingerprint`, which takes a fifth of a second."""
        known: str | None = self.__dict__.get("_known_fingerprint")
        if known is None:
            known = self.__dict__["_known_fingerprint"] = self._fingerprint()
        return known

    def _fingerprint(self) -> str:
        """SHA-256 of what decides the ids of a text: vocabulary, merges, normaliser, splitter, prefix and end ids.

        The same tokenizer saved in another format (vocab.json and merges.txt, tokenizer.json) has the same fingerprint.
        """
        whole = json.loads(self.backend.to_str())
        model = whole["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
        vocabulary = model["vocab"]
        added = [dict(sorted(token.items())) for token in whole["added_tokens"] if not token["special"]]
        parts = [
            model["type"],
            sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary,
            merges,
            bool(model.get("ignore_merges")),
            added,
            whole["normalizer"],
            _splitting(whole["pre_tokenizer"]),
            [self.prefix_id, self.end_id],
        ]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()

    def save(self, directory: Path) -> None:
        """Write files that `AutoTokenizer.from_pretrained` loads: the exact ones where there are any."""
        directory.mkdir(parents=True, exist_ok=True)
        if self.directory is not None:
            for name in TOKENIZER_FILES:
                if (self.directory / name).is_file():
                    shutil.copyfile(self.directory / name, directory / name)
            config = _read_json(directory / "tokenizer_config.json")
            # Where only config.json names bos and eos, as in the hub's gpt2: that file is the model's and stays behind.
            if not config or not {"bos_token", "eos_token"} & _special_tokens(directory).keys():
                given = {key: value for key, value in config.items() if value is not None}
                write_json(directory / "tokenizer_config.json", {**self._config(), **given})
            return
        self.backend.save(str(directory / "tokenizer.json"))
        write_json(directory / "tokenizer_config.json", self._config())

    def _config(self) -> dict[str, Any]:
        in_two_files = self.directory is not None and not (self.directory / "tokenizer.json").is_file()
        name_of_class = "GPT2Tokenizer" if in_two_files else "PreTrainedTokenizerFast"
        config: dict[str, Any] = {"tokenizer_class": name_of_class, "clean_up_tokenization_spaces": False}
        for name, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            if token_id is not None:
                config[name] = self.backend.id_to_token(token_id)
        return config


def _splitting(pre_tokenizer: Any) -> Any:
    """The parts of a pre-tokenizer's description that decide ids (offsets do not)."""
    if isinstance(pre_tokenizer, dict):
        return {key: _splitting(value) for key, value in sorted(pre_tokenizer.items()) if key != "trim_offsets"}
    if isinstance(pre_tokenizer, list):
        return [_splitting(item) for item in pre_tokenizer]
    return pre_tokenizer


def load_tokenizer(ref: str) -> TextTokenizer:
    """The tokenizer of a MODEL argument.

    Raises:
        UserError: The model has no tokenizer, or one without a token to begin or end a text with.
        HubUnreachableError: A hub model's files cannot be had.
    """
    source = resolve_model(ref)
    tokenizer = _load(source)
    tokenizer.backend.encode_special_tokens = True
    tokenizer.backend.no_padding()
    tokenizer.backend.no_truncation()
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        raise UserError(
            f"The tokenizer of {ref} has neither a bos nor an eos token, so no text can be begun with it; "
            "set one in its tokenizer_config.json."
        )
    return tokenizer


def _load(source: ModelSource) -> TextTokenizer:
    if source.kind == "random":
        if source.name.split("-")[0] != "tiny":
            raise UserError(
                f"{source.ref} has no tokenizer of its own; prepare the store with a real model's tokenizer."
            )
        return byte_tokenizer()
    if source.kind == "gguf":
        assert source.path is not None
        return _cached_gguf_tokenizer(source.path)
    directory = source.path if source.path is not None else download(source.name, (*TOKENIZER_FILES, "config.json"))
    return _from_directory(source.ref, directory)


def _from_directory(ref: str, directory: Path) -> TextTokenizer:
    special = _special_tokens(directory)
    if (directory / "tokenizer.json").is_file():
        try:
            backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # tokenizers raises a bare Exception
            raise UserError(f"The tokenizer.json of {ref} cannot be read ({error}); fetch it again.") from error
    elif _is_gpt2_kind(directory):
        backend = _byte_level_bpe(ref, directory, special)
    else:
        return _through_transformers(ref, directory)

    def id_of(name: str) -> int | None:
        token = special.get(name)
        return None if token is None else backend.token_to_id(token)

    bos_id, eos_id, pad_id = id_of("bos_token"), id_of("eos_token"), id_of("pad_token")
    if bos_id is None and eos_id is None:
        config = _read_json(directory / "config.json")
        bos_id, eos_id = (
            config.get(key) if isinstance(config.get(key), int) else None for key in ("bos_token_id", "eos_token_id")
        )
    return TextTokenizer(backend, bos_id, eos_id, pad_id, directory)


def _is_gpt2_kind(directory: Path) -> bool:
    """Whether vocab.json and merges.txt are there and of no other class (Qwen2's, say, splits text otherwise)."""
    name_of_class = _read_json(directory / "tokenizer_config.json").get("tokenizer_class", "GPT2Tokenizer")
    there = (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file()
    return there and name_of_class in ("GPT2Tokenizer", "GPT2TokenizerFast")


def _byte_level_bpe(ref: str, directory: Path, special: dict[str, str]) -> Tokenizer:
    """The GPT-2 family's byte-level BPE from vocab.json and merges.txt, as OPT's hub repository has it."""
    try:
        bpe = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    except Exception as error:  # tokenizers raises a bare Exception
        raise UserError(f"vocab.json and merges.txt of {ref} cannot be read ({error}); fetch them again.") from error
    backend = Tokenizer(bpe)
    config = _read_json(directory / "tokenizer_config.json")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(special.values())]
    )
    return backend


def _special_tokens(directory: Path) -> dict[str, str]:
    """`bos_token` and so on, from tokenizer_config.json, else special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _read_json(directory / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key in ("bos_token", "eos_token", "pad_token", "unk_token") and isinstance(content, str):
                found[key] = content
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch the model's files again.") from error
    return value if isinstance(value, dict) else {}


def _through_transformers(ref: str, directory: Path) -> TextTokenizer:
    """Tokenizers that only transformers can convert (a bare SentencePiece model, say)."""
    from transformers import AutoTokenizer

    log.warning(
        "The tokenizer of %s has no tokenizer.json: it is converted through transformers, which starts slowly.", ref
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        backend = tokenizer.backend_tokenizer
        # Where a folder holds no vocabulary, transformers makes an empty one, and every text would have no tokens.
        if not backend.get_vocab_size(with_added_tokens=False):
            raise ValueError("an empty vocabulary")
    except Exception as error:
        raise UserError(
            f"{ref} holds no tokenizer that can be read; expected tokenizer.json, or vocab.json and merges.txt."
        ) from error
    return TextTokenizer(
        Tokenizer.from_str(backend.to_str()), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    )


def byte_tokenizer() -> TextTokenizer:
    """The tokenizer of `random:tiny`: ids 0 to 255 are the bytes, then `<s>`, `</s>` and `<pad>`; no merges."""
    backend = Tokenizer(models.BPE(vocab=dict(CHARACTER_BYTES), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<s>", "</s>", "<pad>")])
    return TextTokenizer(backend, bos_id=256, eos_id=257, pad_id=258)


def _cached_gguf_tokenizer(path: Path) -> TextTokenizer:
    """`gguf_tokenizer`, kept as tokenizer.json in the user's cache: parsing the GGUF's metadata takes seconds."""
    directory = conversion_directory(path) / "tokenizer"
    if not (directory / "tokenizer.json").is_file():
        tokenizer = gguf_tokenizer(path)
        try:
            with new_directory(directory) as temporary:
                tokenizer.save(temporary)
        except OSError as error:
            log.warning(
                "The tokenizer of %s could not be kept in the cache (%s); it is read anew each time.", path.name, error
            )
        return tokenizer
    tokenizer = _from_directory(path.name, directory)
    # The cache may be emptied at any time: whoever saves this tokenizer writes it out anew.
    return replace(tokenizer, directory=None)


def gguf_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer inside a GGUF file of the byte-level BPE kind (`tokenizer.ggml.model` = gpt2).

    Chat models name a chat mark as their bos; a text begins with `<|endoftext|>` where the vocabulary has it.

    Raises:
        UserError: The `demo` extra is missing, the file is damaged, or the tokenizer is of another kind.
    """
    fields = read_gguf_fields(path)
    kind, splitter = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or splitter not in _GGUF_SPLITTERS:
        raise UserError(
            f"{path.name} has a tokenizer of the kind {kind}/{splitter}, which is not read from GGUF; "
            "use the model's directory in Hugging Face format instead."
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if _GGUF_SPLITTERS[splitter] else byte_level
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _GGUF_CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    end_of_text = backend.token_to_id(END_OF_TEXT)
    if end_of_text is not None:
        return TextTokenizer(backend, end_of_text, end_of_text, end_of_text)
    ids = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding"))
    bos_id, eos_id, pad_id = (None if i is None else int(i) for i in ids)
    return TextTokenizer(backend, bos_id, eos_id, pad_id)


_GGUF_CONTROL = 3  # llama.cpp's token type of special tokens
_GGUF_SPLITTERS = {"smollm": True, "gpt-2": False}  # whether each digit is split off by itself first


def read_gguf_fields(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, by key.

    Raises:
        UserError: The `demo` extra is missing or the file is not GGUF.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise missing_extra("Reading GGUF models", "demo") from None
    try:
        return {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} is not a GGUF file that can be read ({error}); fetch it again.") from error
