"""`prepare`: text to a token store.

    inputs -> shards -> work on each, on all cores (shard_work) -> what stays and where (assembly) -> the store

A killed run leaves its finished shards in a work directory beside the store, and the same command goes on from there.
The rename at the end is the only moment at which the store appears.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cartilha.config import PrepareConfig
from cartilha.console import Advance, progress
from cartilha.corpus.files import SourceFile
from cartilha.corpus.formats import expansion
from cartilha.corpus.hints import log_hints
from cartilha.corpus.readers import Piece, ReadCounts, read_piece
from cartilha.corpus.shards import Shard, shards, shuffled
from cartilha.corpus.sources import HubSource
from cartilha.corpus.splits import SPLITS, Split
from cartilha.errors import UserError, counted
from cartilha.machine.devices import usable_cores
from cartilha.machine.versions import TEXT_PACKAGES, versions
from cartilha.preparation.assembly import decide, load_corpus, write_rejects, write_sides
from cartilha.preparation.executors import Executor, Inline, Local, Ray
from cartilha.preparation.made_from import describe, ready_store, settings_of
from cartilha.preparation.notices import tell_counts, tell_mixture, tell_rest
from cartilha.preparation.request import Plan, plan
from cartilha.preparation.shard_work import ShardResult, ShardSettings, ShardTask, done_result, process_shard
from cartilha.preparation.work_directory import remove_finished_work, require_space, work_directory
from cartilha.tokens.encoder import Encoder, load_encoder
from cartilha.tokens.proof import MAX_SAMPLE_BYTES, fast_path_version, prove
from cartilha.tokens.store import SplitCounts
from cartilha.tokens.store_writer import token_dtype, writing_store
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer

log = logging.getLogger("cartilha")

SHARD_BYTES = 16 << 20
SHUFFLED_BYTES = 1 << 20
INLINE_BYTES = 4 << 20  # less than this is done before processes have begun
PROOF_DOCUMENTS = 2000
COMPRESSED_TEXT = 0.5  # zstd's share, on the safe side
CLUSTER_MEMORY_BYTES = 512 << 20


@dataclass(frozen=True)
class PrepareResult:
    """A store that is ready.

    Attributes:
        store: Its directory.
        splits: What each side holds.
        dropped: Documents left out, by reason.
        was_ready: Whether the same command had made it before.
        leaks: With near-duplicates, the share of held-out documents that have one in training (`leak_rate`), and the
            same had the split looked at each document alone (`plain_leak_rate`).
    """

    store: str
    splits: dict[Split, SplitCounts]
    dropped: dict[str, int]
    was_ready: bool
    leaks: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)


def prepare(config: PrepareConfig) -> PrepareResult:
    """Make a token store of the input, or find the one that the same command made.

    Raises:
        UserError: No input, a file that cannot be read, nothing to split, or a directory that holds something else.
    """
    asked = plan(config)
    path = Path(config.output)
    with ExitStack() as stack:
        # Processes begin to start here, and import while the tokenizer is loaded; a store may make them needless.
        executor = None if (path / "store.json").exists() else stack.enter_context(closing(_executor(config, asked)))
        tokenizer = load_tokenizer(config.model)
        settings = settings_of(config)
        store = ready_store(path, asked.sources, asked.num_held_out, settings, tokenizer, config.overwrite)
        identity = {
            "settings": settings,
            "rejects": bool(config.rejects),
            "sources": [repr(source) for source in asked.sources],
            "num_held_out": asked.num_held_out,
            "tokenizer": tokenizer.fingerprint(),
            "cartilha": versions(("cartilha",))["cartilha"],
        }
        if store is not None:
            remove_finished_work(path, identity)
            log.info("The store %s was made by this same command before: nothing to do.", path)
            if config.rejects and not Path(config.rejects).exists():
                log.warning("%s is not written, for nothing is cleaned now; add --overwrite.", config.rejects)
            return PrepareResult(str(path), store.counts, store.info["dropped"], True, store.info.get("leaks"))
        log_hints(asked.sources, asked.reading)
        executor = executor or stack.enter_context(closing(_executor(config, asked)))
        result = _make(path, asked, config, tokenizer, identity, executor)
    for split in SPLITS:
        tell_counts(split, result.splits[split])
    return result


def _make(
    path: Path,
    asked: Plan,
    config: PrepareConfig,
    tokenizer: TextTokenizer,
    identity: dict[str, Any],
    executor: Executor,
) -> PrepareResult:
    """Make the store, in a work directory that stays where the making is interrupted."""
    with work_directory(path, identity) as work, ThreadPoolExecutor(2) as aside:
        shard_bytes = SHUFFLED_BYTES if config.shuffle else SHARD_BYTES
        parts = aside.submit(shards, asked.sources, asked.reading, shard_bytes)  # counts lines
        made = _do_shards(asked, config, tokenizer, executor, work, parts)
        # Hashes the files, while the store is written.
        inputs = aside.submit(describe, asked.sources, asked.num_held_out)
        return _write(path, asked, config, tokenizer, made, identity["settings"], inputs)


def _executor(config: PrepareConfig, asked: Plan) -> Executor:
    if config.executor == "ray":
        return Ray(config.ray_address, config.workers)
    num_workers = config.workers or usable_cores()
    sizes = [source.size_bytes for source in asked.sources if isinstance(source, SourceFile)]
    imports = ["cartilha.corpus.language_model"] if "language" in asked.steps else []
    is_small = sum(sizes) < INLINE_BYTES and not any(isinstance(source, HubSource) for source in asked.sources)
    return Inline() if num_workers == 1 or is_small else Local(num_workers, imports)


@dataclass(frozen=True)
class _Made:
    """Finished shards, in order."""

    tasks: list[ShardTask]
    results: list[ShardResult]
    encoder: Encoder

    def read(self) -> ReadCounts:
        """What was read, in sum."""
        total = ReadCounts()
        for result in self.results:
            total.add(result.read_counts())
        return total

    def rejected(self) -> dict[str, int]:
        """What cleaning left out, by reason."""
        total: Counter[str] = Counter()
        for result in self.results:
            total.update(result.rejected)
        return dict(total.most_common())


def _do_shards(
    asked: Plan,
    config: PrepareConfig,
    tokenizer: TextTokenizer,
    executor: Executor,
    work: Path,
    being_cut: Future[list[Shard]],
) -> _Made:
    """Do, or find done, the work on all shards."""
    sample = list(islice(_documents(asked), PROOF_DOCUMENTS))
    if (work / "encoder.json").is_file():
        encoder = load_encoder(work)
    else:
        encoder = prove(tokenizer, sample)
        encoder.save(work)
    dtype = token_dtype(tokenizer.num_ids)
    if dtype.itemsize > 2:
        log.info("The tokenizer has %s ids: the store takes 4 bytes a token instead of 2.", f"{tokenizer.num_ids:,}")
    settings = ShardSettings(
        reading=asked.reading,
        steps=asked.steps,
        cleaning=asked.cleaning,
        with_signatures=config.near_duplicates,
        keep_texts_below=_keep_texts_below(asked, config),
        seed=config.seed,
        with_rejects=bool(config.rejects),
        dtype=dtype.str,
    )
    parts = shuffled(being_cut.result(), config.seed) if config.shuffle else being_cut.result()
    tasks = [ShardTask(part, settings, work) for part in parts]
    _check_space(work, tasks, sample, encoder)
    with progress("Preparing", sum(part.num_bytes for part in parts) or None, "bytes") as advance:
        if config.limit_documents is None:
            results = _run(executor, tasks, advance)
        else:
            tasks, results = _run_up_to(
                config.limit_documents, executor, tasks, advance, config.workers or usable_cores()
            )
    return _Made(tasks, results, encoder)


def _documents(asked: Plan) -> Iterator[str]:
    """Texts from the beginning of the input, as many as the tokenizer's proof takes."""
    num_bytes = 0
    for source in asked.sources:
        for document in read_piece(Piece(source), asked.reading, ReadCounts()):
            yield document.text
            num_bytes += len(document.text)
            if num_bytes > MAX_SAMPLE_BYTES:
                return


