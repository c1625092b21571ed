"""The record that all stages pass on: a document."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its origin.

    Attributes:
        text: The text as read: never stripped, normalised or cut.
        id: Unique within its source; the record's own id if it has one, else `<source>:<line or row>`.
        source: The file or dataset that it was read from; a file is named by its path below the input.
        domain: The group for figures per domain: a primer genre, a dataset's own label, else the folder below the
            input, else the file.
    """

    text: str
    id: str
    source: str
    domain: str

    @property
    def text_hash(self) -> str:
        """The first 32 hexadecimal digits of the SHA-256 of the UTF-8 text, which identify the document."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()[:32]
