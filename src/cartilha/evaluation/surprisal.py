"""Surprisal of a few documents' first tokens at each evaluation of a run: surprisal.parquet, for the report.

What a document's first tokens cost does not depend on the rest, so only they are scored: some tens of kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartilha.evaluation.documents import ScoredDocuments
from cartilha.evaluation.nll import TokenRows, score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.machine.processes import is_main_process
from cartilha.storage import new_file
from cartilha.tokens.tokenizer import TextTokenizer

NUM_DOCUMENTS = 4
MAX_TOKENS = 160  # of each document: as much as a reader takes in
LEAST_TOKENS = 24  # a shorter text shows little, and is taken only where there are no longer ones
NUM_LIKELIEST = 5

SURPRISAL_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("document", pa.int32()),
        ("doc_id", pa.string()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("text", pa.string()),
        ("nll", pa.float32()),
        ("entropy", pa.float32()),
        ("rank", pa.int32()),
        ("likeliest_ids", pa.list_(pa.int32())),
        ("likeliest_texts", pa.list_(pa.string())),
        ("likeliest_probabilities", pa.list_(pa.float32())),
    ]
)


def shown_documents(documents: ScoredDocuments) -> ScoredDocuments:
    """The first tokens of a few documents, of different domains as far as there are any.

    The choice depends on the texts alone: runs over the same store show the same ones.
    """
    num_before: dict[tuple[str, bool], int] = {}
    turns = []
    for i in sorted(range(len(documents.ids)), key=lambda i: documents.text_hashes[i]):
        short = len(documents.ids[i]) < LEAST_TOKENS
        turn = num_before.get((documents.domains[i], short), 0)  # the first text of each domain, then the second ...
        turns.append((short, turn, documents.text_hashes[i], i))
        num_before[documents.domains[i], short] = turn + 1
    chosen = documents.taken(np.array([i for *_, i in sorted(turns)[:NUM_DOCUMENTS]], np.int64))
    return chosen.with_ids([ids[:MAX_TOKENS] for ids in chosen.ids])


def token_texts(tokenizer: TextTokenizer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text that each token adds to the ones before it.

    A token that ends inside a character adds nothing, and the token that completes the character adds all of it.
    """
    texts: list[str] = []
    known = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        unfinished = text.endswith("\ufffd") and end < len(ids)
        texts.append("" if unfinished else text[len(known) :])
        known = known if unfinished else text
    return texts


def add_surprisal(path: Path, step: int, scorer: Scorer, documents: ScoredDocuments) -> None:
    """Score each token of what `shown_documents` chose and append it to surprisal.parquet (the main process does).

    Rows of this step or of a later one (from before a resume) are replaced.
    """
    parts: list[TokenRows] = []
    score_documents(scorer, documents, take_rows=parts.append, num_likeliest=NUM_LIKELIEST)
    if not is_main_process():
        return
    table = _table(step, parts, scorer.tokenizer, documents)
    if path.is_file():
        old = pq.read_table(path, schema=SURPRISAL_SCHEMA)
        table = pa.concat_tables([old.filter(pa.compute.less(old["step"], step)), table])
    with new_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _table(step: int, parts: list[TokenRows], tokenizer: TextTokenizer, documents: ScoredDocuments) -> pa.Table:
    columns = {one.name: np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(TokenRows)}
    order = np.lexsort((columns["position"], columns["document"]))
    rows = {name: column[order] for name, column in columns.items()}
    shown = np.unique(rows["likeliest_ids"]).tolist()
    texts = dict(zip(shown, tokenizer.decode_each(shown), strict=True))
    likeliest_ids = rows["likeliest_ids"].tolist()
    values = {
        **rows,
        "step": np.full(len(order), step),
        "doc_id": [documents.doc_ids[i] for i in rows["document"]],
        "text": [text for ids in documents.ids for text in token_texts(tokenizer, ids)],
        "likeliest_ids": likeliest_ids,
        "likeliest_texts": [[texts[i] for i in row] for row in likeliest_ids],
        "likeliest_probabilities": rows["likeliest"].tolist(),
    }
    return pa.table({field.name: pa.array(values[field.name], field.type) for field in SURPRISAL_SCHEMA})
