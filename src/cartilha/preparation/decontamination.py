"""`--decontaminate`: whose questions are looked for, and what `prepare` says and records of those that it finds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from typing import Any

from cartilha.corpus.lines import without_surrogates
from cartilha.corpus.questions import LEAST_WORDS, Question, QuestionRuns, is_task_file, record_texts
from cartilha.corpus.readers import read_raw
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.sources import Source, resolve_inputs
from cartilha.errors import UserError, counted, log, missing_extra
from cartilha.preparation.shard_work import CONTAMINATED_FILE, LISTED_CONTAMINATED, ShardResult, ShardTask

_TASK = re.compile(r"[\w+-]+")


@dataclass(frozen=True)
class QuestionNames:
    """Where questions are: files and datasets, and tasks of lm-evaluation-harness (names, or YAML files)."""

    sources: tuple[Source, ...] = ()
    tasks: tuple[str, ...] = ()
    option: str = "--decontaminate"

    @classmethod
    def of(cls, names: Sequence[str], option: str = "--decontaminate") -> QuestionNames:
        """Tell tasks from REFs; a UserError says that a name is neither."""
        tasks = tuple(name for name in names if _is_task(name))
        for task in tasks:
            if is_task_file(task) and not os.path.isfile(task):
                raise UserError(f"There is no task file {task}; give a YAML file, a task's name, or a text.")
        if tasks and find_spec("lm_eval") is None:
            raise missing_extra(f"There is no file {tasks[0]!r}, and a task of lm-evaluation-harness", "eval")
        return cls(tuple(resolve_inputs([name for name in names if name not in tasks])), tasks, option)


def _is_task(name: str) -> bool:
    return is_task_file(name) or (bool(_TASK.fullmatch(name)) and name != "primer" and not os.path.lexists(name))


def file_questions(sources: Iterable[Source], reading: ReadSettings) -> Iterator[Question]:
    """The questions in files and datasets: a record each, with all its texts (of a table, the text's column)."""
    settings = replace(reading, domain_column=None, on_error="stop")
    for source in sources:
        name = source.name
        for place, record in read_raw(source, settings):
            yield Question(name, place, tuple(map(without_surrogates, record_texts(record))))


def question_runs(questions: Iterable[Question], option: str) -> QuestionRuns:
    """The runs of words of questions, with notices of what is not looked for; a UserError says that there are none."""
    runs = QuestionRuns.of(questions)
    for benchmark in runs.benchmarks:
        if benchmark.num_common_runs:
            runs_of_words = counted(benchmark.num_common_runs, "passage", "is", "are")
            log.info("%s: %s left aside, which many questions share, as instructions.", benchmark.name, runs_of_words)
        if benchmark.num_too_short:
            short = counted(benchmark.num_too_short, "question", "has", "have")
            log.warning("%s: %s no text of %d words of its own; not looked for.", benchmark.name, short, LEAST_WORDS)
    if not len(runs.keys):
        raise UserError(f"{option} names no text of {LEAST_WORDS} words or more; name a benchmark's questions.")
    return runs


def found_questions(runs: QuestionRuns, done: Sequence[tuple[ShardTask, ShardResult]]) -> dict[str, Any]:
    """Which questions the shards held, as store.json records it: figures of benchmarks, and the first documents."""
    numbers = {number for _, result in done for number in result.questions}
    documents = (row for task, _ in done for row in json.loads((task.directory / CONTAMINATED_FILE).read_bytes()))
    return {
        "benchmarks": runs.found(numbers),
        "documents": list(islice(documents, LISTED_CONTAMINATED)),
    }
