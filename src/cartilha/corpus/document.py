"""The record that all stages pass on: a document."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A text, never stripped, normalised or cut, with its origin."""

    text: str
    id: str  # unique within its source; the record's own if it has one, else `<source>:<line or row>`
    source: str  # the file (by its path below the input) or dataset that it was read from
    domain: str  # the group for figures per domain: its own label, else its folder below the input, else its file

    @property
    def text_hash(self) -> str:
        """The first 32 hexadecimal digits of the SHA-256 of the UTF-8 text, which identify the document."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()[:32]
