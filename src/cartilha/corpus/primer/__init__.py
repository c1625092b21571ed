"""The primer: original texts that ship with the package, so that everything works without a network.

`primer` is the Portuguese one (texts.jsonl), `primer:gl` a small one in another language (gl.jsonl).
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable

from cartilha.corpus.document import Document
from cartilha.languages import DEFAULT


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
    """How much of the primer is of one genre and variety; words are separated by white space."""

    genre: str
    variety: str
    num_texts: int
    num_words: int


def primer_languages() -> list[str]:
    """The codes of the languages that have a primer."""
    names = (item.name for item in importlib.resources.files(__name__).iterdir())
    others = sorted(name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl"))
    return [DEFAULT, *(name for name in others if name != "texts")]


def primer_texts(language: str = DEFAULT) -> list[PrimerText]:
    """All texts of a primer, in the order of its file."""
    lines = _texts_file(language).read_bytes().decode("utf-8").split("\n")
    return [PrimerText(**json.loads(line)) for line in lines if line]


def read_primer(language: str = DEFAULT) -> Iterator[Document]:
    """A primer's texts as documents."""
    for text in primer_texts(language):
        yield Document(text=text.text, id=text.id, source="primer", domain=text.genre)


def primer_table(language: str = DEFAULT) -> list[PrimerCount]:
    """Texts and words of a primer for each genre and variety that occurs, sorted by both."""
    words: dict[tuple[str, str], list[int]] = defaultdict(list)
    for text in primer_texts(language):
        words[text.genre, text.variety].append(len(text.text.split()))
    return [PrimerCount(*group, len(counts), sum(counts)) for group, counts in sorted(words.items())]


def primer_sha256(language: str = DEFAULT) -> str:
    """The SHA-256 of a primer's file, in hexadecimal digits, which identifies the edition of the texts."""
    return hashlib.sha256(_texts_file(language).read_bytes()).hexdigest()


def _texts_file(language: str) -> Traversable:
    return importlib.resources.files(__name__) / ("texts.jsonl" if language == DEFAULT else f"{language}.jsonl")