def _keep_texts_below(asked: Plan, config: PrepareConfig) -> float:
    """Where nothing but a document's own position decides, the texts of the others are not kept."""
    decided = not (config.near_duplicates or asked.mixture or asked.num_held_out)
    decided = decided and config.validation_documents is None and config.validation_first is None
    return config.validation_fraction if decided else 2.0


def _run(executor: Executor, tasks: list[ShardTask], advance: Advance) -> list[ShardResult]:
    results = {task.shard.number: result for task in tasks if (result := done_result(task)) is not None}
    advance(sum(result.num_bytes for result in results.values()))
    for result in executor.map(process_shard, [task for task in tasks if task.shard.number not in results]):
        results[result.number] = result
        advance(result.num_bytes)
    return [results[task.shard.number] for task in tasks]


def _run_up_to(
    limit: int, executor: Executor, tasks: list[ShardTask], advance: Advance, at_once: int
) -> tuple[list[ShardTask], list[ShardResult]]:
    """The shards that the first `limit` documents are in, the last one cut.

    Several are done at a time, none of them further than the limit; the one that goes beyond it is done again.
    """
    chosen: list[ShardTask] = []
    results: list[ShardResult] = []
    for begin in range(0, len(tasks), at_once):
        wave = [replace(task, limit=limit) for task in tasks[begin : begin + at_once]]
        for task, result in zip(wave, _run(executor, wave, advance), strict=True):
            if result.read["documents"] > limit:
                task = replace(task, limit=limit)
                result = _run(Inline(), [task], advance)[0]
            chosen.append(task)
            results.append(result)
            limit -= result.read["documents"]
            if limit == 0:
                return chosen, results
    return chosen, results


