"""Reading a text with a model: the surprisal of each token, by the same code that `cartilha evaluate` scores with."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from cartilha.blocks.packing import Batch
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
    """A model of the page, named by its letter; the protocol is that of `cartilha evaluate` by default.

    `lock` is held while the model computes: one page asks for several things at once, and generation switches the
    model's attention.
    """

    letter: str = "A"
    lock: threading.Lock = field(default_factory=threading.Lock)
    _kept: dict[bytes, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def logits(self, ids: np.ndarray, position: int) -> np.ndarray:
        """Logits for the token at `position`, given the tokens of the text before it; float32, shape (num_ids,).

        Positions run from 0 (after the prefix alone) to num_tokens (what comes after the text).
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
        key = inputs.tobytes()
        states = self._kept.pop(key, None)
        if states is None:
            states = hidden_states(self.loaded.model, Batch.unscored(inputs), self.dtype)[0]
        self._kept[key] = states  # last, as the one used last
        while len(self._kept) > KEPT_STATES:
            del self._kept[next(iter(self._kept))]
        return states


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it; arrays have one entry per token."""

    reader: Reader
    text: str
    ids: np.ndarray  # int64
    tokens: tuple[TokenText, ...]
    nll: np.ndarray  # minus ln p(token | what stands before it), nats, float64
    rank: np.ndarray  # of the token among all that the model might have expected, from 1
    evaluation: Evaluation  # of the text as a whole

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
    """Score every token of a text; None for one without tokens, a UserError if a probability is no number."""
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
