"""Evaluations on disk: one row a document (for `compare`), one row a token (for the report and the explorer)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartilha.errors import UserError
from cartilha.storage import new_file, refuse_lfs_pointer, to_json

if TYPE_CHECKING:  # they import torch, and a missing file is to be named before that
    from cartilha.evaluation.documents import ScoredDocuments
    from cartilha.evaluation.nll import TokenRows

METADATA_KEY = b"cartilha.evaluation"

DOCUMENT_SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("domain", pa.string()),
        ("text_hash", pa.string()),
        ("nll", pa.float64()),
        ("num_tokens", pa.int64()),
        ("num_bytes", pa.int64()),
        ("round_trips", pa.bool_()),
    ]
)
TOKEN_SCHEMA = pa.schema(
    [
        ("model", pa.dictionary(pa.int32(), pa.string())),
        ("document", pa.int64()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("nll", pa.float32()),
        ("entropy", pa.float32()),
        ("rank", pa.int32()),
    ]
)


@dataclass(frozen=True)
class SavedEvaluation:
    """One model's nll by document.

    Attributes:
        record: What `evaluate --json` gives for the model.
        doc_ids: Of each document; likewise domains and text_hashes.
        nll: Nats, float64, shape (num_documents,).
        num_bytes: UTF-8 bytes scored, int64.
        round_trips: Whether the document survives decode(encode(text)).
    """

    record: dict[str, Any]
    doc_ids: list[str]
    domains: list[str]
    text_hashes: list[str]
    nll: np.ndarray
    num_bytes: np.ndarray
    round_trips: np.ndarray


def saved_evaluation(record: dict[str, Any], documents: ScoredDocuments, nll: np.ndarray) -> SavedEvaluation:
    """An evaluation as it would be saved."""
    return SavedEvaluation(
        record,
        documents.doc_ids,
        documents.domains,
        documents.text_hashes,
        nll,
        documents.num_bytes,
        documents.round_trips,
    )


def save_evaluation(path: Path, record: dict[str, Any], documents: ScoredDocuments, nll: np.ndarray) -> None:
    """Write a model's nll by document, its record in the file's metadata."""
    table = pa.table(
        {
            "doc_id": documents.doc_ids,
            "domain": documents.domains,
            "text_hash": documents.text_hashes,
            "nll": nll,
            "num_tokens": documents.num_tokens,
            "num_bytes": documents.num_bytes,
            "round_trips": documents.round_trips,
        },
        schema=DOCUMENT_SCHEMA.with_metadata({METADATA_KEY: to_json(record).encode("utf-8")}),
    )
    with new_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def load_evaluation(path: Path) -> SavedEvaluation:
    """Read what `save_evaluation` wrote.

    Raises:
        UserError: There is no such file, or it is something else.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; write one with: cartilha evaluate --model M --store S --save {path}")
    refuse_lfs_pointer(path)
    try:
        table = pq.read_table(path)
        record = json.loads(table.schema.metadata[METADATA_KEY])
        columns = {name: table[name] for name in DOCUMENT_SCHEMA.names}
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        # Not with this path: it may hold something dear.
        raise UserError(f"{path} is no saved evaluation; write one with: cartilha evaluate --save FILE") from error
    return SavedEvaluation(
        record,
        columns["doc_id"].to_pylist(),
        columns["domain"].to_pylist(),
        columns["text_hash"].to_pylist(),
        columns["nll"].to_numpy(),
        columns["num_bytes"].to_numpy(),
        columns["round_trips"].to_numpy(),
    )


class TokenFile:
    """Collects the tokens of one or more models into a parquet file, a row group a forward pass."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer

    def add(self, model: str, rows: TokenRows) -> None:
        """Append the tokens of a forward pass."""
        names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(rows.nll), np.int32)), pa.array([model]))
        columns = [names, rows.document, rows.position, rows.token_id, rows.nll, rows.entropy, rows.rank]
        typed = [
            column if isinstance(column, pa.DictionaryArray) else pa.array(column, type=field.type)
            for column, field in zip(columns, TOKEN_SCHEMA, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays(typed, schema=TOKEN_SCHEMA))


@contextmanager
def token_file(path: Path) -> Iterator[TokenFile]:
    """A file of tokens that appears, whole, when the block ends.

    Columns: model, document (number in the corpus, from 0, empty documents counted), position (from 0), token_id, nll
    and entropy in nats, rank (1 = likeliest). Rows are in the order of scoring, not of the corpus.
    """
    with new_file(path) as temporary, pq.ParquetWriter(temporary, TOKEN_SCHEMA, compression="zstd") as writer:
        yield TokenFile(writer)
