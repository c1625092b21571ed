"""Surprisal of every token of a few documents at each evaluation of a run: surprisal.parquet, for the report.

Scored by the same code and protocol as the figures. A document's first tokens have the same left context whether the
rest is scored or not, so only they are kept: some tens of kilobytes an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartilha.evaluation.documents import ScoredDocuments
from cartilha.evaluation.nll import TokenRows, score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.storage import new_file
from cartilha.tokens.tokenizer import TextTokenizer

NUM_DOCUMENTS = 4
MAX_TOKENS = 160  # of each: what a reader takes in
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
    """Score each token and append it to the file; rows of this step or a later one (before a resume) are replaced.

    Args:
        path: surprisal.parquet.
        step: Of the run, which the model is at.
        scorer: The run's.
        documents: What `shown_documents` chose.
    """
    parts: list[TokenRows] = []
    score_documents(scorer, documents, take_rows=parts.append, num_likeliest=NUM_LIKELIEST)
    table = _table(step, parts, scorer.tokenizer, documents)
    if path.is_file():
        old = pq.read_table(path, schema=SURPRISAL_SCHEMA)
        table = pa.concat_tables([old.filter(pa.compute.less(old["step"], step)), table])
    with new_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _table(step: int, parts: list[TokenRows], tokenizer: TextTokenizer, documents: ScoredDocuments) -> pa.Table:
    """The rows in the order of the documents."""
    document, position, nll, entropy, rank, likeliest_ids, likeliest = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("document", "position", "nll", "entropy", "rank", "likeliest_ids", "likeliest")
    )
    order = np.lexsort((position, document))
    shown = np.unique(likeliest_ids).tolist()
    texts = dict(zip(shown, tokenizer.decode_each(shown), strict=True))
    columns = {
        "step": np.full(len(order), step),
        "document": document[order],
        "doc_id": [documents.doc_ids[i] for i in document[order]],
        "position": position[order],
        "token_id": np.concatenate(documents.ids),
        "text": [text for ids in documents.ids for text in token_texts(tokenizer, ids)],
        "nll": nll[order],
        "entropy": entropy[order],
        "rank": rank[order],
        "likeliest_ids": likeliest_ids[order].tolist(),
        "likeliest_texts": [[texts[i] for i in row] for row in likeliest_ids[order].tolist()],
        "likeliest_probabilities": likeliest[order].tolist(),
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in SURPRISAL_SCHEMA})
