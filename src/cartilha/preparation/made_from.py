"""What a store was made from, and whether the same command has made it before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from cartilha.config import PrepareConfig
from cartilha.corpus.files import SourceFile
from cartilha.corpus.sources import HubSource, PrimerSource, Source
from cartilha.errors import UserError
from cartilha.preparation.request import PrepareRequest
from cartilha.storage import file_sha256
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import TextTokenizer


def describe(asked: PrepareRequest) -> list[dict[str, Any]]:
    """The inputs as store.json records them; files are read to hash them."""
    return list(map(describe_source, asked.sources, _roles(asked)))


def _roles(asked: PrepareRequest) -> list[dict[str, bool]]:
    """What each input is for: `held_out`, `target` or, with no entry, the rest."""
    roles = [{"held_out": True}] * asked.num_held_out + [{"target": True}] * asked.num_targets
    return roles + [{}] * (len(asked.sources) - len(roles))


def describe_source(source: Source, role: dict[str, bool]) -> dict[str, Any]:
    """A source as store.json records it, with what it is for."""
    if isinstance(source, PrimerSource):
        return {"name": source.name, "sha256": source.sha256, **role}
    if isinstance(source, HubSource):
        commit = source.opened and source.opened.commit
        return {"name": source.ref, **({"commit": commit} if commit else {}), **role}
    stamp = {"size": source.size_bytes, "modified_ns": source.modified_ns}
    return {"name": source.name, **stamp, "sha256": file_sha256(Path(source.path)), **role}


def describe_questions(asked: PrepareRequest) -> dict[str, Any]:
    """Whose questions were looked for, as store.json records it."""
    return {
        "inputs": [describe_source(source, {}) for source in asked.questions.sources],
        "tasks": list(asked.questions.tasks),
    }


def ready_store(config: PrepareConfig, asked: PrepareRequest, tokenizer: TextTokenizer) -> TokenStore | None:
    """The store that this same command made before, or None; a UserError if the directory holds something to keep."""
    path = Path(config.output)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a directory for the store with --output.")
    if not path.is_dir() or not any(path.iterdir()):
        return None
    if not (path / "store.json").is_file():
        raise UserError(f"The directory {path} is not empty and is no store; choose another --output.")
    try:
        store = TokenStore(path)
    except UserError:
        if config.overwrite:
            return None
        raise
    different = _differences(store, config, asked, tokenizer)
    if not different:
        return store
    if config.overwrite:
        return None
    raise UserError(
        f"The store {path} was made with another {', '.join(different)}; "
        "choose another --output, or replace it with --overwrite."
    )


def _differences(
    store: TokenStore, config: PrepareConfig, asked: PrepareRequest, tokenizer: TextTokenizer
) -> list[str]:
    """What a store was made with and is now asked to be otherwise, in words."""
    # A store that does not record an option is older than the option, and was made with its default.
    made_with = {**type(config)().deciding_values(), **store.info["settings"]}
    different = [name for name, value in config.deciding_values().items() if made_with[name] != value]
    if store.fingerprint != tokenizer.fingerprint:
        different.insert(0, "tokenizer")
    if not _same(store.info["inputs"], asked.sources, _roles(asked)):
        different.insert(0, "input")
    scored_by = [one["model"] for one in store.info.get("quality", ()) if one["signal"] == "perplexity"]
    if scored_by not in ([], [config.model]) and "tokenizer" not in different:
        different.append("model")
    found_by = store.info.get("decontamination", {}).get("inputs", [])
    if "decontaminate" not in different and not _same(found_by, asked.questions.sources, repeat({})):
        different.append("text of --decontaminate")
    own = asked.language.to_dict()
    if Path(config.language).suffix and store.info.get("language", own) != own:  # a file of the user's has changed
        different.append("language")
    return different


def _same(recorded: list[dict[str, Any]], sources: Sequence[Source], roles: Iterable[dict[str, bool]]) -> bool:
    return len(recorded) == len(sources) and all(map(_is_same, recorded, sources, roles))


def _is_same(record: dict[str, Any], source: Source, role: dict[str, bool]) -> bool:
    if not isinstance(source, SourceFile):
        # A dataset is the one that was asked for, whatever its commit has become since.
        return {key: value for key, value in record.items() if key != "commit"} == describe_source(source, role)
    if record.get("size") != source.size_bytes or {k: record[k] for k in ("held_out", "target") if k in record} != role:
        return False
    # An unchanged time of change is trusted; after a copy or a touch, the bytes decide.
    return record.get("modified_ns") == source.modified_ns or record["sha256"] == file_sha256(Path(source.path))
