"""`prepare`: text to a token store.

    inputs -> shards -> work on each, on all cores (shard_work) -> what stays and where (assembly) -> the store

A killed run leaves its finished shards in a work directory beside the store, and the same command continues from there.
The store appears by the rename at the end and at no earlier moment.
"""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cartilha.config import PrepareConfig
from cartilha.corpus.files import SourceFile
from cartilha.corpus.formats import expansion
from cartilha.corpus.hints import log_hints
from cartilha.corpus.hub import opened
from cartilha.corpus.pieces import large_arrays_in, total
from cartilha.corpus.questions import QuestionRuns
from cartilha.corpus.readers import ReadCounts, first_documents, read_documents
from cartilha.corpus.shards import Shard, shards, shuffled
from cartilha.corpus.sources import HubSource
from cartilha.corpus.splits import SPLITS, Split
from cartilha.errors import counted, log
from cartilha.machine.cpu import give_back_freed_memory
from cartilha.machine.devices import usable_cores
from cartilha.machine.versions import TEXT_PACKAGES, versions
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.questions import named_questions
from cartilha.pipeline.result import Result
from cartilha.preparation.assembly import Sides, decide, side_counts, write_rejects, write_sides
from cartilha.preparation.decontamination import found_questions
from cartilha.preparation.enough import do_shards
from cartilha.preparation.executors import LARGE_ARRAY, Executor, in_processes, on_ray
from cartilha.preparation.index import DocumentIndex, load_index
from cartilha.preparation.made_from import describe, describe_questions, ready_store
from cartilha.preparation.notices import nothing_left, tell_counts, tell_mixture, tell_rest, tell_selection
from cartilha.preparation.quality import Judge, Scorer
from cartilha.preparation.request import PrepareRequest, read_request
from cartilha.preparation.selection import Amount
from cartilha.preparation.selection_report import report, write_weights
from cartilha.preparation.shard_work import (
    QUESTIONS_FILE,
    ShardResult,
    ShardSettings,
    ShardTask,
    done_result,
)
from cartilha.preparation.target import check_target
from cartilha.preparation.work_directory import remove_finished_work, require_space, work_directory
from cartilha.tokens.encoder import Encoder, Proof, load_encoder
from cartilha.tokens.proof import MAX_SAMPLE_BYTES, prove
from cartilha.tokens.store import SplitCounts
from cartilha.tokens.store_writer import token_dtype, writing_store
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer

SHARD_BYTES = 16 << 20
SHUFFLED_BYTES = 1 << 20
INLINE_BYTES = 4 << 20  # less than this is done before worker processes have started
PROOF_DOCUMENTS = 2000
COMPRESSED_TEXT = 0.5  # of the text's size under zstd, on the safe side

_ShardExecutor = Executor[ShardTask, ShardResult]


@dataclass(frozen=True)
class PrepareResult(Result):
    """A store that is ready, perhaps since before; `dropped` counts the documents left out, by reason.

    With near-duplicates, `leaks` has the share of held-out documents that have one in training (`leak_rate`), and what
    it would be if the split looked at each document alone (`plain_leak_rate`). `selection` says what
    `--select_tokens` chose, `decontamination` which questions of `--decontaminate` were in the text, `quality` which
    scores the documents have by which they are kept or not. Of a dry run, `store` is empty.
    """

    store: str
    splits: dict[Split, SplitCounts]
    dropped: dict[str, int]
    was_ready: bool
    leaks: dict[str, float] | None = None
    selection: dict[str, Any] | None = None
    decontamination: dict[str, Any] | None = None
    quality: list[dict[str, Any]] | None = None


# What decides about documents that have been read, and not how they are read: another value reads nothing anew.
DECIDED_LATER = ("select_tokens", "select_for", "max_perplexity", "min_perplexity", "classifier", "min_score")


