"""The fragments of the page as HTML: what was computed, in one language's words. Everything from outside is escaped."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from cartilha.explorer.choices import Candidate, Expectation
from cartilha.explorer.curve import Curve, running_perplexity_chart
from cartilha.explorer.pieces import Piece, token_label, visible
from cartilha.explorer.reading import MAX_CHARS, Given, Reader, Reading
from cartilha.explorer.walking import Segment, StoredBlock, StoredDocument, StoreToken
from cartilha.explorer.wording import PageWording
from cartilha.explorer.writing import NUM_BEAMS, Continuations

BIN_BITS = (1, 2, 4, 8, 12)  # upper edges of the colour steps; the last step is open
CONTEXT_CHARS = 40


@cache
def _parts() -> Any:
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("parts.html.j2").module


def notice(text: str) -> str:
    """A sentence to the reader."""
    return str(_parts().notice(text))


def soft_help(text: str) -> str:
    """An explanation in small print."""
    return str(_parts().help(text))


def heading(text: str) -> str:
    """A heading of a part of the page."""
    return str(_parts().heading(text))


def header(say: PageWording, readers: Mapping[str, Reader], store: str | None) -> str:
    """Title, models and store, and the link to the page in the other language."""
    models = [
        {
            "letter": letter,
            "ref": reader.loaded.reference,
            "parameters": say.number(
                reader.loaded.num_parameters / 1e6, 1 if reader.loaded.num_parameters < 1e7 else 0
            ),
            "vocabulary": say.number(reader.vocabulary_size),
        }
        for letter, reader in readers.items()
    ]
    return str(_parts().header(say, "en" if say.language == "pt" else "pt", models, store))


def legend(say: PageWording) -> str:
    """The colour steps with the probabilities that they stand for."""
    edges = [0, *BIN_BITS]
    bins = [
        {"bits": f"{low}–{high}", "probability": f"> {_power(say, high)}"} for low, high in itertools.pairwise(edges)
    ]
    bins.append({"bits": f"≥ {edges[-1]}", "probability": f"≤ {_power(say, edges[-1])}"})
    return str(_parts().legend(say, bins))


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


def reading(
    say: PageWording, letter: str, reader: Reader, found: Reading, chosen: tuple[int, int] | None = None
) -> str:
    """A text with each token coloured by its surprisal, and the figures of the whole.

    Args:
        say: The language.
        letter: Of the model.
        reader: The model.
        found: The text as it reads it.
        chosen: Characters [start, end) whose tokens are marked.
    """
    tokens = [
        {
            "text": piece_text(piece),
            "part": f"{piece.part}/{piece.num_parts}" if piece.num_parts else "",
            "start": piece.start,
            "end": piece.end,
            "number": number,
            "chosen": chosen is not None and piece.start < chosen[1] and chosen[0] < piece.end,
            "level": level(float(bits)),
            "tip": _tip(say, piece, float(bits), int(rank)),
        }
        for number, (piece, bits, rank) in enumerate(zip(found.pieces, found.bits, found.rank, strict=True))
    ]
    evaluation = found.evaluation
    facts = {
        "letter": letter,
        "ref": reader.loaded.reference,
        "perplexity": say.perplexity(evaluation.perplexity),
        "bits_per_byte": say.bits(evaluation.bits_per_byte),
        "refused": evaluation.bits_per_byte is None,
        "num_tokens": say.number(len(found.ids)),
        "protocol": evaluation.protocol.describe(),
        "tokens": tokens,
    }
    return str(_parts().reading(say, facts))


def piece_text(piece: Piece) -> str:
    """A piece as it stands in the flow of the text: a line's end keeps its place and can be clicked."""
    return piece.text.replace("\r\n", "\n").replace("\n", "↵\n")


def _tip(say: PageWording, piece: Piece, bits: float, rank: int) -> str:
    token = visible(piece.text)
    if piece.num_parts:
        token = say("part_tip", part=piece.part, num_parts=piece.num_parts, text=token)
    return say(
        "token_tip",
        token=f"“{token}”",
        bits=say.number(bits, 2),
        probability=say.probability(2.0**-bits),
        rank=say.number(rank),
    )


def running_perplexity(say: PageWording, readings: Mapping[str, tuple[Reader, Reading]]) -> str:
    """The chart of the perplexity so far, of each model and of the uniform one."""
    curves = []
    for letter, (reader, found) in readings.items():
        chars = np.array([piece.end for piece in found.pieces])
        label = say("curve_model", letter=letter, ref=reader.loaded.reference)
        curves.append(Curve(letter.lower(), label, chars, found.running_perplexity))
    sizes = {letter: reader.vocabulary_size for letter, (reader, _) in readings.items()}
    last = max(curve.chars[-1] for curve in curves)
    for letter, size in sizes.items() if len(set(sizes.values())) > 1 else list(sizes.items())[:1]:
        key = "curve_uniform_of" if len(set(sizes.values())) > 1 else "curve_uniform"
        label = say(key, vocabulary=say.number(size), letter=letter)
        curves.append(Curve("uniform", label, np.array([0, last]), np.array([size, size], np.float64)))
    return str(running_perplexity_chart(curves, say))


