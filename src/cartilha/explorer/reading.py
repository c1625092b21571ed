"""Reading a text with a model: the surprisal of each token, by the same code that `cartilha evaluate` scores with."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch

from cartilha.blocks.packing import IGNORE_INDEX, Batch
from cartilha.corpus.document import Document
from cartilha.evaluation.documents import encode_documents
from cartilha.evaluation.measures import Evaluation, make_evaluation
from cartilha.evaluation.nll import TokenRows, score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.evaluation.sums import perplexity
from cartilha.evaluation.windows import document_windows
from cartilha.explorer.token_text import TokenText, token_texts
from cartilha.model.forward import hidden_states
from cartilha.model.head import head_of

MAX_CHARS = 10_000
KEPT_STATES = 4  # of the last windows of text, so that clicks are answered at once


@dataclass(frozen=True)
class Reader(Scorer):
    """A model of the page; the protocol is that of `cartilha evaluate` by default.

    Attributes:
        letter: Its name on the page: A, or B for the second.
        lock: Held while the model computes: one page asks for several things at once, and generation switches the
            model's attention.
    """

    letter: str = "A"
    lock: threading.Lock = field(default_factory=threading.Lock)
    _kept: OrderedDict[bytes, torch.Tensor] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)

    def logits(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Logits for the token at `position`, given the tokens before it; float32, shape (num_ids,).

        Args:
            ids: A text's tokens, shape (num_tokens,).
            position: From 0 (after the prefix alone) to num_tokens (what comes after the text).
        """
        assert 0 <= position <= len(ids)
        # The window through which this position is scored, as in an evaluation of the text with one token more.
        windows = document_windows(len(ids) + 1, self.protocol.window, self.protocol.stride)
        window = next(window for window in windows if window.first_target <= position < window.past)
        prefix = [self.protocol.prefix_id] if window.first_input < 0 else []
        inputs = np.array([*prefix, *ids[max(0, window.first_input) : window.past - 1]], np.int64)
        with self.lock, torch.no_grad():
            row = self._states(inputs)[position - 1 - window.first_input, None]
            logits = head_of(self.loaded.model).logits(row, self.dtype)[0]
        return np.asarray(logits.cpu().numpy())

    def _states(self, inputs: np.ndarray) -> torch.Tensor:
        key = hashlib.sha256(inputs.tobytes()).digest()
        if key not in self._kept:
            length = len(inputs)
            nothing = np.full((1, length), IGNORE_INDEX, np.int64)
            batch = Batch(inputs[None], nothing, np.arange(length)[None], np.array([length], np.int64))
            self._kept[key] = hidden_states(self.loaded.model, batch, self.dtype)[0]
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_STATES:
            self._kept.popitem(last=False)
        return self._kept[key]


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it; arrays have one entry per token.

    Attributes:
        ids: Int64.
        nll: Minus ln p(token | what stands before it), nats, float64.
        rank: Of the token among all that the model might have expected, from 1.
        evaluation: The figures of the text as a whole.
    """

    reader: Reader
    text: str
    ids: np.ndarray
    tokens: tuple[TokenText, ...]
    nll: np.ndarray
    rank: np.ndarray
    evaluation: Evaluation

    @property
    def running_perplexity(self) -> np.ndarray:
        """Perplexity of the text up to each token, that token included: exp of the mean so far."""
        means = np.cumsum(self.nll) / np.arange(1, len(self.nll) + 1)
        return np.array([perplexity(mean) for mean in means])

    @property
    def bits(self) -> np.ndarray:
        """Surprisal of each token in bits."""
        return self.nll / math.log(2)

    def token_at(self, char: int) -> int:
        """The (first) token that covers this character of the text."""
        ends = [token.end for token in self.tokens]
        return min(int(np.searchsorted(ends, char, side="right")), len(ends) - 1)


@dataclass(frozen=True)
class Given:
    """A text as it will be read: at most `MAX_CHARS` of the `num_chars` given, all of which UTF-8 can write."""

    text: str
    num_chars: int

    @property
    def was_cut(self) -> bool:
        """Whether only the beginning is read."""
        return self.num_chars > len(self.text)


def take_text(text: str | None) -> Given:
    """What is read of a text that came from outside: its first `MAX_CHARS` characters, half surrogates replaced."""
    given = text or ""
    return Given(given[:MAX_CHARS].encode("utf-8", "replace").decode("utf-8"), len(given))


def read(reader: Reader, text: str) -> Reading | None:
    """Score every token of a text; None for a text without tokens.

    Raises:
        UserError: The model gives a probability that is no number.
    """
    documents = encode_documents([Document(text, "text", "explorer", "explorer")], reader.tokenizer, allow_empty=True)
    if not documents.ids or not len(documents.ids[0]):
        return None
    ids = documents.ids[0].astype(np.int64)
    nll, rank = np.zeros(len(ids)), np.zeros(len(ids), np.int64)

    def take(rows: TokenRows) -> None:
        nll[rows.position], rank[rows.position] = rows.nll, rows.rank

    started = time.perf_counter()
    with reader.lock:
        scores = score_documents(reader, documents, take_rows=take)
    evaluation = make_evaluation(reader, documents, scores, time.perf_counter() - started)
    offsets = reader.tokenizer.backend.encode(text, add_special_tokens=False).offsets
    assert len(offsets) == len(ids), "the same tokenizer over the same text"
    return Reading(reader, text, ids, tuple(token_texts(text, offsets)), nll, rank, evaluation)
