"""How many of some benchmarks' questions are in the text that a model is trained on."""

from __future__ import annotations

import time
from typing import Any

from cartilha.corpus.questions import Contaminated, QuestionFinder, QuestionRuns
from cartilha.tokens.store import TokenStore, batches

SEARCH_SECONDS = 60.0
SEARCHED_CHARS = 1 << 20


def questions_in(store: TokenStore, runs: QuestionRuns) -> dict[str, Any]:
    """How many questions of each benchmark the store's training side holds, by the rule of `prepare --decontaminate`.

    The search ends after `SEARCH_SECONDS`; `num_searched` says how many documents it has seen.
    """
    find, numbers, num_searched = QuestionFinder(runs), set[int](), 0
    deadline = time.monotonic() + SEARCH_SECONDS
    for batch in batches(store.read_documents("train"), SEARCHED_CHARS):
        for document in find(batch):
            numbers.update(document.questions if isinstance(document, Contaminated) else ())
        num_searched += len(batch)
        if time.monotonic() > deadline:
            break
    num_documents = store.counts["train"].num_documents
    return {"benchmarks": runs.found(numbers), "num_searched": num_searched, "num_documents": num_documents}
