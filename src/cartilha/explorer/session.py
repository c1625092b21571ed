"""What the page shows after each action, as HTML: the explorer without its web framework.

A user's mistake, or a file that went away meanwhile, becomes a sentence in the place of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from cartilha.corpus.splits import Split
from cartilha.errors import UserError
from cartilha.explorer import parts
from cartilha.explorer.choices import Shaping, expect
from cartilha.explorer.reading import Reader, Reading, read, take_text
from cartilha.explorer.walking import StoreWalk
from cartilha.explorer.wording import PageWording, Refusal
from cartilha.explorer.writing import Draft, begin, continuations, draw, has_ended, next_logits, written

MAX_NEW_TOKENS = 200
FAULTS = (UserError, OSError)  # what becomes a sentence


@dataclass
class Explorer:
    """The models by letter, `A` first (none where only a store is looked at), and the store.

    All who have the page open share it.
    """

    readers: Mapping[str, Reader]
    walk: StoreWalk | None = None
    _readings: dict[tuple[str, str], Reading] = field(default_factory=dict)

    def read(self, text: str) -> dict[str, Reading]:
        """The text as each model reads it; empty where it has no tokens. The last text is kept."""
        found = {}
        for letter, reader in self.readers.items():
            reading = self._readings.get((letter, text)) or read(reader, text)
            if reading is not None:
                found[letter] = reading
        self._readings = {(letter, text): reading for letter, reading in found.items()}
        return found


class Spot(NamedTuple):
    """A token that was chosen in one model's text, by its number and by the character of the text where it begins.

    The other model's token is the one that covers this character.
    """

    letter: str
    token: int
    char: int


class ReadView(NamedTuple):
    """The answer to a text: notices, the coloured text of each model, and the chart."""

    notices: str
    readings: dict[str, str]
    chart: str


class DraftView(NamedTuple):
    """The answer to a step of writing."""

    draft: Draft | None
    text: str
    alternatives: str


class WalkView(NamedTuple):
    """The answer to a step through a store, and the number where one stands, from 1."""

    number: int
    shown: str


@dataclass(frozen=True)
class Answers:
    """The answers of the page in one language. A model is named by its letter; an unknown one means the first."""

    explorer: Explorer
    say: PageWording

    def reading(self, text: str | None, spot: Spot | None = None) -> ReadView:
        """Colour a text and draw its running perplexity; the token chosen is marked, if there is one."""
        given = take_text(text)
        notices = parts.cut_notice(self.say, given)
        nothing = dict.fromkeys(self.explorer.readers, "")
        try:
            found = self.explorer.read(given.text)
        except FAULTS as error:
            return ReadView(notices + self._failure(error), nothing, "")
        if not found:
            return ReadView(notices + parts.notice(self.say("empty")), nothing, "")
        chosen = found[spot.letter].tokens[spot.token] if spot is not None and spot.letter in found else None
        coloured = {letter: parts.reading(self.say, one, chosen) for letter, one in found.items()}
        notices += parts.different_tokens(self.say, found)
        return ReadView(notices, {**nothing, **coloured}, parts.running_perplexity(self.say, found))

    def choices(self, text: str | None, spot: Spot | None, shaping: Shaping) -> dict[str, str]:
        """What each model expected at the token chosen; a hint where none was."""
        shown = dict.fromkeys(self.explorer.readers, "")
        if spot is None:
            return {**shown, "A": parts.soft_help(self.say("choices_hint"))}
        try:
            for letter, reading in self.explorer.read(take_text(text).text).items():
                token = spot.token if letter == spot.letter else reading.token_at(spot.char)
                token = min(max(token, 0), len(reading.ids) - 1)  # the text may have changed since
                logits = reading.reader.logits(reading.ids, token)
                expectation = expect(logits, shaping, asked=int(reading.ids[token]))
                shown[letter] = parts.choices(self.say, reading, token, expectation)
        except FAULTS as error:
            return {**dict.fromkeys(shown, ""), "A": self._failure(error)}
        return shown

    def draft(self, letter: str, draft: Draft | None, shaping: Shaping, note: str = "") -> DraftView:
        """A draft and what may come next."""
        reader, draft = self._reader(letter), draft or Draft(())
        text = parts.draft(*written(reader, draft))
        if has_ended(reader, draft):
            return DraftView(draft, text, parts.notice(self.say("ended")))
        try:
            expectation = expect(next_logits(reader, draft), shaping)
        except FAULTS as error:
            return DraftView(draft, text, note + self._failure(error))
        return DraftView(draft, text, note + parts.candidates(self.say, reader, expectation, clickable=True))

    def new_draft(self, letter: str, prompt: str | None, shaping: Shaping) -> DraftView:
        """Begin a draft with a prompt."""
        given = take_text(prompt)
        note = parts.cut_notice(self.say, given)
        if given.text.endswith(" "):
            note += parts.notice(self.say("trailing_space"))
        return self.draft(letter, begin(self._reader(letter), given.text), shaping, note)

    def step(self, letter: str, draft: Draft | None, shaping: Shaping, action: int | str) -> DraftView:
        """One step of writing: `likeliest`, `draw`, `undo`, or the id of the next token."""
        reader, draft = self._reader(letter), draft or Draft(())
        with suppress(*FAULTS):  # asked for what may come next, the draft as it is fails likewise and says why
            if action == "undo":
                draft = replace(draft, chosen=draft.chosen[:-1])
            elif has_ended(reader, draft):
                pass
            elif action == "likeliest":
                draft = draft.with_token(int(np.argmax(next_logits(reader, draft))))
            elif action == "draw":
                draft = draft.with_token(draw(reader, draft, shaping, np.random.default_rng()))
            elif isinstance(action, int) and 0 <= action < reader.vocabulary_size:
                draft = draft.with_token(action)
        return self.draft(letter, draft, shaping)

    def three_ways(self, prompt: str | None, num_tokens: int, shaping: Shaping) -> str:
        """Greedy, sampled and beam search of every model."""
        given = take_text(prompt)
        num_tokens = min(max(num_tokens, 1), MAX_NEW_TOKENS)
        seed = int(np.random.default_rng().integers(2**31))
        readers = self.explorer.readers.values()
        try:
            found = [(reader, continuations(reader, given.text, num_tokens, shaping, seed)) for reader in readers]
        except FAULTS as error:
            return self._failure(error)
        return parts.cut_notice(self.say, given) + parts.three_ways(self.say, given.text, found)

    def document(self, split: Split, number: int) -> WalkView:
        """A document of a store by its number from 1; beyond the ends the first or the last."""
        return self._stored(number, lambda walk: walk.document(split, number - 1), parts.stored_document)

    def block(self, number: int, block_size: int, seed: int, epoch: int) -> WalkView:
        """Likewise a block of an epoch, which counts from 1, too."""
        return self._stored(
            number, lambda walk: walk.block(number - 1, block_size, seed, epoch - 1), parts.stored_block
        )

    def _stored(self, number: int, find: Callable[[StoreWalk], Any], show: Callable[..., str]) -> WalkView:
        assert self.explorer.walk is not None
        try:
            found = find(self.explorer.walk)
        except FAULTS as error:
            return WalkView(number, self._failure(error))
        return WalkView(found.number + 1, show(self.say, found))

    def most_surprising(self, text: str | None) -> Spot | None:
        """The token that surprises the first model most; None for an empty text, or one that a model cannot read."""
        try:
            letter, reading = next(iter(self.explorer.read(take_text(text).text).items()))
        except (StopIteration, *FAULTS):
            return None
        token = int(np.argmax(reading.nll))
        return Spot(letter, token, reading.tokens[token].start)

    def _reader(self, letter: str) -> Reader:
        readers = self.explorer.readers
        return readers.get(letter) or next(iter(readers.values()))

    def _failure(self, error: Exception) -> str:
        if isinstance(error, Refusal):
            return parts.notice(self.say(error.key, **error.values))
        return parts.notice(self.say("failed", reason=str(error)))