@dataclass(frozen=True)
class _Job:
    """A store to be made; `identity` tells the work of this command from that of another one."""

    path: Path
    config: PrepareConfig
    asked: PrepareRequest
    tokenizer: TextTokenizer
    identity: dict[str, Any]
    runs: QuestionRuns | None = None
    scorers: tuple[Scorer, ...] = ()


def prepare(config: PrepareConfig) -> PrepareResult:
    """Make a store of the input, or find what the same command made; a UserError says what is wrong with either."""
    preflight(config)
    if "torch" not in sys.modules:  # a process that has a model keeps what it frees, for the next one
        give_back_freed_memory(LARGE_ARRAY)
    asked, path = read_request(config), Path(config.output)
    with ExitStack() as stack:
        # Worker processes start here and import while the tokenizer is loaded; a finished store may need none.
        executor = None if (path / "store.json").exists() else stack.enter_context(_executor(config, asked))
        tokenizer = load_tokenizer(config.model)
        store = ready_store(config, asked, tokenizer)
        identity = {
            "settings": {k: value for k, value in config.deciding_values().items() if k not in DECIDED_LATER},
            "rejects": bool(config.rejects),
            "sources": [repr(source) for source in asked.sources],
            "num_held_out": asked.num_held_out,
            "num_targets": asked.num_targets,
            "questions": repr(asked.questions),
            "tokenizer": tokenizer.fingerprint,
            "cartilha": versions(("cartilha",))["cartilha"],
        }
        if store is not None:
            if not config.keep_pool:
                remove_finished_work(path, identity)
            log.info("The store %s was made by this same command before: nothing to do.", path)
            if config.rejects and not Path(config.rejects).exists():
                log.warning("%s is not written, because nothing is cleaned now; add --overwrite.", config.rejects)
            recorded = (store.info.get(name) for name in ("leaks", "selection", "decontamination", "quality"))
            return PrepareResult(str(path), store.counts, store.info["dropped"], True, *recorded)
        log_hints(asked.sources, asked.reading)
        check_target(asked)
        if config.select_for is not None:
            from cartilha.pipeline.plan import tokens_in  # torch takes seconds, and nothing else here needs it

            asked = replace(asked, amount=Amount(tokens_in(config.model, config.select_for), at_most=True))
        executor = executor or stack.enter_context(_executor(config, asked))
        job = _Job(
            path,
            config,
            asked,
            tokenizer,
            identity,
            named_questions(asked.questions, asked.reading),
            _scorers(asked, tokenizer),
        )
        result = _make(job, executor)
    for split in SPLITS:
        tell_counts(split, result.splits[split])
    return result


def _scorers(asked: PrepareRequest, tokenizer: TextTokenizer) -> tuple[Scorer, ...]:
    """What computes the scores; loaded before anything is read, so that a model that is no good is named at once."""
    if not asked.signals:
        return ()
    from cartilha.evaluation.text_quality import scorer_of  # torch takes seconds

    return tuple(scorer_of(signal.name, signal.reference, tokenizer) for signal in asked.signals)


def _executor(config: PrepareConfig, asked: PrepareRequest) -> AbstractContextManager[_ShardExecutor]:
    if config.executor == "ray":
        return on_ray(config.ray_address, config.workers)
    num_workers = config.workers or usable_cores()
    sizes = [source.size_bytes for source in asked.sources if isinstance(source, SourceFile)]
    imports = ["cartilha.corpus.language_model"] if "language" in asked.steps else []
    is_small = sum(sizes) < INLINE_BYTES and not any(isinstance(source, HubSource) for source in asked.sources)
    return nullcontext(map) if num_workers == 1 or is_small else in_processes(num_workers, imports)


