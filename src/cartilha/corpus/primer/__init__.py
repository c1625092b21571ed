"""The primer: original Portuguese texts that ship with the package, so that everything works without a network."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable

from cartilha.corpus.document import Document


@dataclass(frozen=True)
class PrimerText:
    """One text of the primer: its genre is the domain of its document, its title no part of the text."""

    id: str
    title: str
    genre: str
    variety: str
    text: str


@dataclass(frozen=True)
class PrimerCount:
    """How much of the primer is of one genre and variety (of Portuguese); words are separated by white space."""

    genre: str
    variety: str
    num_texts: int
    num_words: int


def primer_texts() -> list[PrimerText]:
    """All texts of the primer, in the order of its file."""
    lines = _texts_file().read_bytes().decode("utf-8").split("\n")
    return [PrimerText(**json.loads(line)) for line in lines if line]


def read_primer() -> Iterator[Document]:
    """The primer's texts as documents."""
    for text in primer_texts():
        yield Document(text=text.text, id=text.id, source="primer", domain=text.genre)


def primer_table() -> list[PrimerCount]:
    """Texts and words of the primer for each genre and variety that occurs, sorted by both."""
    words: dict[tuple[str, str], list[int]] = defaultdict(list)
    for text in primer_texts():
        words[text.genre, text.variety].append(len(text.text.split()))
    return [PrimerCount(*group, len(counts), sum(counts)) for group, counts in sorted(words.items())]


def primer_sha256() -> str:
    """The SHA-256 of the primer's file, in hexadecimal digits, which identifies the edition of the texts."""
    return hashlib.sha256(_texts_file().read_bytes()).hexdigest()


def _texts_file() -> Traversable:
    return importlib.resources.files(__name__) / "texts.jsonl"
