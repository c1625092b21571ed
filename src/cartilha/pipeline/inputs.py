"""The text that `--input` names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from cartilha.config import VocabConfig
from cartilha.corpus.document import Document
from cartilha.corpus.readers import read_documents
from cartilha.corpus.records import ReadSettings
from cartilha.errors import UserError


def input_documents(config: VocabConfig) -> Iterator[Document]:
    """The documents, in order, streamed.

    Raises:
        UserError: There is none.
    """
    is_empty = True
    for document in islice(read_documents(config.input, ReadSettings.of(config)), config.limit_documents):
        yield document
        is_empty = False
    if is_empty:
        raise no_text(config.input)


def no_text(refs: Sequence[str]) -> UserError:
    """The error for an input without a document."""
    return UserError(f"The input holds no text ({', '.join(refs)}); check the files and --text_column.")
