"""What the page shows after each action, as HTML: the explorer without its web framework.

A user's mistake, or a file that went away meanwhile, becomes a sentence in the place of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cartilha.errors import UserError
from cartilha.explorer import parts
from cartilha.explorer.choices import LogitReader, Shaping, expect
from cartilha.explorer.reading import MAX_CHARS, Reader, Reading, read, take_text
from cartilha.explorer.walking import StoreWalk
from cartilha.explorer.wording import PageWording, Refusal
from cartilha.explorer.writing import (
    Draft,
    alternatives,
    begin,
    continuations,
    drawn,
    has_ended,
    likeliest,
    written,
)

MAX_NEW_TOKENS = 200
MAX_EPOCHS = 1_000_000
What = Literal["train", "validation", "blocks"]


@dataclass
class Explorer:
    """What the explorer works with; shared by all who have the page open.

    Attributes:
        readers: The models by letter, `A` first; none where only a store is looked at.
        walk: The open store, or None.
    """

    readers: Mapping[str, Reader]
    walk: StoreWalk | None = None
    _logits: dict[str, LogitReader] = field(default_factory=dict)
    _readings: dict[tuple[str, str], Reading] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._logits = {letter: LogitReader(reader) for letter, reader in self.readers.items()}

    def read(self, text: str) -> dict[str, tuple[Reader, Reading]]:
        """The text as each model reads it; empty where it has no tokens. The last text is kept."""
        found = {}
        for letter, reader in self.readers.items():
            reading = self._readings.get((letter, text)) or read(reader, text)
            if reading is not None:
                found[letter] = (reader, reading)
        self._readings = {(letter, text): reading for letter, (_, reading) in found.items()}
        return found

    def logits(self, letter: str) -> LogitReader:
        """The logits of a model by its letter."""
        return self._logits[letter]


@dataclass(frozen=True)
class Spot:
    """A token that was chosen in one model's text.

    Attributes:
        letter: Of the model.
        token: Its number there.
        char: Where it begins in the text: the other model's token is the one that covers this character.
    """

    letter: str
    token: int
    char: int


@dataclass(frozen=True)
class ReadView:
    """The answer to a text: notices, the coloured text of each model, and the chart."""

    notices: str
    readings: dict[str, str]
    chart: str


def show_reading(explorer: Explorer, say: PageWording, text: str | None, spot: Spot | None = None) -> ReadView:
    """Colour a text and draw its running perplexity; the token chosen is marked, if there is one."""
    given = take_text(text)
    notices = parts.cut_notice(say, given)
    nothing = dict.fromkeys(explorer.readers, "")
    try:
        found = explorer.read(given.text)
    except (UserError, OSError) as error:
        return ReadView(notices + failure(say, error), nothing, "")
    if not found:
        return ReadView(notices + parts.notice(say("empty")), nothing, "")
    span = None
    if spot is not None and spot.letter in found:
        piece = found[spot.letter][1].pieces[spot.token]
        span = (piece.start, piece.end)
    coloured = {
        letter: parts.reading(say, letter, reader, reading, span) for letter, (reader, reading) in found.items()
    }
    notices += parts.different_tokens(say, found)
    return ReadView(notices, {**nothing, **coloured}, parts.running_perplexity(say, found))


def show_choices(
    explorer: Explorer, say: PageWording, text: str | None, spot: Spot | None, shaping: Shaping
) -> dict[str, str]:
    """What each model expected at the token chosen; a hint where none was."""
    given = take_text(text)
    if spot is None:
        return {letter: parts.soft_help(say("choices_hint")) if letter == "A" else "" for letter in explorer.readers}
    shown = dict.fromkeys(explorer.readers, "")
    try:
        for letter, (reader, reading) in explorer.read(given.text).items():
            token = spot.token if letter == spot.letter else reading.token_at(spot.char)
            token = min(max(token, 0), len(reading.ids) - 1)  # the text may have changed since
            asked = int(reading.ids[token])
            expectation = expect(explorer.logits(letter)(reading.ids, token), shaping, asked=asked)
            shown[letter] = parts.choices(say, letter, reader, reading, token, expectation)
    except (UserError, OSError) as error:
        return {**dict.fromkeys(explorer.readers, ""), "A": failure(say, error)}
    return shown


def most_surprising(explorer: Explorer, text: str | None) -> Spot | None:
    """The token that surprises the first model most; None for an empty text."""
    found = explorer.read(take_text(text).text)
    if not found:
        return None
    letter, (_, reading) = next(iter(found.items()))
    token = int(np.argmax(reading.nll))
    return Spot(letter, token, reading.pieces[token].start)


@dataclass(frozen=True)
class DraftView:
    """The answer to a step of writing."""

    draft: Draft | None
    text: str
    alternatives: str


def show_draft(
    explorer: Explorer, say: PageWording, letter: str, draft: Draft | None, shaping: Shaping, note: str = ""
) -> DraftView:
    """A draft and what may come next."""
    reader = explorer.readers[letter]
    draft = draft or Draft(())
    text = parts.draft(*written(reader, draft))
    if has_ended(reader, draft):
        return DraftView(draft, text, parts.notice(say("ended")))
    try:
        expectation = alternatives(explorer.logits(letter), draft, shaping)
    except (UserError, OSError) as error:
        return DraftView(draft, text, note + failure(say, error))
    return DraftView(draft, text, note + parts.candidates(say, letter, reader, expectation, clickable=True))


def begin_draft(explorer: Explorer, say: PageWording, letter: str, prompt: str | None, shaping: Shaping) -> DraftView:
    """Begin a draft with a prompt."""
    given = take_text(prompt)
    note = parts.cut_notice(say, given)
    if given.text.rstrip(" ") != given.text:
        note += parts.notice(say("trailing_space"))
    return show_draft(explorer, say, letter, begin(explorer.readers[letter], given.text), shaping, note)


def step(
    explorer: Explorer, say: PageWording, letter: str, draft: Draft | None, shaping: Shaping, action: int | str
) -> DraftView:
    """One step of writing.

    Args:
        explorer: The models.
        say: Language of the answer.
        letter: Who writes.
        draft: So far.
        shaping: Of the alternatives, and of what is drawn.
        action: A token's id, or `likeliest`, `draw` or `undo`.
    """
    reader, draft = explorer.readers[letter], draft or Draft(())
    if action == "undo":
        return show_draft(explorer, say, letter, draft.without_last(), shaping)
    if has_ended(reader, draft):
        return show_draft(explorer, say, letter, draft, shaping)
    try:
        if action == "likeliest":
            draft = likeliest(explorer.logits(letter), draft)
        elif action == "draw":
            draft = drawn(explorer.logits(letter), draft, shaping, np.random.default_rng())
        elif isinstance(action, int) and 0 <= action < reader.vocabulary_size:
            draft = draft.with_token(action)
    except (UserError, OSError) as error:
        return DraftView(draft, parts.draft(*written(reader, draft)), failure(say, error))
    return show_draft(explorer, say, letter, draft, shaping)


def show_three_ways(explorer: Explorer, say: PageWording, prompt: str | None, num_tokens: int, shaping: Shaping) -> str:
    """Greedy, sampled and beam search of every model."""
    given = take_text(prompt)
    num_tokens = min(max(int(num_tokens), 1), MAX_NEW_TOKENS)
    seed = int(np.random.default_rng().integers(2**31))
    try:
        found = {
            letter: (reader, continuations(reader, given.text, num_tokens, shaping, seed))
            for letter, reader in explorer.readers.items()
        }
    except (UserError, OSError) as error:
        return failure(say, error)
    return parts.cut_notice(say, given) + parts.three_ways(say, given.text, found)


@dataclass(frozen=True)
class WalkView:
    """The answer to a step through a store, and the number where one stands, from 1."""

    number: int
    shown: str


def show_stored(
    explorer: Explorer, say: PageWording, what: What, number: float | None, block_size: float, seed: float, epoch: float
) -> WalkView:
    """A document or block of the store by its number from 1; beyond the ends the first or the last."""
    assert explorer.walk is not None
    index = int(number or 1) - 1
    try:
        if what == "blocks":
            block = explorer.walk.block(
                index, int(block_size or 0), int(seed or 0), min(max(0, int(epoch or 1) - 1), MAX_EPOCHS)
            )
            return WalkView(block.number + 1, parts.stored_block(say, block))
        document = explorer.walk.document(what, index)
        return WalkView(document.number + 1, parts.stored_document(say, document))
    except (UserError, OSError) as error:
        return WalkView(index + 1, failure(say, error))


def failure(say: PageWording, error: Exception) -> str:
    """A sentence in the place of an answer."""
    if isinstance(error, Refusal):
        return parts.notice(say(error.key, **error.values))
    return parts.notice(say("failed", reason=str(error)))


def text_info(say: PageWording) -> str:
    """What the box for the text says beside it."""
    return say("text_info", limit=say.number(MAX_CHARS))