def _check_space(work: Path, tasks: list[ShardTask], sample: list[str], encoder: Encoder) -> None:
    """The disk must hold ids and held-out texts twice for a moment: in the shards and in the store."""
    texts = [text[:100_000].encode("utf-8") for text in sample]
    num_bytes = max(1, sum(map(len, texts)))
    ids_a_byte = len(encoder.encode(texts)[0]) / num_bytes
    settings = tasks[0].settings if tasks else None
    if settings is None:
        return
    text_bytes = 0.0
    for task in tasks:
        if done_result(task) is None:
            for piece in task.shard.pieces:
                share = task.shard.num_bytes / len(task.shard.pieces)
                text_bytes += share * (expansion(piece.source) if isinstance(piece.source, SourceFile) else 1.0)
    kept = min(1.0, settings.keep_texts_below)
    each = ids_a_byte * np.dtype(settings.dtype).itemsize + kept * COMPRESSED_TEXT
    require_space(work, 2 * each * text_bytes)


def _write(
    path: Path,
    asked: Plan,
    config: PrepareConfig,
    tokenizer: TextTokenizer,
    made: _Made,
    settings: dict[str, Any],
    inputs: Future[list[dict[str, Any]]],
) -> PrepareResult:
    """Decide what stays and where, and write the store."""
    read = made.read()
    corpus = load_corpus(made.tasks, {source: number for number, source in enumerate(asked.sources)})
    rejected = made.rejected()
    if not len(corpus.hashes):
        raise _nothing_left(config, rejected)
    sides = decide(
        corpus,
        asked.rule,
        near_duplicates=config.near_duplicates,
        mixture=asked.mixture,
        given=asked.given,
        memory_bytes=CLUSTER_MEMORY_BYTES,
    )
    tell_mixture(config, sides)
    if sides.train.max(initial=0) > 1:
        require_space(path.parent, int(sides.train @ corpus.num_tokens) * token_dtype(tokenizer.num_ids).itemsize)
    dropped = {**sides.dropped, "empty": read.empty, **dict(read.skipped), **rejected}
    if asked.left_out:
        dropped["files"] = sum(map(len, asked.left_out.values()))
    leaks = None
    if config.near_duplicates:
        leaks = {"leak_rate": sides.split.leak_rate, "plain_leak_rate": sides.split.plain_leak_rate}
    proof = made.encoder.proof
    if config.rejects:  # before the store appears, for then the same command has nothing to do
        write_rejects(Path(config.rejects), made.tasks)
    with writing_store(path, tokenizer, replace=config.overwrite) as writer:
        write_sides(writer, corpus, sides)
        writer.finish(
            {
                "inputs": inputs.result(),
                "settings": settings,
                "dropped": dropped,
                "files_left_out": asked.left_out,
                "num_documents_read": read.documents + read.empty + sum(read.skipped.values()),
                "num_documents_with_replaced_bytes": read.replaced_bytes_documents,
                "num_documents_with_nul": read.nul_documents,
                "fraction_used": sides.split.fraction_used,
                "leaks": leaks,
                **({"mixture": list(sides.mixture)} if sides.mixture else {}),
                "notes": list(sides.split.notes),
                "tokenization": {**proof.to_dict(), "gigatoken": fast_path_version()},
                "versions": versions(TEXT_PACKAGES),
            }
        )
        counts = writer.counts()
    tell_rest(read, sides, leaks)
    return PrepareResult(str(path), counts, dropped, False, leaks)


def _nothing_left(config: PrepareConfig, rejected: dict[str, int]) -> UserError:
    if not rejected:
        return UserError(f"The input holds no text ({', '.join(config.input)}); check the files and --text_column.")
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in rejected.items())
    return UserError(
        f"Cleaning left out all {counted(sum(rejected.values()), 'document')} ({reasons}); name fewer steps with "
        "--clean, or another --language."
    )
