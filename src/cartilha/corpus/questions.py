"""Benchmark questions in a text: documents that hold a run of words of a question.

Words are those of the near-duplicates (`signatures`): letters and digits, in lower case and NFC. Thirteen words in a
row are a question's (Brown et al. 2020, arXiv:2005.14165, appendix C). A shorter text of a question is looked for as a
whole if it has eight words or more. A still shorter one is not, because ordinary text says the same by chance.

To compare every run would take longer than the tokenizer. The initials of eight words in a row, which are the eight
bytes of one number, tell nearly all runs of other texts apart. Words are compared only where the initials are alike.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cartilha.corpus.cleaning import Rejected
from cartilha.corpus.document import Document
from cartilha.corpus.signatures import ODD, blocks, lower_case, word_bounds

RUN_WORDS, LEAST_WORDS = 13, 8
# A run that more of a benchmark's questions share belongs to the instructions: at least so many, and such a share.
MAX_SHARING, MAX_SHARING_SHARE = 10, 0.05
BLOCK_CHARS = 1 << 18  # looked through at once; the arrays stay in the processor's cache
TABLE_BITS = range(16, 27)  # of the number of initials that are told apart: up to 64 MB in each process

# The initial of a word, by its first byte: case does not count, and letters beyond ASCII are not told apart.
_INITIALS = np.array([min(byte | 0x20 if chr(byte).isalpha() else byte, 128) for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class Question:
    """What a benchmark asks: a record's texts (context, question, options, answer), each compared by itself."""

    benchmark: str
    id: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """The figures of a benchmark."""

    name: str
    num_questions: int
    num_too_short: int  # that have no text of `LEAST_WORDS`, so that they are not looked for
    num_common_runs: int  # runs that many questions share


def is_task_file(task: str) -> bool:
    """Whether a task is given by a YAML file of the user's (with `data_files` of its own, say), not by its name."""
    return Path(task).suffix in (".yaml", ".yml")


def record_texts(record: object) -> Iterator[str]:
    """The texts in a record, however deep in lists and mappings."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, Mapping):
        for value in record.values():
            yield from record_texts(value)
    elif isinstance(record, list | tuple):
        for value in record:
            yield from record_texts(value)


def _words(texts: Sequence[str]) -> list[list[bytes]]:
    """The words of each text, as they are compared."""
    lowered = lower_case(texts)
    data = b"\n".join(lowered)
    starts, ends = word_bounds(data)
    words = [data[begin:end] for begin, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    firsts = np.searchsorted(starts, np.cumsum([0, *(len(text) + 1 for text in lowered)])).tolist()
    return [words[first:last] for first, last in pairwise(firsts)]


def _key(words: Sequence[bytes]) -> int:
    return int.from_bytes(hashlib.sha256(b" ".join(words)).digest()[:8], "little")


def _runs(question: Question) -> dict[int, tuple[int, int]]:
    """The runs that are looked for: from each one's key to its number of words and its initials."""
    found = {}
    for words in _words(question.texts):
        size = min(RUN_WORDS, len(words))
        for begin in range(len(words) - size + 1 if size >= LEAST_WORDS else 0):
            run = words[begin : begin + size]
            initials = bytes(_INITIALS[[word[0] for word in run[:LEAST_WORDS]]])
            found[_key(run)] = size, int.from_bytes(initials, "little")
    return found