def different_tokens(say: PageWording, readings: Mapping[str, tuple[Reader, Reading]]) -> str:
    """A warning where two models cut the text differently; else nothing."""
    cuts = {tuple(piece.end for piece in found.pieces) for _, found in readings.values()}
    return notice(say("different_tokens")) if len(cuts) > 1 else ""


def choices(say: PageWording, letter: str, reader: Reader, found: Reading, token: int, expectation: Expectation) -> str:
    """What a model expected at a token of the text: logits beside probabilities."""
    context = found.text[: found.pieces[token].start]
    tail = ("… " if len(context) > CONTEXT_CHARS else "") + visible(context[-CONTEXT_CHARS:]).replace("␣", " ").strip()
    title = say("choices_at", letter=letter, context=tail) if token else say("choices_start", letter=letter)
    return candidates(say, letter, reader, expectation, title=title, asked=int(found.ids[token]))


def candidates(
    say: PageWording,
    letter: str,
    reader: Reader,
    expectation: Expectation,
    *,
    title: str = "",
    asked: int | None = None,
    clickable: bool = False,
) -> str:
    """A table of candidates; the bars are shares of 100 %."""

    def row(candidate: Candidate) -> dict[str, Any]:
        return {
            "token_id": candidate.token_id,
            "rank": say.number(candidate.rank),
            "token": visible(token_label(reader.tokenizer, candidate.token_id)),
            "logit": say.number(candidate.logit, 2),
            "probability": say.probability(candidate.probability),
            "probability_width": f"{100 * candidate.probability:.1f}",
            "shaped": say.probability(candidate.shaped),
            "shaped_width": f"{100 * candidate.shaped:.1f}",
            "asked": candidate.token_id == asked,
        }

    rows = [row(candidate) for candidate in expectation.candidates]
    shown = next((c for c in expectation.candidates if c.token_id == asked), expectation.candidates[0])
    by_hand = say(
        "by_hand",
        token=f"“{visible(token_label(reader.tokenizer, shown.token_id))}”",
        logit=say.number(shown.logit, 2),
        normaliser=say.number(expectation.log_normaliser, 2),
        # Of the rounded numbers: whoever does it by hand has only those.
        log_probability=say.number(round(shown.logit, 2) - round(expectation.log_normaliser, 2), 2),
        probability=say.probability(shown.probability),
    )
    left = say("left", num_left=say.number(expectation.num_left), num_ids=say.number(reader.vocabulary_size))
    facts = {"letter": letter, "title": title, "rows": rows, "by_hand": by_hand, "left": left}
    return str(_parts().candidates(say, facts, clickable))


def draft(prompt: str, written: str) -> str:
    """A text being written: its beginning, and what was chosen."""
    return str(_parts().draft(prompt, written))


def three_ways(say: PageWording, prompt: str, found: Mapping[str, tuple[Reader, Continuations]]) -> str:
    """Greedy, sampled and beam search beside each other, a row a model."""
    models = [
        {
            "letter": letter,
            "ref": reader.loaded.reference,
            "prompt": prompt,
            "ways": [("greedy", texts.greedy), ("sampled", texts.sampled), ("beam", texts.beam)],
        }
        for letter, (reader, texts) in found.items()
    ]
    return str(_parts().three(say, models))


def three_help(say: PageWording) -> str:
    """What the three ways are."""
    return soft_help(say("three_help", beams=NUM_BEAMS))


def stored_document(say: PageWording, found: StoredDocument) -> str:
    """A document of a store, its tokens boxed."""
    facts = {
        "title": say("document_of", number=say.number(found.number + 1), total=say.number(found.num_documents)),
        "doc_id": found.doc_id,
        "line": say(
            "document_facts",
            tokens=say.number(found.num_tokens),
            words=say.number(found.num_words),
            bytes=say.number(found.num_bytes),
            source=found.source,
            domain=found.domain,
        ),
    }
    cut = len(found.tokens) < found.num_tokens
    shown = say("first_shown", shown=say.number(len(found.tokens))) if cut else ""
    return str(_parts().document(say, facts, _drawn(found.tokens), shown))


def stored_block(say: PageWording, found: StoredBlock) -> str:
    """A block of the training side, a box a piece of a document."""
    padding = sum(len(segment.tokens) for segment in found.segments if _is_padding(segment))
    facts = {
        "title": say("block_of", number=say.number(found.number + 1), total=say.number(found.num_blocks)),
        "line": say(
            "block_facts",
            segments=say.number(sum(not _is_padding(segment) for segment in found.segments)),
            targets=say.number(found.num_targets),
            padding=say.number(padding),
        ),
    }
    segments = [
        {
            "padding": say.number(len(segment.tokens)) if _is_padding(segment) else "",
            "begins": segment.begins,
            "continues": segment is found.segments[-1] and not segment.ends and found.number + 1 < found.num_blocks,
            "tokens": _drawn(segment.tokens),
        }
        for segment in found.segments
    ]
    return str(_parts().block(say, facts, segments))


def _is_padding(segment: Segment) -> bool:
    return segment.tokens[0].kind == "padding"


def _drawn(tokens: Sequence[StoreToken]) -> list[dict[str, Any]]:
    return [
        {"token_id": token.token_id, "kind": token.kind, "text": token.text.replace("\n", "↵\n")} for token in tokens
    ]
