"""The fragments of the page as HTML: what was computed, in one language's words. Everything from outside is escaped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np

from cartilha.explorer.choices import Expectation
from cartilha.explorer.reading import MAX_CHARS, Given, Reader, Reading
from cartilha.explorer.token_text import TokenText, token_label, visible
from cartilha.explorer.wording import PageWording
from cartilha.reporting.chart import Axis, Figure, Series, thin
from cartilha.reporting.pages import environment

BIN_BITS = (1, 2, 4, 8, 12)  # upper edges of the colour steps; the last step is open
CONTEXT_CHARS = 40
CHART_SIZE = (560, 270)


@cache
def _parts() -> Any:
    return environment(PageWording.package).get_template("parts.html.j2").module


def _fragment(name: str, *values: object) -> str:
    return str(getattr(_parts(), name)(*values))


notice = partial(_fragment, "notice")  # a sentence to the reader
soft_help = partial(_fragment, "help")  # an explanation in small print
heading = partial(_fragment, "heading")
header = partial(_fragment, "header")  # title, models and store, and the link to the page in the other language
draft = partial(_fragment, "draft")  # a text being written: its beginning, and what was chosen
three_ways = partial(_fragment, "three")  # greedy, sampled and beam search beside each other, a row per model
stored_document = partial(_fragment, "document")
stored_block = partial(_fragment, "block")  # with a box per piece of a document


def legend(say: PageWording) -> str:
    """The colour steps with the probabilities that they stand for."""
    edges = [0, *BIN_BITS]
    bins = [(f"{low}–{high}", f"> {_power(say, high)}") for low, high in itertools.pairwise(edges)]
    bins.append((f"≥ {edges[-1]}", f"≤ {_power(say, edges[-1])}"))
    return _fragment("legend", say, bins)


def _power(say: PageWording, bits: int) -> str:
    percent = 100 * 2.0**-bits
    return f"{say.number(percent, 0 if percent >= 10 else 1 if percent >= 0.1 else 2)}%"


def cut_notice(say: PageWording, given: Given) -> str:
    """That only the beginning of a text is read; empty where all of it is."""
    if not given.was_cut:
        return ""
    return notice(say("cut", limit=say.number(MAX_CHARS), num_chars=say.number(given.num_chars)))


def level(bits: float) -> int:
    """The colour step of a surprisal."""
    return int(np.searchsorted(BIN_BITS, bits, side="right"))


def reading(say: PageWording, found: Reading, chosen: TokenText | None = None) -> str:
    """A text with each token coloured by its surprisal, and the figures of the whole; `chosen` is marked."""
    tokens = [
        {
            # A line's end keeps its place in the flow of the text, and can be clicked.
            "text": token.text.replace("\r\n", "\n").replace("\n", "↵\n"),
            "part": f"{token.part}/{token.num_parts}" if token.num_parts else "",
            "start": token.start,
            "end": token.end,
            "number": number,
            "chosen": chosen is not None and token.start < chosen.end and chosen.start < token.end,
            "level": level(bits),
            "tip": _tip(say, token, bits, rank),
        }
        for number, (token, bits, rank) in enumerate(zip(found.tokens, found.bits, found.rank, strict=True))
    ]
    return _fragment("reading", say, found.reader, found.evaluation, tokens)


def _tip(say: PageWording, token: TokenText, bits: float, rank: int) -> str:
    text = visible(token.text)
    if token.num_parts:
        text = say("part_tip", part=token.part, num_parts=token.num_parts, text=text)
    probability = say.probability(2.0**-bits)
    return say("token_tip", token=f"“{text}”", bits=say.number(bits, 2), probability=probability, rank=say.number(rank))


def running_perplexity(say: PageWording, readings: Mapping[str, Reading]) -> str:
    """The chart of the perplexity so far, of each model and of the uniform one."""
    curves = []
    for letter, found in readings.items():
        chars = np.array([token.end for token in found.tokens], np.float64)
        label = say("curve_model", letter=letter, ref=found.reader.loaded.reference)
        curves.append((letter.lower(), label, chars, found.running_perplexity))
    last = max(chars[-1] for _, _, chars, _ in curves)
    sizes: dict[int, str] = {}  # and the first model of each
    for letter, found in readings.items():
        sizes.setdefault(found.reader.vocabulary_size, letter)
    for size, letter in sizes.items():
        key = "curve_uniform_of" if len(sizes) > 1 else "curve_uniform"
        label = say(key, vocabulary=say.number(size), letter=letter)
        curves.append(("uniform", label, np.array([0.0, last]), np.array([size, size], np.float64)))
    # A logarithmic axis from a power of ten to another, from 1 to 1,000,000 at most.
    decades = [np.log10(np.clip(perplexity, 1.0, 1e6)) for _, _, _, perplexity in curves]
    low = math.floor(min(one.min() for one in decades))
    high = max(math.ceil(max(one.max() for one in decades)), low + 1)
    powers = [(float(power), say.number(10.0**power)) for power in range(low, high + 1)]
    figure = Figure(
        "running-perplexity",
        say("curve_title"),
        [Series(name, thin(chars), thin(y)) for (name, _, chars, _), y in zip(curves, decades, strict=True)],
        Axis(say("curve_x"), say.number, from_zero=True, whole=True),
        Axis(say("curve_y"), say.number, names=powers),
        [(name, label) for name, label, _, _ in curves],
        CHART_SIZE,
    )
    return _fragment("chart", figure)


def different_tokens(say: PageWording, readings: Mapping[str, Reading]) -> str:
    """A warning where two models cut the text differently; else nothing."""
    cuts = {tuple(token.end for token in found.tokens) for found in readings.values()}
    return notice(say("different_tokens")) if len(cuts) > 1 else ""


def choices(say: PageWording, found: Reading, token: int, expectation: Expectation) -> str:
    """What a model expected at a token of the text: logits beside probabilities."""
    context, letter = found.text[: found.tokens[token].start], found.reader.letter
    tail = ("… " if len(context) > CONTEXT_CHARS else "") + visible(context[-CONTEXT_CHARS:]).replace("␣", " ").strip()
    title = say("choices_at", letter=letter, context=tail) if token else say("choices_start", letter=letter)
    return candidates(say, found.reader, expectation, title=title, asked=int(found.ids[token]))


def candidates(
    say: PageWording,
    reader: Reader,
    expectation: Expectation,
    *,
    title: str = "",
    asked: int | None = None,
    clickable: bool = False,
) -> str:
    """A table of candidates; the bars are shares of 100 %."""
    labels = {one.token_id: visible(token_label(reader.tokenizer, one.token_id)) for one in expectation.candidates}
    shown = next((c for c in expectation.candidates if c.token_id == asked), expectation.candidates[0])
    by_hand = say(
        "by_hand",
        token=f"“{labels[shown.token_id]}”",
        logit=say.number(shown.logit, 2),
        normaliser=say.number(expectation.log_normaliser, 2),
        # Of the rounded numbers: whoever does it by hand has only those.
        log_probability=say.number(round(shown.logit, 2) - round(expectation.log_normaliser, 2), 2),
        probability=say.probability(shown.probability),
    )
    left = say("left", num_left=say.number(expectation.num_left), num_ids=say.number(reader.vocabulary_size))
    facts = {"letter": reader.letter, "title": title, "asked": asked, "by_hand": by_hand, "left": left}
    return _fragment("candidates", say, facts, expectation.candidates, labels, clickable)
