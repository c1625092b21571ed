"""Protocols, and the windows through which a long document is scored, every token exactly once.

Later tokens are scored with the context that fits before them (Press et al., arXiv:2012.15832, section 2; for stride =
window lm-evaluation-harness' rolling log-likelihood).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass

from cartilha.errors import UserError

MAX_WINDOW = 2048


@dataclass(frozen=True)
class Protocol:
    """How documents are scored; two figures are comparable only where the hashes agree.

    Attributes:
        window: Most input positions, the prefix included.
        stride: New tokens that a later window scores.
        prefix_id: The token before each document: context, never scored.
    """

    name: str
    window: int
    stride: int
    prefix_id: int
    dtype: str

    @property
    def first_tokens(self) -> int | None:
        """The most tokens that are scored of a document, or None for all."""
        return first_tokens(self.name)

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits over all that defines the protocol."""
        return hashlib.sha256(json.dumps(astuple(self)).encode("ascii")).hexdigest()[:12]

    def describe(self) -> str:
        """The protocol in a line, to be printed with every number."""
        numbers = f"window {self.window}, stride {self.stride}, prefix {self.prefix_id}"
        return f"{self.name}, {numbers}, {self.dtype}, hash {self.hash}"


def first_tokens(name: str) -> int | None:
    """N of `first-N`, None for `full`; a UserError for any other protocol."""
    if name == "full":
        return None
    match = re.fullmatch(r"first-([1-9][0-9]*)", name)
    if match is None:
        raise UserError(f"There is no protocol {name!r}; use full, or first-N such as first-512.")
    return int(match[1])


def make_protocol(
    name: str, window: int | None, stride: int | None, *, prefix_id: int, dtype: str, context_length: int
) -> Protocol:
    """A protocol with its defaults filled in: window min(context, 2048), stride window / 2.

    A UserError refuses a window, a stride or a name that the model or the definition does not allow.
    """
    limit = first_tokens(name)
    window = min(context_length, MAX_WINDOW) if window is None else window
    if window > context_length:
        raise UserError(
            f"A window of {window} is beyond the model's context of {context_length}; use a smaller --window."
        )
    if limit is not None and limit > context_length:
        raise UserError(
            f"{name} is beyond the model's context of {context_length} tokens; use first-{context_length} or full."
        )
    if window < 1:
        raise UserError(f"A window of {window} is impossible; use --window 1 or more.")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UserError(f"The stride must lie between 1 and the window ({window}), not {stride}.")
    return Protocol(name, window, stride, prefix_id, dtype)


@dataclass(frozen=True)
class Window:
    """One forward pass over a part of a document.

    Attributes:
        first_input: Index of the first input token; -1 stands for the prefix.
        first_target: Index of the first token scored.
        past: One past the last token scored. The inputs are the tokens first_input to past - 2.
        document: Index of the document.
    """

    first_input: int
    first_target: int
    past: int
    document: int = 0

    @property
    def num_inputs(self) -> int:
        """Input positions."""
        return self.past - 1 - self.first_input

    @property
    def num_scored(self) -> int:
        """Tokens that this window scores."""
        return self.past - self.first_target


def document_windows(num_tokens: int, window: int, stride: int, document: int = 0) -> Iterator[Window]:
    """The windows of a document: together they score each of its tokens exactly once, in order.

    The first scores min(window, num_tokens) tokens after the prefix; each later one the next min(stride, remaining),
    its input being the `window` tokens that end just before the last token scored.
    """
    done = 0
    while done < num_tokens:
        past = min(num_tokens, done + (stride if done else window))
        yield Window(past - 1 - window if done else -1, done, past, document)
        done = past
