"""A model's tokenizer as this project uses it: text to ids with nothing added, and back.

A literal `</s>` in a text stays text. Only the rare tokenizers that transformers must convert need transformers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cartilha.errors import UserError, import_extra, log, missing_extra
from cartilha.model_reference import (
    ADAPTER_CONFIG,
    TOKENIZER_FILES,
    adapter_base,
    conversion_directory,
    download,
    resolve_model,
)
from cartilha.storage import new_directory, refuse_lfs_pointer, write_atomically, write_json
from cartilha.tokens.byte_level import CHARACTER_BYTES
from cartilha.tokens.declared_tokens import END_OF_TEXT, GPT2, declared_tokens, read_tokenizer_json, tokenizer_class

ENDS = ("bos_token", "eos_token")
GPT2_FILES = ("vocab.json", "merges.txt")
CHAT_TEMPLATE = "chat_template.jinja"
GGUF_CONTROL = 3  # llama.cpp's token type of special tokens
GGUF_SPLITTERS = {"smollm": True, "gpt-2": False}  # by name, whether each digit is split off first


@dataclass(frozen=True)
class TextTokenizer:
    """Encodes text as the model reads it; special tokens in a text stay text.

    A tokenizer made here (GGUF, `random:tiny`) has no directory of original files, but may have a chat template.
    """

    backend: Tokenizer
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    directory: Path | None = None
    chat_template: str | None = None

    @property
    def prefix_id(self) -> int:
        """The token before each document, as context: bos, else eos; `load_tokenizer` makes sure that there is one."""
        return next(i for i in (self.bos_id, self.eos_id) if i is not None)

    @property
    def end_id(self) -> int:
        """The token after each document in training: eos, else bos."""
        return next(i for i in (self.eos_id, self.bos_id) if i is not None)

    @cached_property
    def num_ids(self) -> int:
        """One more than the largest id of a token."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def num_reachable_ids(self) -> int:
        """One more than the largest id that a text, its prefix or its end can have.

        Other special tokens, such as a `[PAD]` that was added and never used, may lie beyond a model's rows.
        """
        added = self.backend.get_added_tokens_decoder()
        vocabulary = self.backend.get_vocab(with_added_tokens=False).values()
        plain = (i for i, token in added.items() if not token.special)
        return 1 + max(*vocabulary, self.prefix_id, self.end_id, *plain)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without special tokens: arrays of uint32, shape (num_tokens,)."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids, special tokens included."""
        return self.decode_batch([np.asarray(ids, np.int64)])[0]

    def decode_batch(self, ids: Sequence[np.ndarray]) -> list[str]:
        """The text of each sequence of ids, special tokens included."""
        if not self._misread:
            return list(self.backend.decode_batch([i.tolist() for i in ids], skip_special_tokens=False))
        return [self._decode_by_pieces(i) for i in ids]

    def decode_each(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each token within a longer text: SentencePiece's decoder drops the space of a first token."""
        texts = self.decode_batch([np.array([i]) for i in ids])
        spellings = [self.backend.id_to_token(int(i)) or "" for i in ids]
        pairs = zip(texts, spellings, strict=True)
        return [f" {text}" if spelling[:1] == "▁" and text[:1] != " " else text for text, spelling in pairs]

    @cached_property
    def _misread(self) -> dict[int, str]:
        """The texts of added tokens such as `ção`, whose letters the byte-level decoder takes for bytes."""
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return {}
        added = {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}
        misread = {i: text for i, text in added.items() if self.backend.decode([i], skip_special_tokens=False) != text}
        # A token that the vocabulary has as well may be a byte of another character.
        return {i: text for i, text in misread.items() if self.backend.model.token_to_id(text) is None}

    def _decode_by_pieces(self, ids: np.ndarray) -> str:
        texts, begin = [], 0
        for place in [*np.flatnonzero(np.isin(ids, list(self._misread))).tolist(), len(ids)]:
            texts.append(self.backend.decode(ids[begin:place].tolist(), skip_special_tokens=False))
            texts.append(self._misread[int(ids[place])] if place < len(ids) else "")
            begin = place + 1
        return "".join(texts)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids of a text; the same for tokenizer.json and for vocab.json with merges.txt."""

        def without_offsets(part: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in sorted(part.items()) if key != "trim_offsets"}

        whole = json.loads(self.backend.to_str())
        splitter = json.loads(json.dumps(whole["pre_tokenizer"]), object_hook=without_offsets)
        model, vocabulary = whole["model"], whole["model"]["vocab"]
        parts = [
            model["type"],
            sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary,
            [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())],
            bool(model.get("ignore_merges")),
            [dict(sorted(token.items())) for token in whole["added_tokens"] if not token["special"]],
            whole["normalizer"],
            splitter,
            [self.prefix_id, self.end_id],
        ]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()

    def save(self, directory: Path) -> None:
        """Write files that `AutoTokenizer.from_pretrained` loads: copies of the original ones if there are any."""
        directory.mkdir(parents=True, exist_ok=True)
        if self.directory is not None:
            for name in TOKENIZER_FILES:
                if (self.directory / name).is_file():
                    shutil.copyfile(self.directory / name, directory / name)
            config = read_tokenizer_json(directory / "tokenizer_config.json")
            # In the hub's gpt2, only config.json names bos and eos: that file is the model's and is not copied.
            if not config or not any(map(declared_tokens(directory).special.get, ENDS)):
                given = {key: value for key, value in config.items() if value is not None}
                write_json(directory / "tokenizer_config.json", {**self._config(), **given})
            return
        self.backend.save(str(directory / "tokenizer.json"))
        write_json(directory / "tokenizer_config.json", self._config())
        if self.chat_template is not None:
            write_atomically(directory / CHAT_TEMPLATE, self.chat_template)

    def _config(self) -> dict[str, Any]:
        in_two_files = self.directory is not None and not (self.directory / "tokenizer.json").is_file()
        name_of_class = GPT2 if in_two_files else "PreTrainedTokenizerFast"
        config: dict[str, Any] = {"tokenizer_class": name_of_class, "clean_up_tokenization_spaces": False}
        for name, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            if token_id is not None:
                config[name] = self.backend.id_to_token(token_id)
        return config


def load_tokenizer(ref: str) -> TextTokenizer:
    """The tokenizer of a MODEL argument; a UserError says that it is missing, or has no token to begin a text with."""
    source = resolve_model(ref)
    if source.kind == "random":
        if source.name.split("-")[0] != "tiny":
            raise UserError(f"{ref} has no tokenizer of its own; name a store, or prepare one with a real model's.")
        tokenizer = byte_tokenizer()
    elif source.kind == "gguf":
        assert source.path is not None
        tokenizer = _cached_gguf_tokenizer(source.path)
    else:
        directory = source.path or download(source, (*TOKENIZER_FILES, "config.json", ADAPTER_CONFIG))
        base = adapter_base(directory)
        if base is not None and not any((directory / name).is_file() for name in TOKENIZER_FILES):
            return load_tokenizer(base)
        tokenizer = _from_directory(ref, directory)
    tokenizer.backend.encode_special_tokens = True
    tokenizer.backend.no_padding()
    tokenizer.backend.no_truncation()
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        raise UserError(
            f"The tokenizer of {ref} has neither a bos nor an eos token, so no text can be begun with it; "
            "set one in its tokenizer_config.json."
        )
    return tokenizer


def _from_directory(ref: str, directory: Path) -> TextTokenizer:
    if (directory / "tokenizer.json").is_file():
        backend = _from_files(ref, directory, "tokenizer.json")
    elif tokenizer_class(directory) in (None, GPT2) and all((directory / name).is_file() for name in GPT2_FILES):
        backend = _from_files(ref, directory, *GPT2_FILES)
        add_prefix_space = bool(read_tokenizer_json(directory / "tokenizer_config.json").get("add_prefix_space"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        backend.decoder = decoders.ByteLevel()
    else:
        return _through_transformers(ref, directory)
    declared = declared_tokens(directory)
    ids: dict[str, int | None] = {name: backend.token_to_id(token) for name, token in declared.defaults.items()}
    declared.add_to(backend)
    for name, token in declared.special.items():
        ids[name] = None if token is None else backend.token_to_id(token)
    if not any(map(declared.special.get, ENDS)):
        config = read_tokenizer_json(directory / "config.json")
        ids |= {name: config[f"{name}_id"] for name in ENDS if isinstance(config.get(f"{name}_id"), int)}
    return TextTokenizer(backend, ids.get("bos_token"), ids.get("eos_token"), ids.get("pad_token"), directory)


def _from_files(ref: str, directory: Path, *names: str) -> Tokenizer:
    """Read tokenizer.json, or GPT-2's two files with vocabulary and merges, as OPT's hub repository has them."""
    paths = [directory / name for name in names]
    for path in paths:
        refuse_lfs_pointer(path)
    try:
        return Tokenizer(models.BPE.from_file(*map(str, paths))) if paths[1:] else Tokenizer.from_file(str(paths[0]))
    except Exception as error:  # tokenizers raises a bare Exception
        which = " and ".join(names)
        raise UserError(f"{which} of {ref} cannot be read ({error}); fetch the model's files again.") from error


def _through_transformers(ref: str, directory: Path) -> TextTokenizer:
    """Load a tokenizer that only transformers can convert, such as a bare SentencePiece model."""
    for name in TOKENIZER_FILES:
        refuse_lfs_pointer(directory / name)
    model = directory / "tokenizer.model"  # SentencePiece's, which begins with a protobuf field, or tiktoken's
    if model.is_file() and find_spec("sentencepiece") is None and model.read_bytes()[:1] == b"\n":
        raise missing_extra(f"The tokenizer of {ref}, a SentencePiece model,", "sentencepiece")
    from transformers import AutoTokenizer

    log.warning("%s has no tokenizer.json: its tokenizer is converted through transformers, which starts slowly.", ref)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        backend = tokenizer.backend_tokenizer
        # If a folder holds no vocabulary, transformers makes an empty one, and no text would have tokens.
        if not backend.get_vocab_size(with_added_tokens=False):
            raise ValueError("an empty vocabulary")
    except Exception as error:
        raise UserError(
            f"{ref} holds no tokenizer that can be read; expected tokenizer.json, or vocab.json and merges.txt."
        ) from error
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return TextTokenizer(Tokenizer.from_str(backend.to_str()), *ids)


def byte_tokenizer() -> TextTokenizer:
    """The tokenizer of `random:tiny`: ids 0 to 255 are the bytes, then `<s>`, `</s>` and `<pad>`; no merges."""
    backend = Tokenizer(models.BPE(vocab=dict(CHARACTER_BYTES), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<s>", "</s>", "<pad>")])
    return TextTokenizer(backend, bos_id=256, eos_id=257, pad_id=258)


def _cached_gguf_tokenizer(path: Path) -> TextTokenizer:
    """`gguf_tokenizer`, kept in the user's cache: parsing the metadata of a GGUF file takes seconds."""
    directory = conversion_directory(path) / "tokenizer"
    if not (directory / "tokenizer.json").is_file():
        tokenizer = gguf_tokenizer(path)
        try:
            with new_directory(directory, exist_ok=True) as temporary:
                tokenizer.save(temporary)
        except OSError as error:
            log.warning(
                "The tokenizer of %s could not be kept in the cache (%s); it is read anew each time.", path.name, error
            )
        return tokenizer
    tokenizer = _from_directory(path.name, directory)
    # The cache may be emptied at any time, so `save` must not copy from it.
    template = directory / CHAT_TEMPLATE
    chat_template = template.read_text(encoding="utf-8") if template.is_file() else None
    return replace(tokenizer, directory=None, chat_template=chat_template)


def gguf_tokenizer(path: Path) -> TextTokenizer:
    """The byte-level BPE tokenizer inside a GGUF file; a UserError if it is of another kind.

    Chat models name a chat mark as their bos; here a text begins with `<|endoftext|>` if the vocabulary has it.
    """
    fields = read_gguf_fields(path)
    kind, splitter = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or splitter not in GGUF_SPLITTERS:
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
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if GGUF_SPLITTERS[splitter] else byte_level
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == GGUF_CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    ids = [backend.token_to_id(END_OF_TEXT)] * 3
    if ids[0] is None:
        ids = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")]
    bos_id, eos_id, pad_id = (None if i is None else int(i) for i in ids)
    return TextTokenizer(backend, bos_id, eos_id, pad_id, chat_template=fields.get("tokenizer.chat_template"))


def read_gguf_fields(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, by key; a UserError if the `demo` extra is missing or the file is not GGUF."""
    gguf = import_extra("gguf", "Reading GGUF models", "demo")
    try:
        return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} is not a GGUF file that can be read ({error}); fetch it again.") from error
