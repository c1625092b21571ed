"""The questions of benchmarks that a command names: of files, of datasets, of lm-evaluation-harness."""

from __future__ import annotations

from itertools import chain

from cartilha.corpus.questions import QuestionRuns
from cartilha.corpus.records import ReadSettings
from cartilha.preparation.decontamination import QuestionNames, file_questions, question_runs


def named_questions(names: QuestionNames, reading: ReadSettings) -> QuestionRuns | None:
    """What is to be looked for; None if nothing is named. A UserError says that there is no such text or task."""
    if not (names.sources or names.tasks):
        return None
    questions = file_questions(names.sources, reading)
    if names.tasks:
        from cartilha.evaluation.downstream import task_questions  # torch takes seconds

        questions = chain(questions, task_questions(names.tasks))
    return question_runs(questions, names.option)