def _make(job: _Job, executor: _ShardExecutor) -> PrepareResult:
    """Make the store, in a work directory that stays if the work is interrupted."""
    config = job.config
    with (
        work_directory(job.path, job.identity, keep=config.keep_pool or config.dry_run) as work,
        large_arrays_in(work),
        ThreadPoolExecutor(2) as aside,
    ):
        asked = replace(job.asked, sources=opened(job.asked.sources, work / "commits.json"))
        job = replace(job, asked=asked)
        shard_bytes = SHUFFLED_BYTES if config.shuffle else SHARD_BYTES
        cutting = aside.submit(_cut, asked, shard_bytes)  # counts lines
        first = first_documents(read_documents(asked.sources, asked.reading), MAX_SAMPLE_BYTES)
        sample = [document.text for document in islice(first, PROOF_DOCUMENTS)]
        if (work / "encoder.json").is_file():
            encoder = load_encoder(work)
        else:
            encoder = prove(job.tokenizer, sample)
            encoder.save(work)
        if job.runs is not None:
            job.runs.save(work / QUESTIONS_FILE)
        given, rest = cutting.result()
        if config.shuffle:
            rest = shuffled(rest, config.seed)
        parts = [replace(shard, number=number) for number, shard in enumerate([*given, *rest])]
        settings = _shard_settings(job)
        tasks = [ShardTask(part, settings, work) for part in parts]
        if config.stream_best is None:  # else nobody knows how much will be read
            _check_space(work, tasks, sample, encoder)
        proof = encoder.proof
        del encoder  # tens of megabytes; those who do the work have their own
        done = do_shards(job.config, asked, executor, tasks, len(given))
        inputs = aside.submit(describe, asked)  # hashes the files
        return _write(job, executor, done, proof, inputs)


def _shard_settings(job: _Job) -> ShardSettings:
    config, asked, dtype = job.config, job.asked, token_dtype(job.tokenizer.num_ids)
    if dtype.itemsize > 2:
        ids = counted(job.tokenizer.num_ids, "id")
        log.info("The tokenizer has %s: the store takes 4 bytes per token instead of 2.", ids)
    is_counted = config.validation_documents is not None or config.validation_first is not None
    # If a document's own position alone decides its side, no other texts need to be kept.
    given = asked.num_held_out + asked.num_targets
    any_may_be_held_out = config.near_duplicates or asked.mixture or given or is_counted
    return ShardSettings(
        reading=asked.reading,
        steps=asked.steps,
        language=asked.language,
        with_signatures=config.near_duplicates,
        keep_texts_below=2.0 if any_may_be_held_out else config.validation_fraction,
        seed=config.seed,
        with_rejects=bool(config.rejects),
        dtype=dtype.str,
        questions="" if job.runs is None else job.runs.fingerprint,
    )


def _check_space(work: Path, tasks: list[ShardTask], sample: list[str], encoder: Encoder) -> None:
    """The disk must hold ids and held-out texts twice for a moment: in the shards and in the store."""
    if not tasks:
        return
    texts = [text[:100_000].encode("utf-8") for text in sample]
    ids_per_byte = len(encoder.encode(texts)[0]) / max(1, sum(map(len, texts)))
    settings = tasks[0].settings
    kept = min(1.0, settings.keep_texts_below)
    stored_per_byte = ids_per_byte * np.dtype(settings.dtype).itemsize + kept * COMPRESSED_TEXT
    text_bytes = sum(_text_bytes(task.shard) for task in tasks if done_result(task) is None)
    require_space(work, 2 * stored_per_byte * text_bytes)


def _text_bytes(shard: Shard) -> float:
    """The size of a shard's text once it is decompressed, as far as its sources tell."""
    growth = [expansion(part.source) if isinstance(part.source, SourceFile) else 1.0 for part in shard.parts]
    return shard.num_bytes * sum(growth) / len(growth)


def _cut(asked: PrepareRequest, shard_bytes: int) -> tuple[list[Shard], list[Shard]]:
    """The shards of the texts that are held out or aimed at, which are read whole, and those of the input."""
    num_given = asked.num_held_out + asked.num_targets
    given, rest = asked.sources[:num_given], asked.sources[num_given:]
    return shards(given, asked.reading, shard_bytes), shards(rest, asked.reading, shard_bytes)


