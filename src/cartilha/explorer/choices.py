"""What a model expects next: logits, probabilities, and what temperature, top-k and top-p make of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shaping:
    """How probabilities are changed before a token is drawn, in this order."""

    temperature: float = 1.0  # logits are divided by it: below 1 sharper, above 1 flatter
    top_k: int = 0  # only the k likeliest stay; 0 for all
    top_p: float = 1.0  # only the likeliest whose probabilities add up to this stay, at least one


@dataclass(frozen=True)
class Candidate:
    """A token that might come next."""

    token_id: int
    rank: int  # by logit, from 1
    logit: float
    probability: float  # of the model's own distribution (temperature 1, nothing cut)
    shaped: float  # after temperature, top-k and top-p


@dataclass(frozen=True)
class Expectation:
    """A model's expectation at one place."""

    candidates: tuple[Candidate, ...]  # the likeliest, and last the token asked about where it is not among them
    log_normaliser: float  # ln of the sum of e^logit over all tokens: probability = e^(logit - log_normaliser)
    num_left: int  # tokens that the shaping leaves


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, float64; -inf gives 0."""
    weights = np.exp(logits.astype(np.float64) - np.max(logits))
    return np.asarray(weights / weights.sum())


def shaped_probabilities(logits: np.ndarray, shaping: Shaping) -> np.ndarray:
    """Probabilities from which the next token is drawn, as transformers' sampling has them; float64.

    Top-p keeps the smallest set of likeliest tokens whose probabilities reach p (Holtzman et al., arXiv:1904.09751,
    section 3.1), counted after temperature and top-k.
    """
    assert shaping.temperature > 0
    scaled = logits.astype(np.float64) / shaping.temperature
    if 0 < shaping.top_k < len(scaled):
        least = np.partition(scaled, -shaping.top_k)[-shaping.top_k]
        scaled = np.where(scaled < least, -np.inf, scaled)
    probabilities = softmax(scaled)
    if shaping.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[1:][before[1:] >= shaping.top_p]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


def expect(logits: np.ndarray, shaping: Shaping, *, num_shown: int = 10, asked: int | None = None) -> Expectation:
    """The `num_shown` likeliest tokens, and the token `asked` about; the logits are those of all tokens, (num_ids,)."""
    probabilities, shaped = softmax(logits), shaped_probabilities(logits, shaping)
    order = np.argsort(-logits, kind="stable")
    shown = [int(i) for i in order[:num_shown]]
    if asked is not None and asked not in shown:
        shown.append(asked)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(1, len(order) + 1)
    candidates = (
        Candidate(i, int(place[i]), float(logits[i]), float(probabilities[i]), float(shaped[i])) for i in shown
    )
    highest = float(np.max(logits))
    log_normaliser = highest + math.log(float(np.exp(logits.astype(np.float64) - highest).sum()))
    return Expectation(tuple(candidates), log_normaliser, int((shaped > 0).sum()))
