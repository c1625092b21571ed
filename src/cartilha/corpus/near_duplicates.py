"""Near-duplicates: documents that share most of their word trigrams, found by MinHash, then verified exactly.

MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3) only proposes
pairs; what counts is the Jaccard similarity of their trigrams. Changing 15 % of the words of a text leaves about 0.44
of it (0.85^3 / (2 - 0.85^3)), so the threshold stands at 0.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from cartilha.errors import missing_extra

SHINGLE_WORDS = 3
MIN_JACCARD = 0.4
NUM_PERMUTATIONS = 128
NUM_BANDS = 64  # bands of two: a pair at 0.4 is proposed with probability 1 - (1 - 0.4^2)^64 > 0.9999


def shingles(text: str) -> set[str]:
    """The text's word trigrams, in lower case and without punctuation; a shorter text is one shingle."""
    words = re.findall(r"\w+", text.lower())
    if len(words) < SHINGLE_WORDS:
        return {" ".join(words)} if words else set()
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def has_near_duplicate(texts: Sequence[str], known: Iterable[str]) -> np.ndarray:
    """Which texts have a near-duplicate (or themselves) among the known ones: bool, shape (num_texts,).

    Args:
        texts: The smaller side; its shingles are kept in memory.
        known: Streamed once.

    Raises:
        UserError: The `text` extra is missing.
    """
    try:
        from rensa import RMinHash, RMinHashLSH
    except ImportError:
        raise missing_extra("The search for near-duplicates", "text") from None

    def signature(parts: set[str]) -> RMinHash:
        found = RMinHash(num_perm=NUM_PERMUTATIONS, seed=0)
        found.update(sorted(parts))
        return found

    index = RMinHashLSH(threshold=MIN_JACCARD, num_perm=NUM_PERMUTATIONS, num_bands=NUM_BANDS)
    parts = [shingles(text) for text in texts]
    for number, own in enumerate(parts):
        if own:
            index.insert(number, signature(own))
    result = np.zeros(len(texts), bool)
    for other in map(shingles, known):
        if other:
            candidates = [number for number in index.query(signature(other)) if not result[number]]
            for number in candidates:
                common = len(parts[number] & other)
                result[number] = common >= MIN_JACCARD * (len(parts[number]) + len(other) - common)
    return result
