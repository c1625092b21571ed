"""The work on one shard of the input: a pure function of the shard and the settings, on any core or machine.

A directory appears by one rename. It holds the ids of all documents (tokens.bin), a row for each (documents.arrow), the
texts that may be held out (texts.arrow), signatures.npy and rejects.jsonl if they are asked for, and done.json.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from cartilha.corpus.cleaning import Cleaner, Rejected
from cartilha.corpus.document import Document
from cartilha.corpus.questions import Contaminated, QuestionFinder, load_runs
from cartilha.corpus.readers import ReadCounts, read_part
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.shards import Shard
from cartilha.corpus.signatures import NUM_VALUES, save_signatures, signatures
from cartilha.corpus.splits import split_position
from cartilha.languages import Language
from cartilha.preparation.threshold import Threshold
from cartilha.tokens.encoder import MAX_PIECE_CHARS, Encoder, cut, load_encoder
from cartilha.tokens.store import batches
from cartilha.tokens.store_writer import ROW_SCHEMA

BATCH_CHARS = 1 << 20  # arrays over a batch should fit into the cache of a core
BATCH_DOCUMENTS = 20_000
LISTED_CONTAMINATED = 100  # documents of each shard, and of the store, that are listed with what they hold
CONTAMINATED_FILE = "contaminated.json"  # of a shard: the first documents that hold questions
QUESTIONS_FILE = "questions.npz"  # in the work directory: the runs of words that documents must not have

THRESHOLD_FILE = "threshold.npz"  # likewise: from which weight on documents count as good

# What a store knows of a document, and the number of the shard's piece that it was read from.
_NEW_FIELDS = [("text_hash", pa.binary(16)), ("position", pa.float64()), ("piece", pa.int32())]
DOCUMENTS_SCHEMA = pa.schema([*list(ROW_SCHEMA)[:7], *_NEW_FIELDS])
TEXTS_SCHEMA = pa.schema([("row", pa.int64()), ("text", pa.large_binary())])

_Judge = Callable[[Sequence[Document]], list[Document | Rejected]]


@dataclass(frozen=True)
class ShardSettings:
    """What the work on a shard depends on, apart from the tokenizer.

    The seed decides the positions of documents; texts below `keep_texts_below` may be held out, and are kept. The store
    keeps ids as `dtype`. `questions` is the fingerprint of what is in `QUESTIONS_FILE`, empty without it.
    """

    reading: ReadSettings
    steps: tuple[str, ...]
    language: Language
    with_signatures: bool
    keep_texts_below: float
    seed: int
    with_rejects: bool
    dtype: str
    questions: str = ""


@dataclass(frozen=True)
class Until:
    """Reading ends when documents above the threshold of the work directory, which it names, hold so many tokens."""

    num_tokens: int
    threshold: str


@dataclass(frozen=True)
class ShardTask:
    """The work on at most `limit` documents of a shard, as it is sent to a worker; `work` has the encoder's file."""

    shard: Shard
    settings: ShardSettings
    work: Path
    limit: int | None = None
    until: Until | None = None

    @property
    def directory(self) -> Path:
        """Where the finished files are."""
        return self.work / f"shard-{self.shard.number:06d}"

    @property
    def identity(self) -> str:
        """A hash of all that decides the contents of the files."""
        return hashlib.sha256(repr((self.shard, self.settings, self.limit, self.until)).encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class ShardResult:
    """What the work on a shard counted: its size on the disk, `vars` of `ReadCounts`, and rejections by reason.

    `questions` has the numbers of the questions that were found; `CONTAMINATED_FILE` lists documents that hold some.
    `good_tokens` are those of documents above the threshold, if there is one.
    """

    number: int
    num_bytes: int
    read: dict[str, Any]
    rejected: dict[str, int]
    questions: list[int]
    good_tokens: int = 0

    @property
    def num_documents(self) -> int:
        """Documents that were read, without empty ones."""
        return int(self.read["documents"])


def done_result(task: ShardTask) -> ShardResult | None:
    """The result of a task that this run or a killed one has finished, else None."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        mark = json.loads((task.directory / "done.json").read_text(encoding="utf-8"))
        sizes = {name: (task.directory / name).stat().st_size for name in mark["sizes"]}
        if mark["identity"] == task.identity and sizes == mark["sizes"]:
            return ShardResult(**mark["result"])
    return None


def process_shard(task: ShardTask) -> ShardResult:
    """Do the work on a shard; if it fails (UserError for unreadable documents), what was written is removed."""
    temporary = task.work / f"{task.directory.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        judges = _judges(task)
        read, pieces = ReadCounts(), list[int]()
        with ExitStack() as stack:
            writer = _Writer(task, temporary, stack)
            for batch in batches(_documents(task, read, pieces), BATCH_CHARS, BATCH_DOCUMENTS):
                cleaned = zip(_judged(batch, judges), pieces[: len(batch)], strict=True)
                del pieces[: len(batch)]
                writer.add_or_reject(list(cleaned))
                if task.until is not None and writer.good_tokens >= task.until.num_tokens:
                    break
            result = writer.finish(read)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        mark = {"identity": task.identity, "sizes": sizes, "result": vars(result)}
        (temporary / "done.json").write_text(json.dumps(mark), encoding="utf-8")
        shutil.rmtree(task.directory, ignore_errors=True)
        temporary.replace(task.directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return result


def _documents(task: ShardTask, read: ReadCounts, pieces: list[int]) -> Iterator[Document]:
    """The documents of the shard; the number of each one's part is appended to `pieces`."""
    for number, part in enumerate(task.shard.parts):
        left = None if task.limit is None else task.limit - read.documents
        if left == 0:
            return
        for document in islice(read_part(part, task.settings.reading, read), left):
            pieces.append(number)
            yield document


def _judges(task: ShardTask) -> list[_Judge]:
    """What mends documents or leaves them out, in this order."""
    settings = task.settings
    judges: list[_Judge] = [Cleaner(settings.steps, settings.language)] if settings.steps else []
    return [*judges, _finder(task.work, settings.questions)] if settings.questions else judges


def _judged(batch: Sequence[Document], judges: Sequence[_Judge]) -> list[Document | Rejected]:
    """What each document has become."""
    result: list[Document | Rejected] = list(batch)
    for judge in judges:
        kept = [(i, document) for i, document in enumerate(result) if isinstance(document, Document)]
        for (i, _), found in zip(kept, judge([document for _, document in kept]), strict=True):
            result[i] = found
    return result


@functools.lru_cache(maxsize=1)
def _finder(work: Path, fingerprint: str) -> QuestionFinder:
    """The questions of the work directory, kept by the process."""
    runs = load_runs(work / QUESTIONS_FILE)
    assert runs.fingerprint == fingerprint
    return QuestionFinder(runs)


@functools.lru_cache(maxsize=1)
def _threshold(work: Path, fingerprint: str) -> Threshold:
    """The threshold of the work directory, kept by the process."""
    found = Threshold.load(work / THRESHOLD_FILE)
    assert found.fingerprint == fingerprint
    return found


@functools.lru_cache(maxsize=1)
def _encoder(work: Path, made: int) -> Encoder:
    """The encoder of the work directory, kept by the process: loading it takes a fifth of a second."""
    return load_encoder(work)


class _Writer:
    """The open files of a shard's work."""

    def __init__(self, task: ShardTask, directory: Path, stack: ExitStack) -> None:
        self.task = task
        self._directory = directory
        self._encoder = _encoder(task.work, (task.work / "encoder.json").stat().st_mtime_ns)
        self._num_documents = 0
        self.good_tokens = 0
        self._rejected: Counter[str] = Counter()
        self._questions = set[int]()
        self._contaminated: list[dict[str, Any]] = []
        self._lowest: tuple[float, int, bytes] | None = None  # position, row and text, unless it is kept anyway
        self._stack = stack
        self._tokens = self._open("tokens.bin")
        # A shard of tiny documents has so many that their signatures would fill the memory.
        self._signatures = stack.enter_context(tempfile.TemporaryFile(dir=directory))  # noqa: SIM115
        self._rejects = self._open("rejects.jsonl") if task.settings.with_rejects else None
        self._documents = self._open_arrow("documents.arrow", DOCUMENTS_SCHEMA, None)
        self._texts = self._open_arrow("texts.arrow", TEXTS_SCHEMA, "lz4")

    def _open(self, name: str) -> BinaryIO:
        return self._stack.enter_context((self._directory / name).open("wb"))

    def _open_arrow(self, name: str, schema: pa.Schema, compression: str | None) -> Any:
        options = pa.ipc.IpcWriteOptions(compression=compression)
        return self._stack.enter_context(pa.ipc.new_file(self._open(name), schema, options=options))

    def add_or_reject(self, cleaned: list[tuple[Document | Rejected, int]]) -> None:
        """Take a batch after cleaning, each document with the number of its part."""
        documents, pieces = list[Document](), list[int]()
        for found, piece in cleaned:
            if isinstance(found, Rejected):
                self._reject(found)
            else:
                documents.append(found)
                pieces.append(piece)
        if documents:
            self._add(documents, pieces)

    def _reject(self, rejected: Rejected) -> None:
        self._rejected[rejected.reason] += 1
        document = rejected.document
        row: dict[str, Any] = {"id": document.id, "source": document.source, "reason": rejected.reason}
        if isinstance(rejected, Contaminated):
            self._questions.update(rejected.questions)
            ids = _finder(self.task.work, self.task.settings.questions).runs.ids
            row |= {"questions": [ids[number] for number in rejected.questions], "span": rejected.span}
            self._contaminated += [row] if len(self._contaminated) < LISTED_CONTAMINATED else []
        if self._rejects is not None:
            row = {**row, "text": document.text}
            self._rejects.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))

    def _add(self, documents: list[Document], pieces: list[int]) -> None:
        """Hash, count and tokenize a batch, and write the results."""
        settings = self.task.settings
        texts = [document.text.encode("utf-8") for document in documents]
        hashes = [hashlib.sha256(text).digest()[:16] for text in texts]
        positions = np.array([split_position(text_hash.hex(), settings.seed) for text_hash in hashes])
        if len(documents) == 1 and len(documents[0].text) > MAX_PIECE_CHARS and self._encoder.proof.can_cut:
            numbers = self._add_long(documents[0].text)
        else:
            ids, num_tokens, counts = self._encoder.encode(texts)
            self._write_ids(ids)
            numbers = np.stack([num_tokens, counts.num_bytes, counts.num_chars, counts.num_words])
            self._count_good(ids, num_tokens, hashes)
        columns = [
            *(pa.array([getattr(document, name) for document in documents]) for name in ("id", "source", "domain")),
            *(pa.array(row, pa.int64()) for row in numbers),
            pa.array(hashes, pa.binary(16)),
            pa.array(positions),
            pa.array(pieces, pa.int32()),
        ]
        self._documents.write_batch(pa.record_batch(columns, schema=DOCUMENTS_SCHEMA))
        self._keep_texts(texts, positions)
        if settings.with_signatures:
            self._signatures.write(signatures([document.text for document in documents]).data)
        self._num_documents += len(documents)

    def _count_good(self, ids: np.ndarray, num_tokens: np.ndarray, hashes: list[bytes]) -> None:
        if self.task.until is not None:
            threshold = _threshold(self.task.work, self.task.until.threshold)
            pairs = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).astype(np.uint64)
            self.good_tokens += threshold.tokens_above(ids, num_tokens, pairs)

    def _add_long(self, text: str) -> np.ndarray:
        """Encode a text that is too long to be encoded at once; the sums over its pieces, shape (4, 1)."""
        sums = np.zeros(4, np.int64)
        last = " "
        for piece in cut(text):
            ids, num_tokens, counts = self._encoder.encode([piece.encode("utf-8")])
            self._write_ids(ids)
            sums += np.concatenate([num_tokens, counts.num_bytes, counts.num_chars, counts.num_words])
            sums[3] -= not (last.isspace() or piece[0].isspace())  # a word that was cut counts once
            last = piece[-1]
        return sums[:, None]

    def _write_ids(self, ids: np.ndarray) -> None:
        self._tokens.write(np.ascontiguousarray(ids, np.dtype(self.task.settings.dtype)).view(np.uint8).data)

    def _keep_texts(self, texts: list[bytes], positions: np.ndarray) -> None:
        """Keep the texts that may be held out, and the one of the lowest position, so that no side can be empty."""
        is_kept = positions < self.task.settings.keep_texts_below
        kept = np.flatnonzero(is_kept)
        self._write_texts(kept + self._num_documents, [texts[i] for i in kept.tolist()])
        lowest = int(positions.argmin())
        if not is_kept[lowest] and (self._lowest is None or positions[lowest] < self._lowest[0]):
            self._lowest = (float(positions[lowest]), self._num_documents + lowest, texts[lowest])

    def _write_texts(self, rows: np.ndarray, texts: list[bytes]) -> None:
        columns = [pa.array(rows, pa.int64()), pa.array(texts, pa.large_binary())]
        self._texts.write_batch(pa.record_batch(columns, schema=TEXTS_SCHEMA))

    def finish(self, read: ReadCounts) -> ShardResult:
        """Write what is held, and close the files."""
        if self._lowest is not None:
            self._write_texts(np.array([self._lowest[1]]), [self._lowest[2]])
        if self.task.settings.with_signatures:
            self._signatures.flush()
            shape, is_empty = (self._num_documents, NUM_VALUES), not self._num_documents
            values = np.zeros(shape, np.uint16) if is_empty else np.memmap(self._signatures, "<u2", "r", shape=shape)
            save_signatures(self._directory / "signatures.npy", values)
        self._stack.close()
        if self.task.settings.questions:
            listed = json.dumps(self._contaminated).encode("ascii")
            (self._directory / CONTAMINATED_FILE).write_bytes(listed)
        return ShardResult(
            self.task.shard.number,
            self.task.shard.num_bytes,
            vars(read),
            self._rejected,
            sorted(self._questions),
            self.good_tokens,
        )
