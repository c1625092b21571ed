"""Reading a text with a model: the surprisal of each token, by the same code that `cartilha evaluate` scores with."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from cartilha.corpus.document import Document
from cartilha.evaluation.documents import encode_documents
from cartilha.evaluation.measures import Evaluation, make_evaluation
from cartilha.evaluation.nll import TokenRows, score_documents
from cartilha.evaluation.perplexity import perplexity
from cartilha.evaluation.scorer import Scorer
from cartilha.explorer.pieces import Piece, text_pieces

MAX_CHARS = 10_000


@dataclass(frozen=True)
class Reader(Scorer):
    """A model with what reading a text takes; the protocol is that of `cartilha evaluate` by default.

    Attributes:
        lock: Held while the model computes: one page asks for several things at once, and generation switches the
            model's attention.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Reading:
    """A text as a model reads it; arrays have one entry a token.

    Attributes:
        text: What was read.
        ids: Token ids, int64.
        pieces: What each token covers of the text.
        nll: Minus ln p(token | what stands before it), nats, float64.
        rank: Of the token among all that the model might have expected, from 1.
        entropy: Of the model's expectation before the token, nats.
        evaluation: The figures of the text as a whole.
    """

    text: str
    ids: np.ndarray
    pieces: tuple[Piece, ...]
    nll: np.ndarray
    rank: np.ndarray
    entropy: np.ndarray
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
        ends = [piece.end for piece in self.pieces]
        return min(int(np.searchsorted(ends, char, side="right")), len(ends) - 1)


@dataclass(frozen=True)
class Given:
    """A text as it will be read.

    Attributes:
        text: At most `MAX_CHARS` characters, all of which UTF-8 can write.
        num_chars: Of what was given.
    """

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
    nll, entropy = np.zeros(len(ids)), np.zeros(len(ids), np.float32)
    rank = np.zeros(len(ids), np.int64)

    def take(rows: TokenRows) -> None:
        nll[rows.position], entropy[rows.position], rank[rows.position] = rows.nll, rows.entropy, rows.rank

    started = time.perf_counter()
    with reader.lock:
        scores = score_documents(reader, documents, take_rows=take)
    evaluation = make_evaluation(reader, documents, scores, time.perf_counter() - started)
    offsets = reader.tokenizer.backend.encode(text, add_special_tokens=False).offsets
    assert len(offsets) == len(ids), "the same tokenizer over the same text"
    return Reading(text, ids, tuple(text_pieces(text, offsets)), nll, rank, entropy, evaluation)
