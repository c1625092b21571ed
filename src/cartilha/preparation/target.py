"""Whether the texts that a selection aims at can be aimed at: there are some, in a language that the pool has."""

from __future__ import annotations

from itertools import islice

from cartilha.corpus.language import languages, load_identifier
from cartilha.corpus.readers import read_documents
from cartilha.errors import UserError
from cartilha.preparation.request import PrepareRequest

TARGET_DOCUMENTS = 200
TARGET_CHARS = 20_000
POOL_DOCUMENTS, POOL_CHARS = 500, 1000  # the beginning of each tells its language
LEAST_CHARS = 60  # the language of a shorter text is often mistaken
LEAST_SHARE = 0.01


def check_target(asked: PrepareRequest) -> None:
    """Refuse a target without text, or of a language that the first documents of the pool do not have.

    Languages are told apart only where the extra `text` is installed.
    """
    if not asked.num_targets:
        return
    first, end = asked.num_held_out, asked.num_held_out + asked.num_targets
    targets, pool = (read_documents(found, asked.reading) for found in (asked.sources[first:end], asked.sources[end:]))
    text = "\n".join(document.text for document in islice(targets, TARGET_DOCUMENTS))[:TARGET_CHARS]
    if not text.strip():
        raise UserError("The texts of --like hold no document; give a file with text.")
    try:
        identifier = load_identifier()
    except ImportError:
        return
    language = languages(identifier, [text])[0][0]
    texts = [found.text[:POOL_CHARS] for found in islice(pool, POOL_DOCUMENTS) if len(found.text) >= LEAST_CHARS]
    own = [found for found, _ in languages(identifier, texts)].count(language)
    load_identifier.cache_clear()  # a hundred megabytes; a process that cleans reads them again
    if own < LEAST_SHARE * len(texts):
        raise UserError(
            f"The texts of --like are in another language ({language}) than the input: {own} of its first"
            f" {len(texts)} documents are in it; give a target in the language of the input."
        )