class QuestionRuns:
    """The runs of all questions of some benchmarks, for any process to look for.

    Attributes:
        benchmarks: What they hold, in the order given.
        ids: The questions' ids, of one benchmark after the other.
        keys: The keys of all runs, sorted, uint64, with `owners`, the number of the question of each, int32.
        initials: The initials of the runs, each once, uint64.
        sizes: The numbers of words that runs have.
    """

    def __init__(self, benchmarks: Sequence[Benchmark], ids: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        self.benchmarks, self.ids = tuple(benchmarks), tuple(ids)
        self._arrays = {name: arrays[name] for name in ("keys", "owners", "initials", "sizes")}
        self.keys, self.owners, self.initials, sizes = self._arrays.values()
        self.sizes = tuple(sizes.tolist())
        self._ends = np.cumsum([benchmark.num_questions for benchmark in benchmarks])

    @classmethod
    def of(cls, questions: Iterable[Question]) -> QuestionRuns:
        """The runs of questions, those of one benchmark in a row."""
        by_benchmark: dict[str, list[Question]] = {}
        for question in questions:
            by_benchmark.setdefault(question.benchmark, []).append(question)
        benchmarks, ids, parts = [], list[str](), [np.zeros((0, 4), np.uint64)]
        for name, own in by_benchmark.items():
            runs = [_runs(question) for question in own]
            rows = [(key, len(ids) + i, *run) for i, found in enumerate(runs) for key, run in found.items()]
            table = np.array(rows, np.uint64).reshape(-1, 4)
            _, where, sharing = np.unique(table[:, 0], return_inverse=True, return_counts=True)
            is_common = sharing > max(MAX_SHARING, MAX_SHARING_SHARE * len(own))
            parts.append(table[~is_common[where]])
            num_left = len(np.unique(parts[-1][:, 1]))
            benchmarks.append(Benchmark(name, len(own), len(own) - num_left, int(is_common.sum())))
            ids += [question.id for question in own]
        table = np.concatenate(parts)
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        arrays: dict[str, np.ndarray] = {
            "keys": table[:, 0].copy(),
            "owners": table[:, 1].astype(np.int32),
            "initials": np.unique(table[:, 3]),
            "sizes": np.unique(table[:, 2]),
        }
        return cls(benchmarks, ids, arrays)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what is found."""
        digest = hashlib.sha256(repr((self.benchmarks, self.ids)).encode("utf-8", "surrogatepass"))
        for values in self._arrays.values():
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:32]

    def benchmark_of(self, question: int) -> str:
        """The name of the benchmark of a question, given by its number."""
        return self.benchmarks[int(np.searchsorted(self._ends, question, side="right"))].name

    def found(self, questions: Iterable[int]) -> list[dict[str, Any]]:
        """The figures of the benchmarks, with how many of their questions were found, given by distinct numbers."""
        num_found = Counter(map(self.benchmark_of, questions))
        return [{**vars(benchmark), "num_found": num_found[benchmark.name]} for benchmark in self.benchmarks]

    def save(self, path: Path) -> None:
        """Write the runs for `load_runs`."""
        labels = json.dumps({"benchmarks": [vars(one) for one in self.benchmarks], "ids": self.ids})
        arrays: dict[str, Any] = {"labels": np.frombuffer(labels.encode("ascii"), np.uint8), **self._arrays}
        with path.open("wb") as file:
            np.savez(file, **arrays)


def load_runs(path: Path) -> QuestionRuns:
    """What `QuestionRuns.save` wrote."""
    with np.load(path) as arrays:
        labels: dict[str, Any] = json.loads(bytes(arrays["labels"]))
        return QuestionRuns([Benchmark(**values) for values in labels["benchmarks"]], labels["ids"], arrays)


@dataclass(frozen=True)
class Contaminated(Rejected):
    """A document with the words of questions, which are given by number; `span` is the first run that was found."""

    questions: tuple[int, ...]
    span: str


class QuestionFinder:
    """Finds the documents that hold a run of a question."""

    def __init__(self, runs: QuestionRuns) -> None:
        self.runs = runs
        bits = min(max(TABLE_BITS[0], 5 + len(runs.initials).bit_length()), TABLE_BITS[-1])
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[(runs.initials * ODD) >> self._shift] = True

    def __call__(self, documents: Sequence[Document]) -> list[Document | Rejected]:
        """Each document, or what it holds of the questions."""
        result: list[Document | Rejected] = list(documents)
        found: dict[int, tuple[set[int], str]] = {}
        texts = [document.text for document in documents]
        for begin, end in blocks(texts, BLOCK_CHARS):
            for number, owners, span in self._matches(texts[begin:end]):
                found.setdefault(begin + number, (set(), span))[0].update(owners)
        for number, (questions, span) in found.items():
            reason = f"contaminated:{self.runs.benchmark_of(min(questions))}"
            result[number] = Contaminated(documents[number], reason, tuple(sorted(questions)), span)
        return result

    def _matches(self, texts: Sequence[str]) -> Iterator[tuple[int, list[int], str]]:
        """The runs of questions in texts: the text's number, the questions' numbers, and the run as it is written."""
        data = "\n".join(texts).encode("utf-8")
        if b"\xcc" in data or b"\xcd" in data:  # the first bytes of U+0300 to U+036F, accents apart from their letters
            texts = [unicodedata.normalize("NFC", text) for text in texts]
            data = "\n".join(texts).encode("utf-8")
        starts, ends = word_bounds(data)
        hits = self._candidates(np.frombuffer(data, np.uint8), starts)
        if not len(hits):
            return
        places = np.cumsum([len(data[begin:end].decode("utf-8")) for begin, end in pairwise([0, *starts[hits]])])
        bounds = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1)
        numbers = np.searchsorted(bounds, places, side="right")
        lasts = ends[np.minimum(hits + RUN_WORDS, len(ends)) - 1]
        pieces = [data[begin:end].decode("utf-8") for begin, end in zip(starts[hits], lasts, strict=True)]
        left = (bounds[numbers] - places).tolist()  # a run ends with its text
        pieces = [piece[:size] for piece, size in zip(pieces, left, strict=True)]
        for hit, number, words in zip(hits.tolist(), numbers.tolist(), _words(pieces), strict=True):
            for size in self.runs.sizes:
                if size <= len(words) and (owners := self._owners(words[:size])):
                    yield number, owners, data[starts[hit] : ends[hit + size - 1]].decode("utf-8")

    def _candidates(self, data: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The numbers of the words at which a run of a question may begin."""
        initials = _INITIALS[data[starts]].astype(np.uint64)
        for num_words in (1, 2, 4):  # joined to pairs, fours, eights
            shift = np.uint64(8 * num_words)
            initials = initials[:-num_words] | (initials[num_words:] << shift)
        hits = np.flatnonzero(self._table[(initials * ODD) >> self._shift])  # a few per cent
        places = np.searchsorted(self.runs.initials[:-1], initials[hits])
        found: np.ndarray = hits[self.runs.initials[places] == initials[hits]]
        return found

    def _owners(self, words: Sequence[bytes]) -> list[int]:
        key = np.uint64(_key(words))
        begin, end = np.searchsorted(self.runs.keys, key), np.searchsorted(self.runs.keys, key, side="right")
        owners: list[int] = self.runs.owners[begin:end].tolist()
        return owners
