"""What a model expects next: logits, probabilities, and what temperature, top-k and top-p make of them."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

from cartilha.blocks.packing import IGNORE_INDEX, Batch
from cartilha.evaluation.windows import Window, document_windows
from cartilha.explorer.reading import Reader
from cartilha.model.forward import hidden_states
from cartilha.model.head import head_of

KEPT_STATES = 4


@dataclass(frozen=True)
class Shaping:
    """How probabilities are changed before a token is drawn, in this order.

    Attributes:
        temperature: Logits are divided by it: below 1 sharper, above 1 flatter.
        top_k: Only the k likeliest stay; 0 for all.
        top_p: Only the likeliest whose probabilities add up to this stay, at least one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """A token that might come next.

    Attributes:
        token_id: Which.
        rank: Its place by logit, from 1.
        logit: The model's raw score.
        probability: Its share of the model's own distribution (temperature 1, nothing cut).
        shaped: Its probability after temperature, top-k and top-p.
    """

    token_id: int
    rank: int
    logit: float
    probability: float
    shaped: float


@dataclass(frozen=True)
class Expectation:
    """A model's expectation at one place.

    Attributes:
        candidates: The likeliest, and last the token asked about where it is not among them.
        log_normaliser: ln of the sum of e^logit over all tokens: probability = e^(logit - log_normaliser).
        num_left: Tokens that the shaping leaves.
    """

    candidates: tuple[Candidate, ...]
    log_normaliser: float
    num_left: int


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
        left_out = order[1:][before[1:] >= shaping.top_p]
        probabilities[left_out] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


def expect(logits: np.ndarray, shaping: Shaping, *, num_shown: int = 10, asked: int | None = None) -> Expectation:
    """The likeliest tokens with logit, probability and shaped probability.

    Args:
        logits: Of all tokens, shape (num_ids,).
        shaping: Temperature, top-k, top-p.
        num_shown: How many of the likeliest.
        asked: A token that must be among those shown.
    """
    probabilities, shaped = softmax(logits), shaped_probabilities(logits, shaping)
    order = np.argsort(-logits, kind="stable")
    shown = [int(i) for i in order[:num_shown]]
    if asked is not None and asked not in shown:
        shown.append(asked)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(1, len(order) + 1)
    highest = float(np.max(logits))
    return Expectation(
        tuple(Candidate(i, int(place[i]), float(logits[i]), float(probabilities[i]), float(shaped[i])) for i in shown),
        highest + math.log(float(np.exp(logits.astype(np.float64) - highest).sum())),
        int((shaped > 0).sum()),
    )


class LogitReader:
    """Logits of one position on demand; the hidden states of the last few texts are kept, so that clicks are quick."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __call__(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Logits for the token at `position`, given the tokens before it; float32, shape (num_ids,).

        Args:
            ids: A text's tokens, shape (num_tokens,).
            position: From 0 (after the prefix alone) to num_tokens (what comes after the text).
        """
        assert 0 <= position <= len(ids)
        window = self._window(len(ids), position)
        inputs = self._inputs(ids, window)
        with self.reader.lock:
            states = self._states(inputs)
            with torch.no_grad():
                row = states[position - 1 - window.first_input, None]
                logits = head_of(self.reader.loaded.model).logits(row, self.reader.dtype)[0]
        return np.asarray(logits.cpu().numpy())

    def _window(self, num_tokens: int, position: int) -> Window:
        """The window through which this position is scored, as in an evaluation of the text with one token more."""
        protocol = self.reader.protocol
        windows = document_windows(num_tokens + 1, protocol.window, protocol.stride)
        return next(window for window in windows if window.first_target <= position < window.past)

    def _inputs(self, ids: np.ndarray, window: Window) -> np.ndarray:
        prefix = [self.reader.protocol.prefix_id] if window.first_input < 0 else []
        return np.array([*prefix, *ids[max(0, window.first_input) : window.past - 1]], np.int64)

    def _states(self, inputs: np.ndarray) -> torch.Tensor:
        key = hashlib.sha256(inputs.tobytes()).digest()
        if key not in self._kept:
            row, length = inputs[None], len(inputs)
            nothing = np.full((1, length), IGNORE_INDEX, np.int64)
            batch = Batch(row, nothing, np.arange(length)[None], np.array([length], np.int64))
            with torch.no_grad():
                self._kept[key] = hidden_states(self.reader.loaded.model, batch, self.reader.dtype)[0]
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_STATES:
            self._kept.popitem(last=False)
        return self._kept[key]
