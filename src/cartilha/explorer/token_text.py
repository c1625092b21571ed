"""Tokens as something a person can read: what each covers of a text, and what a single one stands for.

A byte-level token may be a part of a character (an emoji is often three or four tokens). In a text such parts are
numbered (`1/3`, `2/3`, `3/3`); alone, a token that is no whole character is shown by its bytes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from cartilha.tokens.byte_level import token_bytes
from cartilha.tokens.tokenizer import TextTokenizer

_UNSEEN = ("Cc", "Cf", "Co", "Cn", "Zl", "Zp")  # Unicode categories: controls, format marks, unassigned, separators


@dataclass(frozen=True)
class TokenText:
    """The characters [start, end) that a token covers of its text; those that share a character have all of it."""

    text: str
    start: int
    end: int
    part: int = 0  # 1 for the first of the tokens that share a character, and so on; 0 for a token that shares none
    num_parts: int = 0  # how many tokens share it; 0 for none


def token_texts(text: str, offsets: Sequence[tuple[int, int]]) -> list[TokenText]:
    """What each token covers; together they are the whole text.

    The offsets are the characters [start, end) of each token, as `tokenizers` gives them: in order, possibly without
    the space before a word, and the same for all tokens of one character.
    """
    sharing: list[int] = []  # how many tokens share each span
    spans: list[tuple[int, int]] = []
    covered = 0
    for start, end in offsets:
        if spans and (end <= covered or start < covered):
            sharing[-1] += 1
            spans[-1] = (spans[-1][0], max(covered, end))
        else:
            sharing.append(1)
            spans.append((covered, max(covered, end)))
        covered = spans[-1][1]
    if spans:
        spans[-1] = (spans[-1][0], len(text))  # what a tokenizer drops at the end belongs to nobody else
    pieces = []
    for num_tokens, (start, end) in zip(sharing, spans, strict=True):
        shares = [(part, num_tokens) for part in range(1, 1 + num_tokens)] if num_tokens > 1 else [(0, 0)]
        pieces += [TokenText(text[start:end], start, end, *share) for share in shares]
    return pieces


def token_label(tokenizer: TextTokenizer, token_id: int) -> str:
    """One token by itself: its text, its bytes in hexadecimal where they are no whole characters, or its name.

    Rows of the head that no token uses have no text: they are shown as `[row N]`.
    """
    token = tokenizer.backend.id_to_token(token_id)
    if token is None:
        return f"[row {token_id}]"
    special = tokenizer.backend.get_added_tokens_decoder().get(token_id)
    if special is not None:
        return str(special.content)
    known = token_bytes(token)
    if known is not None:
        try:
            return known.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"<{byte:02X}>" for byte in known)
    return token.replace("▁", " ")


_DRAWN = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}


def visible(label: str) -> str:
    """A token's text with its blanks and control characters drawn, for tables and buttons."""
    return "".join(
        _DRAWN.get(character)
        or (f"<U+{ord(character):04X}>" if unicodedata.category(character) in _UNSEEN else character)
        for character in label
    )
