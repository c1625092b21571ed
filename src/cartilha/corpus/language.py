"""The language of texts: py3langid's model (Lui and Baldwin 2012, "langid.py"), applied to many texts at once.

It is an automaton over UTF-8 bytes that finds the ends of certain byte sequences, and a naive Bayes classifier of
their counts. py3langid goes through one text byte by byte in Python; here all texts of a batch advance together.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Identifier:
    """The model, as arrays."""

    labels: list[str]  # ISO 639 codes, one per column
    aliases: list[tuple[int, int]]  # columns (first, other) of the same language, in two scripts
    next_states: np.ndarray  # for each kind of state and byte
    rows: np.ndarray  # where the kind of each state begins in `next_states`, int64
    features: np.ndarray  # the feature that ends at each state, or -1, int32
    weights: np.ndarray  # float32, shape (num_features, num_labels)
    priors: np.ndarray  # float32, shape (num_labels,)


@lru_cache(maxsize=1)
def load_identifier() -> Identifier:
    """py3langid's model, read once; an ImportError if the extra `text` is missing."""
    from py3langid import langid

    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    labels = list(model.nb_classes)
    firsts = [labels.index(label) for label in labels]
    return Identifier(
        labels,
        [(first, other) for other, first in enumerate(firsts) if first != other],
        np.asarray(model.tk_nextmove),
        np.asarray(model.tk_row, np.int64) << 8,
        np.asarray(model.tk_output, np.int32),
        # As float16 (28 MB instead of 57) they would be converted at each use.
        np.asarray(model.nb_ptc, np.float32),
        np.asarray(model.nb_pc, np.float32),
    )


def languages(identifier: Identifier, texts: Sequence[str]) -> list[tuple[str, float]]:
    """The language of each text and its share of the probability; each text takes as many steps as the longest."""
    if not texts:
        return []
    # As in the training of the model: no text all in capitals, accents joined with their letters.
    cased = [text.lower() if text.isupper() else text for text in texts]
    encoded = [unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass") for text in cased]
    scores = _scores(identifier, encoded)
    scores /= np.sqrt(np.array([[len(text) or 1] for text in encoded], np.float32))
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    for first, other in identifier.aliases:
        shares[:, first] += shares[:, other]
        shares[:, other] = 0
    best = shares.argmax(axis=1)
    return [(identifier.labels[i], share) for i, share in zip(best, shares.max(axis=1).tolist(), strict=True)]


def _scores(identifier: Identifier, encoded: list[bytes]) -> np.ndarray:
    """The logarithm of each language's probability, up to a constant: float32, shape (num_texts, num_labels)."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    ended = _features(identifier, [encoded[i] for i in order])
    num_features = len(identifier.weights)
    columns = np.broadcast_to(np.array(order), ended.shape)[ended >= 0]
    found, counts = np.unique(columns * num_features + ended[ended >= 0], return_counts=True)
    bounds = np.searchsorted(found, np.arange(len(encoded) + 1) * num_features).tolist()
    features, logs = found % num_features, np.log1p(counts.astype(np.float32))
    scores = np.zeros((len(encoded), len(identifier.labels)), np.float32)
    for i, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            scores[i] = logs[begin:end] @ identifier.weights[features[begin:end]] + identifier.priors
    return scores


def _features(identifier: Identifier, encoded: list[bytes]) -> np.ndarray:
    """The feature that ends at each byte of each text (longest first), or -1: int32, shape (longest, num_texts)."""
    lengths = np.array([len(text) for text in encoded], np.int64)
    longest = int(lengths.max(initial=0))
    padded = b"".join(text.ljust(longest, b"\0") for text in encoded)
    columns = np.frombuffer(padded, np.uint8).reshape(len(encoded), longest).T.astype(np.int64)
    ended = np.full(columns.shape, -1, np.int32)
    states = np.zeros(len(encoded), np.int64)
    for place, column in enumerate(columns):
        going = int(np.searchsorted(-lengths, -place, side="left"))  # texts that are not at their end
        states = identifier.next_states[identifier.rows[states[:going]] + column[:going]]
        ended[place, :going] = identifier.features[states]
    return ended
