"""`prepare`: text to a token store. Read, drop exact duplicates, hold out by hash, tokenize, write by rename."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cartilha.config import PrepareConfig
from cartilha.console import progress
from cartilha.corpus.document import Document
from cartilha.corpus.readers import ReadCounts, read_documents, resolve_inputs
from cartilha.corpus.sources import PrimerSource, Source, SourceFile
from cartilha.corpus.splits import SPLITS, Split, choose_split, nearest_fraction
from cartilha.errors import UserError
from cartilha.runtime import versions
from cartilha.storage import file_sha256
from cartilha.tokens.store import SplitCounts, TokenStore, batches, writing_store
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer

log = logging.getLogger("cartilha")

SETTINGS = ("validation_fraction", "seed", "limit_documents", "text_column", "encoding", "invalid_bytes")


@dataclass(frozen=True)
class PrepareResult:
    """A store that is ready.

    Attributes:
        store: Its directory.
        splits: What each side holds.
        dropped: Documents left out, by reason.
        was_ready: Whether the same command had made it before.
    """

    store: str
    splits: dict[Split, SplitCounts]
    dropped: dict[str, int]
    was_ready: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)


def prepare(config: PrepareConfig) -> PrepareResult:
    """Make a token store of the input, or find the one that the same command made.

    Raises:
        UserError: No input, a file that cannot be read, nothing to split, or a directory that holds something else.
    """
    if not config.input:
        raise UserError("There is no input; name files, a dataset or the primer with --input.")
    if not config.output:
        raise UserError("There is no place for the store; name a directory with --output.")
    if not 0 < config.validation_fraction < 1:
        raise UserError(f"The validation fraction must lie between 0 and 1, not {config.validation_fraction}.")
    path = Path(config.output)
    sources = resolve_inputs(config.input)
    tokenizer = load_tokenizer(config.model)
    settings = {name: getattr(config, name) for name in SETTINGS}
    if _is_ready(path, sources, settings, tokenizer, config.overwrite):
        store = TokenStore(path)
        log.info("The store %s was made by this same command before: nothing to do.", path)
        return PrepareResult(str(path), store.counts, store.info["dropped"], True)
    splits, dropped = _write(path, sources, settings, tokenizer, config)
    for split in SPLITS:
        counts = splits[split]
        log.info(
            "%s: %s documents, %s tokens, %s words (%.2f tokens a word, %.2f bytes a token)",
            split,
            f"{counts.num_documents:,}",
            f"{counts.num_tokens:,}",
            f"{counts.num_words:,}",
            counts.num_tokens / max(1, counts.num_words),
            counts.num_bytes / max(1, counts.num_tokens),
        )
    return PrepareResult(str(path), splits, dropped, False)


def _write(
    path: Path, sources: list[Source], settings: dict[str, Any], tokenizer: TextTokenizer, config: PrepareConfig
) -> tuple[dict[Split, SplitCounts], dict[str, int]]:
    """One pass over the documents; where a side stays empty (tiny corpora), a second one with another fraction."""

    def attempt(fraction: float) -> tuple[dict[Split, SplitCounts], dict[str, int]]:
        read = ReadCounts()
        documents = read_documents(
            sources,
            text_column=config.text_column,
            encoding=config.encoding,
            invalid_bytes=config.invalid_bytes,
            limit_documents=config.limit_documents,
            counts=read,
        )
        seen: set[str] = set()
        num_duplicates = 0
        with (
            writing_store(path, tokenizer, replace=config.overwrite) as writer,
            progress("Preparing", _total_bytes(sources), "bytes") as advance,
        ):
            for batch in batches(documents):
                fresh = list(_without_duplicates(batch, seen))
                num_duplicates += len(batch) - len(fresh)
                for split in SPLITS:
                    chosen = [(d, h) for d, h in fresh if choose_split(h, fraction, config.seed) == split]
                    writer.add(split, [document for document, _ in chosen], [text_hash for _, text_hash in chosen])
                advance(sum(len(document.text) for document in batch))
            if not seen:
                raise UserError(
                    f"The input holds no text ({', '.join(config.input)}); check the files and --text_column."
                )
            if len(seen) == 1:
                raise UserError(
                    "The corpus is a single document, which cannot be split into training and validation; add more."
                )
            counts = writer.counts()
            if any(counts[split].num_documents == 0 for split in SPLITS):
                raise _EmptySideError(nearest_fraction(seen, config.validation_fraction, config.seed))
            dropped = {
                "exact_duplicates": num_duplicates,
                "empty": read.empty,
            }
            if read.replaced_bytes_documents:
                log.warning("Invalid bytes were replaced by U+FFFD in %d documents.", read.replaced_bytes_documents)
            writer.finish(
                {
                    "inputs": [_describe(source) for source in sources],
                    "settings": settings,
                    "dropped": dropped,
                    "num_documents_read": read.documents + read.empty,
                    "num_documents_with_replaced_bytes": read.replaced_bytes_documents,
                    "fraction_used": fraction,
                    "versions": versions(),
                }
            )
        if num_duplicates:
            log.info("%d exact duplicates were left out.", num_duplicates)
        return counts, dropped

    return _with_both_sides(attempt, config.validation_fraction)


class _EmptySideError(Exception):
    """A fraction left one side of the split without documents; carries one that does not."""

    def __init__(self, fraction: float) -> None:
        super().__init__(fraction)
        self.fraction = fraction


def _with_both_sides(
    attempt: Callable[[float], tuple[dict[Split, SplitCounts], dict[str, int]]], fraction: float
) -> tuple[dict[Split, SplitCounts], dict[str, int]]:
    try:
        return attempt(fraction)
    except _EmptySideError as empty:
        log.warning(
            "A fraction of %g holds out none or all of so few documents: %.3g is used instead.",
            fraction,
            empty.fraction,
        )
        return attempt(empty.fraction)


def _without_duplicates(batch: list[Document], seen: set[str]) -> Iterator[tuple[Document, str]]:
    for document in batch:
        text_hash = document.text_hash
        if text_hash not in seen:
            seen.add(text_hash)
            yield document, text_hash


def _is_ready(
    path: Path, sources: list[Source], settings: dict[str, Any], tokenizer: TextTokenizer, overwrite: bool
) -> bool:
    """Whether the store is there and was made so; one made otherwise is refused by name unless `overwrite`."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a directory for the store with --output.")
    if not path.is_dir() or not any(path.iterdir()):
        return False
    if not (path / "store.json").is_file():
        raise UserError(f"The directory {path} is not empty and is no store; choose another --output.")
    try:
        info = TokenStore(path).info
    except UserError:
        if overwrite:
            return False
        raise
    different = [name for name in settings if info["settings"].get(name) != settings[name]]
    if info["tokenizer_fingerprint"] != tokenizer.fingerprint():
        different.insert(0, "tokenizer")
    if not _same_inputs(info["inputs"], sources):
        different.insert(0, "input")
    if not different:
        return True
    if overwrite:
        return False
    raise UserError(
        f"The store {path} was made with another {', '.join(different)}; "
        "choose another --output, or replace it with --overwrite."
    )


def _same_inputs(recorded: list[dict[str, Any]], sources: list[Source]) -> bool:
    if len(recorded) != len(sources):
        return False
    for record, source in zip(recorded, sources, strict=True):
        if isinstance(source, SourceFile):
            if record.get("size") != source.size_bytes:
                return False
            # An unchanged time of change is trusted; after a copy or a touch the bytes decide.
            if record.get("modified_ns") != source.modified_ns and record["sha256"] != file_sha256(Path(source.path)):
                return False
        elif record != _describe(source):
            return False
    return True


def _describe(source: Source) -> dict[str, Any]:
    if isinstance(source, SourceFile):
        return {
            "name": Path(source.path).name,
            "size": source.size_bytes,
            "modified_ns": source.modified_ns,
            "sha256": file_sha256(Path(source.path)),
        }
    if isinstance(source, PrimerSource):
        return {"name": "primer", "sha256": source.sha256}
    return {"name": f"hf:{source.label}"}


def _total_bytes(sources: list[Source]) -> float | None:
    sizes = [source.size_bytes for source in sources if isinstance(source, SourceFile) and not source.compression]
    return float(sum(sizes)) if len(sizes) == len(sources) else None
