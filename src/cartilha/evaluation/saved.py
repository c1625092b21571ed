"""Evaluations on disk: a row per document (for `compare`), or a row per token (for the report and the explorer)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartilha.errors import UserError
from cartilha.storage import new_file, refuse_lfs_pointer, to_json

if TYPE_CHECKING:  # these import torch, and a missing file is named before that
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
    """One model's nll by document, the columns in the order of `DOCUMENT_SCHEMA`.

    `record` is what `evaluate --json` gives for the model; the columns are those of `ScoredDocuments`, the nll in nats.
    """

    record: dict[str, Any]
    doc_ids: list[str]
    domains: list[str]
    text_hashes: list[str]
    nll: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    round_trips: np.ndarray

    @classmethod
    def of(cls, record: dict[str, Any], documents: ScoredDocuments, nll: np.ndarray) -> SavedEvaluation:
        """The evaluation of these documents."""
        columns = {one.name: getattr(documents, one.name) for one in fields(cls) if one.name not in ("record", "nll")}
        return cls(record=record, nll=nll, **columns)


def save_evaluation(path: Path, evaluation: SavedEvaluation) -> None:
    """Write a model's nll by document, its record in the file's metadata."""
    record, *columns = (getattr(evaluation, one.name) for one in fields(evaluation))
    schema = DOCUMENT_SCHEMA.with_metadata({METADATA_KEY: to_json(record).encode("utf-8")})
    with new_file(path) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary, compression="zstd")


def load_evaluation(path: Path) -> SavedEvaluation:
    """Read what `save_evaluation` wrote, or a UserError says that it is missing or something else."""
    if not path.is_file():
        raise UserError(f"There is no file {path}; write one with: cartilha evaluate --model M --store S --save {path}")
    refuse_lfs_pointer(path)
    try:
        table = pq.read_table(path)
        record = json.loads(table.schema.metadata[METADATA_KEY])
        columns = [table[name] for name in DOCUMENT_SCHEMA.names]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        # The message does not suggest this path, since the file may hold something valuable.
        raise UserError(f"{path} is no saved evaluation; write one with: cartilha evaluate --save FILE") from error
    is_text = [pa.types.is_string(field.type) for field in DOCUMENT_SCHEMA]
    values = [column.to_pylist() if text else column.to_numpy() for column, text in zip(columns, is_text, strict=True)]
    return SavedEvaluation(record, *values)


@contextmanager
def token_file(path: Path) -> Iterator[Callable[[str, TokenRows], None]]:
    """A function that writes a model's tokens to a file, which appears, whole, when the block ends.

    Columns: model, document (number in the corpus, from 0, empty documents counted), position (from 0), token_id, nll
    and entropy in nats, rank (1 = likeliest). Rows are in the order of scoring, not of the corpus; a row group is what
    one call adds.
    """
    with new_file(path) as temporary, pq.ParquetWriter(temporary, TOKEN_SCHEMA, compression="zstd") as writer:

        def add(model: str, rows: TokenRows) -> None:
            names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(rows.nll), np.int32)), pa.array([model]))
            columns = [pa.array(getattr(rows, field.name), field.type) for field in list(TOKEN_SCHEMA)[1:]]
            writer.write_table(pa.Table.from_arrays([names, *columns], schema=TOKEN_SCHEMA))

        yield add
