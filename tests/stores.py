"""Stores whose documents are put on either side by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from cartilha.corpus.document import Document
from cartilha.corpus.splits import Split
from cartilha.tokens.store_writer import ROW_SCHEMA, StoreWriter


def add_documents(writer: StoreWriter, split: Split, documents: Sequence[Document]) -> None:
    """Tokenize documents and append them to one side, each in a cluster of its own."""
    ids = writer.tokenizer.encode([document.text for document in documents])
    first = sum(counts.num_documents for counts in writer.counts().values())
    rows = [
        {
            "doc_id": document.id,
            "source": document.source,
            "domain": document.domain,
            "num_tokens": len(document_ids),
            "num_bytes": len(document.text.encode("utf-8")),
            "num_chars": len(document.text),
            "num_words": len(document.text.split()),
            "text_hash": document.text_hash,
            "cluster": first + number,
        }
        for number, (document, document_ids) in enumerate(zip(documents, ids, strict=True))
    ]
    writer.splits[split].add_rows(pa.Table.from_pylist(rows, schema=ROW_SCHEMA))
    for document, document_ids in zip(documents, ids, strict=True):
        writer.splits[split].add_tokens(document_ids)
        if split == "validation":
            writer.splits[split].add_text(document.text_hash, document.text.encode("utf-8"))
