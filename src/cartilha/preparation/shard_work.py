"""The work on one shard of the input: a pure function of the shard and the settings, on any core or machine.

shard -> read -> clean -> hash, count, tokenize -> files in a directory that appears by one rename

shard-00007/  tokens.bin        ids of all its documents, one after the other
              documents.arrow   a row a document
              texts.arrow       the texts that may be held out
              signatures.npy    with --near_duplicates
              rejects.jsonl     with --rejects
              done.json         what it was made from, and counts
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cartilha.corpus.cleaning import Cleaner, CleaningSettings, Rejected
from cartilha.corpus.document import Document
from cartilha.corpus.readers import ReadCounts, read_part
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.shards import Shard
from cartilha.corpus.signatures import save_signatures, signatures
from cartilha.corpus.splits import split_position
from cartilha.tokens.encoder import MAX_PIECE_CHARS, Encoder, cut, load_encoder
from cartilha.tokens.store import batches
from cartilha.tokens.store_writer import ROW_SCHEMA

BATCH_CHARS = 1 << 20  # the arrays over a batch should fit into a core's cache
BATCH_DOCUMENTS = 20_000

DOCUMENTS_SCHEMA = pa.schema(
    [
        *list(ROW_SCHEMA)[:7],  # what a store knows of a document
        ("text_hash", pa.binary(16)),
        ("position", pa.float64()),
        ("piece", pa.int32()),  # number of the shard's piece that it was read from
    ]
)
TEXTS_SCHEMA = pa.schema([("row", pa.int64()), ("text", pa.large_binary())])


@dataclass(frozen=True)
class ShardSettings:
    """What the work on a shard depends on, the tokenizer aside.

    Attributes:
        reading: How records become documents.
        steps: Cleaning steps, by name.
        cleaning: What the steps are told.
        with_signatures: Whether near-duplicates are to be found.
        keep_texts_below: Texts of documents whose position is below this are kept, as those may be held out.
        seed: Decides the positions.
        with_rejects: Whether the documents that cleaning leaves out are written.
        dtype: Of the ids, as the store has it.
    """

    reading: ReadSettings
    steps: tuple[str, ...]
    cleaning: CleaningSettings
    with_signatures: bool
    keep_texts_below: float
    seed: int
    with_rejects: bool
    dtype: str


@dataclass(frozen=True)
class ShardTask:
    """One piece of work; picklable.

    Attributes:
        shard: What to read.
        settings: What to do.
        work: The work directory, with the encoder's file.
        limit: Read at most this many documents.
    """

    shard: Shard
    settings: ShardSettings
    work: Path
    limit: int | None = None

    @property
    def directory(self) -> Path:
        """Where its files are when they are done."""
        return self.work / f"shard-{self.shard.number:06d}"

    @property
    def identity(self) -> str:
        """Changes with whatever changes the files."""
        return hashlib.sha256(repr((self.shard, self.settings, self.limit)).encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class ShardResult:
    """What a shard's work counted.

    Attributes:
        number: The shard's.
        num_bytes: Its size on the disk, for progress.
        num_documents: Documents kept.
        num_tokens: Their tokens.
        text_bytes: Their size in UTF-8.
        read: What the reader counted: `vars` of a `ReadCounts`.
        rejected: Documents that cleaning left out, by reason.
    """

    number: int
    num_bytes: int
    num_documents: int
    num_tokens: int
    text_bytes: int
    read: dict[str, Any]
    rejected: dict[str, int]

    def read_counts(self) -> ReadCounts:
        """The reader's counts."""
        return ReadCounts(**{**self.read, "skipped": Counter(self.read["skipped"])})


