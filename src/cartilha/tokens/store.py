"""The token store: memory-mapped files of tokens, a table of documents, and a record of how they were made.

store.json                       format version, tokenizer, dtype, counts, settings, hashes of the files below
{train,validation}.tokens        little-endian uint16 (uint32 above 65,536 ids), text tokens only, documents in order
{train,validation}.documents.parquet
validation.text.parquet          the evaluation text itself
tokenizer/                       the exact files
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cartilha.corpus.document import Document
from cartilha.corpus.splits import SPLITS, Split
from cartilha.languages import DEFAULT, find_language
from cartilha.tokens.packed import PackedDocuments
from cartilha.tokens.store_checks import LABELS, NUMBERS, map_ids, read_store_info, verify_store
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer


@dataclass(frozen=True)
class SplitCounts:
    """What one side of the split holds; `store_checks.COUNTS` names the numbers."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_chars: int
    num_words: int
    corpus_hash: str


@dataclass(frozen=True)
class DocumentTable:
    """The numbers of a split's documents, one entry per document, in the store's order: arrays of int64.

    `start` is the index of the first token in the token file. Bytes are those of UTF-8, characters are code points, and
    words are what white space separates.
    """

    start: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    num_chars: np.ndarray
    num_words: np.ndarray


class TokenStore:
    """A finished store, opened; a UserError if it fails the checks of `store_checks`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.info = read_store_info(self.path)
        verify_store(self.path, self.info)
        self.counts = {split: SplitCounts(**self.info["splits"][split]) for split in SPLITS}
        self.fingerprint: str = self.info["tokenizer_fingerprint"]
        self.prefix_id: int = self.info["prefix_id"]
        self.end_id: int = self.info["end_id"]
        self.num_ids: int = self.info["num_ids"]

    @property
    def language(self) -> dict[str, Any]:
        """The language of the text, as it was given: code, names, prompts; a store that says none is older."""
        recorded: dict[str, Any] | None = self.info.get("language")
        return recorded or find_language(DEFAULT).to_dict()

    def tokens(self, split: Split) -> np.ndarray:
        """The split's tokens, memory-mapped, shape (num_tokens,)."""
        return map_ids(self.path / f"{split}.tokens", np.dtype(self.info["dtype"]).newbyteorder("<"))

    def documents(self, split: Split) -> DocumentTable:
        """The numbers of the split's documents."""
        table = pq.read_table(self.path / f"{split}.documents.parquet", columns=list(NUMBERS))
        return DocumentTable(**{name: table[name].to_numpy() for name in NUMBERS})

    def packed(self, split: Split) -> PackedDocuments:
        """The split's documents for packing: their tokens, memory-mapped, with the store's prefix and end ids."""
        table = self.documents(split)
        return PackedDocuments(self.tokens(split), table.start, table.num_tokens, self.prefix_id, self.end_id)

    def labels(self, split: Split, names: Sequence[str] = LABELS, first: int = 0) -> dict[str, list[Any]]:
        """Labels of the split's documents from number `first` on, by name."""
        path = self.path / f"{split}.documents.parquet"
        return dict(pq.read_table(path, columns=list(names)).slice(first).to_pydict())

    def where(self, split: Split, name: str, values: Sequence[str]) -> np.ndarray:
        """Which of the split's documents have one of these values as their label `name`: booleans."""
        labels = pq.read_table(self.path / f"{split}.documents.parquet", columns=[name])[name]
        return np.asarray(pc.is_in(labels, value_set=pa.array(values, pa.string())))

    def read_documents(self, split: Split, first: int = 0) -> Iterator[Document]:
        """The documents of a split from number `first` on, streamed; training text is decoded from its tokens."""
        labels = self.labels(split, LABELS[:3], first)  # in the order of a document's fields
        yield from map(Document, self.texts(split, first), *labels.values())

    def texts(self, split: Split, first: int = 0) -> Iterator[str]:
        """The texts alone."""
        if split == "validation":
            for batch in pq.ParquetFile(self.path / "validation.text.parquet").iter_batches(1024, columns=["text"]):
                yield from batch["text"][min(first, len(batch)) :].to_pylist()
                first = max(0, first - len(batch))
            return
        documents, tokenizer = self.packed(split), self.tokenizer()
        for begin in range(first, len(documents), 1024):
            rows = range(begin, min(begin + 1024, len(documents)))
            yield from tokenizer.decode_batch([documents.ids(row) for row in rows])

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that the store was made with."""
        return load_tokenizer(str(self.path / "tokenizer"))


def tokenizer_for(ref: str, store: TokenStore | None) -> TextTokenizer:
    """The tokenizer of a MODEL argument; random: models without one take the store's."""
    if store is not None and ref.startswith("random:") and not ref.startswith("random:tiny"):
        return store.tokenizer()
    return load_tokenizer(ref)


def batches(
    documents: Iterable[Document], max_chars: int = 4_000_000, max_documents: int = 10_000
) -> Iterator[list[Document]]:
    """Group documents so that the tokenizer has work for all cores and memory stays bounded."""
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        if batch and len(document.text) > max_chars:  # a long document is a batch of its own
            yield batch
            batch, num_chars = [], 0
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= max_chars or len(batch) >= max_documents:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
