"""What a near-duplicate is: a document that shares most of its word trigrams with another, as their signatures tell.

Two documents are near-duplicates where at least `MIN_SIMILARITY` of the values of their signatures agree, which
estimates the Jaccard similarity of their trigrams within about 0.04. Changing 15 % of the words of a text leaves a
similarity of about 0.44 (0.85^3 / (2 - 0.85^3)), so that nearly all such copies are above the threshold. Bands propose
the pairs to be compared (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3): documents
whose values agree in a whole band.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from cartilha.corpus.signatures import NUM_VALUES, signatures

MIN_SIMILARITY = 0.3
BAND_VALUES = 3
NUM_BANDS = NUM_VALUES // BAND_VALUES
DOCUMENTS_AT_ONCE = 256


def band_keys(values: np.ndarray, band: int) -> np.ndarray:
    """A band's values side by side in one number: uint64, shape (num_documents,); 0 for a text without words.

    Args:
        values: Signatures, one value of all documents after the other: uint16, shape (NUM_VALUES, num_documents).
        band: From 0.
    """
    keys = np.zeros(values.shape[1], np.uint64)
    for value in values[band * BAND_VALUES : (band + 1) * BAND_VALUES]:
        keys = (keys << np.uint64(16)) | value.astype(np.uint64)
    return keys


def has_near_duplicate(texts: Sequence[str], known: Iterable[str]) -> np.ndarray:
    """Which texts have a near-duplicate (or themselves) among the known ones: bool, shape (num_texts,).

    Args:
        texts: The smaller side; its signatures are kept in memory.
        known: Streamed once.

    Raises:
        UserError: The `text` extra is missing.
    """
    own = signatures(texts)
    by_key: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(NUM_BANDS)]
    for band, places in enumerate(by_key):
        for number, key in enumerate(band_keys(own.T, band).tolist()):
            if key:
                places[key].append(number)
    result = np.zeros(len(texts), bool)
    stream = iter(known)
    while batch := list(islice(stream, DOCUMENTS_AT_ONCE)):
        others = signatures(batch)
        for band, places in enumerate(by_key):
            for row, key in enumerate(band_keys(others.T, band).tolist()):
                for number in places.get(key, ()):
                    result[number] |= (own[number] == others[row]).mean() >= MIN_SIMILARITY
    return result
