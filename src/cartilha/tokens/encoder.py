"""The fast path of tokenization: gigatoken if it is proven to give the ids of `tokenizers`, else `tokenizers`.

gigatoken is 10 to 25 times as fast, but young, so each tokenizer is proven first (`tokens/proof.py`). Documents with
characters that Python's Unicode tables do not know, or with bytes that the vocabulary lacks, go through `tokenizers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from cartilha.storage import write_atomically
from cartilha.tokens.packed import joined
from cartilha.tokens.text_counts import CharacterClasses, TextCounts, count_texts, number_boundaries
from cartilha.tokens.tokenizer import TextTokenizer

# Longer texts are cut into pieces so that memory stays bounded.
MAX_PIECE_CHARS = 4 << 20
CUT_WINDOW_CHARS = 1 << 16
# gigatoken keeps the ids of each word that it has met, and texts never run out of new words. It is made anew after so
# much text: a hundred thousand words or two, and a fiftieth of the time of `prepare`.
RENEWED_AFTER_BYTES = 64 << 20

_character_classes = lru_cache(maxsize=4)(CharacterClasses)


@dataclass(frozen=True)
class Proof:
    """What the comparison of the fast path with `tokenizers` on some texts found; recorded in store.json.

    Attributes:
        reason: Why this library encodes the texts.
        slow_code_points: Ranges of further characters whose documents go through `tokenizers`.
        can_cut: Whether a long text may be cut before a space between letters, and its pieces encoded one by one.
    """

    backend: Literal["gigatoken", "tokenizers"]
    reason: str
    num_texts: int
    num_bytes: int
    slow_code_points: tuple[tuple[int, int], ...] = ()
    can_cut: bool = False


@dataclass(eq=False, repr=False)
class Encoder:
    """Encodes UTF-8 texts to ids on one core, and counts their words and characters.

    Attributes:
        whole_json: The tokenizer as `tokenizers` writes it.
        fast_json: The same without special tokens and with a row for every byte; None if it is not proven.
        num_ids: One more than the largest id; larger ones mark bytes that the vocabulary lacks.
        split_numbers: Whether numeric characters are split off first, a step (SmolLM2's) that gigatoken lacks.
        slow: The tokenizer of `whole_json` if it exists already, else it is made when it is needed.
    """

    whole_json: str
    fast_json: str | None
    num_ids: int
    proof: Proof
    split_numbers: bool = False
    slow: TextTokenizer | None = None

    def __post_init__(self) -> None:
        self._fast: Any = None
        self._bytes_left = 0  # until the fast tokenizer is made anew

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, TextCounts]:
        """Encode short UTF-8 texts: all ids in a row (uint32), the number of ids per text (int64), and the counts."""
        counts = count_texts(texts, _character_classes(self.proof.slow_code_points))
        if self.fast_json is None:
            return *joined(self._encode_slowly(texts)), counts
        self._renew(self.fast_json, sum(map(len, texts)))
        flat, num_tokens = self._encode_fast(texts)
        again = counts.is_rare.copy()
        lacking = np.flatnonzero(flat >= self.num_ids)
        again[np.searchsorted(np.cumsum(num_tokens), lacking, side="right")] = True
        if again.any():
            which = np.flatnonzero(again).tolist()
            parts = np.split(flat, np.cumsum(num_tokens)[:-1])
            for i, ids in zip(which, self._encode_slowly([texts[i] for i in which]), strict=True):
                parts[i] = ids
            return *joined(parts), counts
        return flat, num_tokens, counts

    def _renew(self, fast_json: str, num_bytes: int) -> None:
        """Make the fast tokenizer before its first text, and anew before it knows too many words."""
        if self._bytes_left <= 0:
            from gigatoken.gigatoken_rs import load_hf_json

            self._fast = None  # one at a time in memory
            self._fast, self._bytes_left = load_hf_json(fast_json), RENEWED_AFTER_BYTES
        self._bytes_left -= num_bytes

    def _encode_fast(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if not self.split_numbers:
            return _flat(self._fast.encode_batch(list(texts), parallel=False))
        data = b"".join(texts)
        starts = np.concatenate(([0], np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))))
        classes = _character_classes(self.proof.slow_code_points)
        bounds = np.unique(np.concatenate((starts, number_boundaries(data, classes))))
        pieces = [data[begin:end] for begin, end in pairwise(bounds.tolist())]
        flat, piece_tokens = _flat(self._fast.encode_batch(pieces, parallel=False))
        ends = np.concatenate(([0], np.cumsum(piece_tokens)))
        return flat, np.diff(ends[np.searchsorted(bounds, starts)])

    def _encode_slowly(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        if self.slow is None:
            self.slow = TextTokenizer(Tokenizer.from_str(self.whole_json), None, None, None)
            self.slow.backend.encode_special_tokens = True
        return self.slow.encode([text.decode("utf-8") for text in texts])

    def save(self, directory: Path) -> None:
        """Write what `load_encoder` needs."""
        values = [self.whole_json, self.fast_json, self.num_ids, asdict(self.proof), self.split_numbers]
        write_atomically(directory / "encoder.json", json.dumps(values))


def load_encoder(directory: Path) -> Encoder:
    """The encoder that was saved in a directory."""
    whole_json, fast_json, num_ids, proof, split_numbers = json.loads((directory / "encoder.json").read_text("utf-8"))
    proof["slow_code_points"] = tuple((first, last) for first, last in proof["slow_code_points"])
    return Encoder(whole_json, fast_json, num_ids, Proof(**proof), split_numbers)


def cut(text: str, max_chars: int = MAX_PIECE_CHARS) -> Iterator[str]:
    """Cut a long text into pieces that can be encoded one by one, each ending before a space between two letters.

    If there is no such space near the end of a piece, it is cut anyway: the ids may then differ from those of the text.
    """
    begin = 0
    while len(text) - begin > max_chars:
        end = _last_cut(text, begin, begin + max_chars)
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]


def _last_cut(text: str, begin: int, end: int) -> int:
    """The last position before `end` of a space between two letters; `end` if there is none near."""
    first = max(begin + 1, end - CUT_WINDOW_CHARS)
    place = end
    while (place := text.rfind(" ", first, place)) > 0:
        if text[place - 1].isalpha() and text[place + 1].isalpha():
            return place
    return end


def _flat(encoded: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of an awkward array of lists."""
    offsets = np.asarray(encoded.layout.offsets.data, np.int64)
    if len(offsets) < 2:
        return joined([])
    return np.asarray(encoded.layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