def _write(
    job: _Job,
    executor: _ShardExecutor,
    done: list[tuple[ShardTask, ShardResult]],
    proof: Proof,
    inputs: Future[list[dict[str, Any]]],
) -> PrepareResult:
    """Decide what stays and where, and write the store."""
    config, asked = job.config, job.asked
    tasks, (read, rejected) = [task for task, _ in done], _sums(done)
    index = load_index(tasks, asked.sources)
    if not len(index.hashes):
        raise nothing_left(config, rejected)
    judge = Judge.of(index, asked.signals, job.scorers)
    sides = decide(index, asked, executor, judge, near_duplicates=config.near_duplicates)
    quality = None if judge is None else judge.facts(job.tokenizer)
    tell_mixture(config, sides)
    selection = None if sides.chosen is None else report(index, sides.chosen, job.tokenizer)
    if selection is not None:
        tell_selection(config, selection)
    _require_space(job, index, sides)
    dropped = {**sides.dropped, "empty": read.empty, **dict(read.skipped), **rejected}
    if asked.left_out:
        dropped["files"] = sum(map(len, asked.left_out.values()))
    decontamination = None if job.runs is None else describe_questions(asked) | found_questions(job.runs, done)
    if config.rejects:  # before the store appears: once it is there, the same command has nothing to do
        write_rejects(Path(config.rejects), tasks, () if judge is None else judge.rejects(job.tokenizer))
    leaks = _leaks(config, sides)
    found: dict[str, Any] = {
        "leaks": leaks,
        "selection": selection,
        "decontamination": decontamination,
        "quality": quality,
    }
    if config.dry_run:
        tell_rest(read, sides, leaks)
        return PrepareResult("", side_counts(index, sides), dropped, False, **found)
    with writing_store(job.path, job.tokenizer, replace=config.overwrite) as writer:
        write_sides(writer, index, sides)
        if sides.chosen is not None:
            write_weights(writer.directory, index, sides.chosen)
        writer.finish(
            {
                "inputs": inputs.result(),
                "settings": config.deciding_values(),
                "language": asked.language.to_dict(),
                "dropped": dropped,
                "files_left_out": asked.left_out,
                **_read_counts(read),
                "fraction_used": sides.split.fraction_used,
                "leaks": leaks,
                **{name: value for name, value in {"mixture": list(sides.mixture), **found}.items() if value},
                "notes": list(sides.split.notes),
                **_made_by(proof),
            }
        )
        counts = writer.counts()
    tell_rest(read, sides, leaks)
    return PrepareResult(str(job.path), counts, dropped, False, **found)


def _sums(done: list[tuple[ShardTask, ShardResult]]) -> tuple[ReadCounts, dict[str, int]]:
    """What all shards read, and what cleaning left out, by reason."""
    read, rejected = ReadCounts(), Counter[str]()
    for _, result in done:
        read.add(ReadCounts(**result.read))
        rejected.update(result.rejected)
    return read, dict(rejected.most_common())


def _require_space(job: _Job, index: DocumentIndex, sides: Sides) -> None:
    """A store that holds documents several times may be larger than what was read."""
    if sides.train.max(initial=0) > 1:
        num_tokens = total(index.num_tokens, sides.train)
        require_space(job.path.parent, num_tokens * token_dtype(job.tokenizer.num_ids).itemsize)


def _leaks(config: PrepareConfig, sides: Sides) -> dict[str, float] | None:
    if not config.near_duplicates:
        return None
    return {"leak_rate": sides.split.leak_rate, "plain_leak_rate": sides.split.plain_leak_rate}


def _read_counts(read: ReadCounts) -> dict[str, int]:
    return {
        "num_documents_read": read.documents + read.empty + sum(read.skipped.values()),
        "num_documents_with_replaced_bytes": read.replaced_bytes_documents,
        "num_documents_with_nul": read.nul_documents,
    }


def _made_by(proof: Proof) -> dict[str, Any]:
    tokenization = {**asdict(proof), "gigatoken": versions(("gigatoken",))["gigatoken"]}
    return {"tokenization": tokenization, "versions": versions(TEXT_PACKAGES)}