def done_result(task: ShardTask) -> ShardResult | None:
    """The result of a task that this run, or one that was killed, finished before; None where there is none."""
    try:
        mark = json.loads((task.directory / "done.json").read_text(encoding="utf-8"))
        sizes = {name: (task.directory / name).stat().st_size for name in mark["sizes"]}
        if mark["identity"] == task.identity and sizes == mark["sizes"]:
            return ShardResult(**mark["result"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def process_shard(task: ShardTask) -> ShardResult:
    """Do the work on a shard.

    Raises:
        UserError: Its documents cannot be read.
        OSError: Its files cannot be written; what was written of them is removed.
    """
    temporary = task.work / f"{task.directory.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        cleaner = Cleaner(task.settings.steps, task.settings.cleaning) if task.settings.steps else None
        read, pieces = ReadCounts(), list[int]()
        with _Writer(task, temporary) as writer:
            for batch in batches(_documents(task, read, pieces), BATCH_CHARS, BATCH_DOCUMENTS):
                cleaned = zip(batch if cleaner is None else cleaner(batch), pieces[: len(batch)], strict=True)
                del pieces[: len(batch)]
                writer.add_or_reject(list(cleaned))
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
    """The shard's documents; to `pieces` goes for each the number of its part."""
    for number, part in enumerate(task.shard.parts):
        left = None if task.limit is None else task.limit - read.documents
        if left == 0:
            return
        for document in islice(read_part(part, task.settings.reading, read), left):
            pieces.append(number)
            yield document


@functools.lru_cache(maxsize=1)
def _encoder(work: Path, made: int) -> Encoder:
    """The work directory's encoder; kept by the process, for loading one takes a fifth of a second."""
    return load_encoder(work)


class _Writer:
    """The open files of a shard's work."""

    def __init__(self, task: ShardTask, directory: Path) -> None:
        self.task = task
        self._directory = directory
        self._encoder = _encoder(task.work, (task.work / "encoder.json").stat().st_mtime_ns)
        self._stack = ExitStack()
        self._num_documents = self._num_tokens = self._text_bytes = 0
        self._rejected: Counter[str] = Counter()
        self._signatures: list[np.ndarray] = []
        self._lowest: tuple[float, int, bytes] | None = None  # position, row and text that are not kept anyway

    def __enter__(self) -> _Writer:
        self._tokens = self._stack.enter_context((self._directory / "tokens.bin").open("wb"))
        self._rejects = None
        if self.task.settings.with_rejects:
            path = self._directory / "rejects.jsonl"
            self._rejects = self._stack.enter_context(path.open("w", encoding="utf-8"))
        self._documents = self._arrow("documents.arrow", DOCUMENTS_SCHEMA, None)
        self._texts = self._arrow("texts.arrow", TEXTS_SCHEMA, "lz4")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _arrow(self, name: str, schema: pa.Schema, compression: str | None) -> Any:
        file = self._stack.enter_context((self._directory / name).open("wb"))
        options = pa.ipc.IpcWriteOptions(compression=compression)
        return self._stack.enter_context(pa.ipc.new_file(file, schema, options=options))

    def add_or_reject(self, cleaned: list[tuple[Document | Rejected, int]]) -> None:
        """Take what is left of a batch, each with the number of its part."""
        documents: list[Document] = []
        pieces: list[int] = []
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
        if self._rejects is not None:
            document = rejected.document
            row = {"id": document.id, "source": document.source, "reason": rejected.reason, "text": document.text}
            self._rejects.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _add(self, documents: list[Document], pieces: list[int]) -> None:
        """Hash, count and tokenize a batch, and write what came of it."""
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
        columns = [
            pa.array([document.id for document in documents], pa.string()),
            pa.array([document.source for document in documents], pa.string()),
            pa.array([document.domain for document in documents], pa.string()),
            *(pa.array(row, pa.int64()) for row in numbers),
            pa.array(hashes, pa.binary(16)),
            pa.array(positions),
            pa.array(pieces, pa.int32()),
        ]
        self._documents.write_batch(pa.record_batch(columns, schema=DOCUMENTS_SCHEMA))
        self._keep_texts(texts, positions)
        if settings.with_signatures:
            self._signatures.append(signatures([document.text for document in documents]))
        self._num_documents += len(documents)
        self._text_bytes += int(numbers[1].sum())

    def _add_long(self, text: str) -> np.ndarray:
        """A text that is too long to be encoded at once: the sums of its pieces, shape (4, 1)."""
        sums = np.zeros(4, np.int64)
        last = " "
        for piece in cut(iter([text])):
            ids, num_tokens, counts = self._encoder.encode([piece.encode("utf-8")])
            self._write_ids(ids)
            sums += np.concatenate([num_tokens, counts.num_bytes, counts.num_chars, counts.num_words])
            sums[3] -= not (last.isspace() or piece[0].isspace())  # a word that had to be cut counts once
            last = piece[-1]
        return sums[:, None]

    def _write_ids(self, ids: np.ndarray) -> None:
        self._tokens.write(np.ascontiguousarray(ids, np.dtype(self.task.settings.dtype)).view(np.uint8).data)
        self._num_tokens += len(ids)

    def _keep_texts(self, texts: list[bytes], positions: np.ndarray) -> None:
        """Keep the texts that may be held out, and that of the lowest position: a side must not be empty."""
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
        """Write what is held; the files are closed by the context."""
        if self._lowest is not None:
            self._write_texts(np.array([self._lowest[1]]), [self._lowest[2]])
        if self.task.settings.with_signatures:
            none = signatures([])
            save_signatures(self._directory / "signatures.npy", np.concatenate([none, *self._signatures]))
        self._stack.close()
        return ShardResult(
            number=self.task.shard.number,
            num_bytes=self.task.shard.num_bytes,
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            text_bytes=self._text_bytes,
            read={**vars(read), "skipped": dict(read.skipped)},
            rejected=dict(self._rejected),
        )
