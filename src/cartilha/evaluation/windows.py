"""Protocols, and the windows through which a long document is scored, every token exactly once.

The sliding window follows the usual practice (Press et al., arXiv:2012.15832, section 2; lm-evaluation-harness'
rolling log-likelihood for stride = window): later tokens are scored with the context that fits before them.
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
        name: `full` or `first-N`.
        window: Most input positions, the prefix included.
        stride: New tokens that a later window scores.
        prefix_id: The token before each document: context, never scored.
        dtype: Name of the compute dtype.
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
        parts = f"{self.name}, window {self.window}, stride {self.stride}, prefix {self.prefix_id}, {self.dtype}"
        return f"{parts}, hash {self.hash}"


def first_tokens(name: str) -> int | None:
    """N of `first-N`, None for `full`.

    Raises:
        UserError: There is no such protocol.
    """
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

    Raises:
        UserError: No such protocol, or a window or stride that the model or the definition does not allow.
    """
    limit = first_tokens(name)
    if window is None:
        window = min(context_length, MAX_WINDOW)
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
    if stride is None:
        stride = max(1, window // 2)
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
    """

    first_input: int
    first_target: int
    past: int

    @property
    def num_inputs(self) -> int:
        """Input positions."""
        return self.past - 1 - self.first_input

    @property
    def num_scored(self) -> int:
        """Tokens that this window scores."""
        return self.past - self.first_target


def document_windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """The windows of a document: together they score each of its tokens exactly once, in order.

    The first scores min(window, num_tokens) tokens after the prefix; each later one the next min(stride, remaining),
    its input being the `window` tokens that end just before the last token scored.
    """
    if num_tokens == 0:
        return
    done = min(window, num_tokens)
    yield Window(-1, 0, done)
    while done < num_tokens:
        past = done + min(stride, num_tokens - done)
        yield Window(past - 1 - window, done, past)
        done = past
