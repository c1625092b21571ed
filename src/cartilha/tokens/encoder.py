"""The fast path of tokenization: gigatoken where it is proven to give the ids of `tokenizers`, `tokenizers` elsewhere.

    TextTokenizer --prove--> Proof --Encoder--> UTF-8 texts -> ids, counts

gigatoken is 10 to 25 times as fast and young, so no tokenizer is taken on trust: hard cases and the corpus's first
documents are encoded by both (`tokens/proof.py`). Documents that the fast path cannot serve go through `tokenizers` one
by one: those with characters that this Python's Unicode tables do not know, and those with bytes that the vocabulary
lacks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cartilha.storage import write_atomically
from cartilha.tokens.text_counts import CharacterClasses, TextCounts, count_texts, number_boundaries

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Longer texts are cut at the last space between two letters in a piece: memory stays bounded.
MAX_PIECE_CHARS = 4 << 20
CUT_WINDOW_CHARS = 1 << 16


@dataclass(frozen=True)
class Proof:
    """What was found when the fast path was put beside `tokenizers`; recorded in store.json.

    Attributes:
        backend: Which library encodes the texts.
        reason: Why, in words.
        num_texts: Texts compared, and `num_bytes` their size.
        slow_code_points: Ranges of characters whose documents go through `tokenizers`, beyond those that Python's
            Unicode tables do not know.
        can_cut: Whether a long text may be cut before a space that stands between letters, and each piece encoded by
            itself.
    """

    backend: Literal["gigatoken", "tokenizers"]
    reason: str
    num_texts: int
    num_bytes: int
    slow_code_points: tuple[tuple[int, int], ...] = ()
    can_cut: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Encoder:
    """Encodes UTF-8 texts to ids, on one core; the texts of a batch are counted on the way.

    Args:
        whole_json: The tokenizer as `tokenizers` writes it.
        fast_json: The same without special tokens and with a row for every byte; None where it is not proven.
        num_ids: One more than the largest id; larger ones mark bytes that the vocabulary lacks.
        proof: What was proven.
        split_numbers: Whether the fast path is to get each numeric character by itself, since its own splitter lacks
            that step (SmolLM2's and StarCoder's).
        slow: The `tokenizers` object of `whole_json` where there is one already; it is made when it is needed.
    """

    def __init__(
        self,
        whole_json: str,
        fast_json: str | None,
        num_ids: int,
        proof: Proof,
        split_numbers: bool = False,
        slow: Tokenizer | None = None,
    ) -> None:
        self._split_numbers = split_numbers
        self.whole_json, self.fast_json, self.num_ids, self.proof = whole_json, fast_json, num_ids, proof
        self._classes = CharacterClasses(proof.slow_code_points)
        self._slow = slow
        self._fast: Any = None
        if fast_json is not None:
            from gigatoken.gigatoken_rs import load_hf_json

            self._fast = load_hf_json(fast_json)

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, TextCounts]:
        """Encode a batch of texts, none of them long.

        Args:
            texts: Valid UTF-8.

        Returns:
            The ids of all texts one after the other (uint32), the number of ids of each (int64), and the counts.
        """
        counts = count_texts(texts, self._classes)
        if self._fast is None:
            ids = self._encode_slowly(texts)
            return _joined(ids), np.fromiter(map(len, ids), np.int64, len(ids)), counts
        flat, num_tokens = self._encode_fast(texts)
        again = counts.is_rare.copy()
        lacking = np.flatnonzero(flat >= self.num_ids)
        if len(lacking):
            again[np.searchsorted(np.cumsum(num_tokens), lacking, side="right")] = True
        if again.any():
            flat, num_tokens = self._replace(texts, flat, num_tokens, np.flatnonzero(again))
        return flat, num_tokens, counts

    def _encode_fast(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        if not self._split_numbers:
            return _flat(self._fast.encode_batch(list(texts), parallel=False))
        joined = b"".join(texts)
        starts = np.concatenate(([0], np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))))
        bounds = np.unique(np.concatenate((starts, number_boundaries(joined, self._classes))))
        places = bounds.tolist()
        pieces = [joined[begin:end] for begin, end in pairwise(places)]
        flat, piece_tokens = _flat(self._fast.encode_batch(pieces, parallel=False))
        ends = np.concatenate(([0], np.cumsum(piece_tokens)))
        return flat, np.diff(ends[np.searchsorted(bounds, starts)])

    def _replace(
        self, texts: Sequence[bytes], flat: np.ndarray, num_tokens: np.ndarray, which: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Put the ids of `tokenizers` in the place of some texts' ids."""
        slow = self._encode_slowly([texts[i] for i in which.tolist()])
        parts = np.split(flat, np.cumsum(num_tokens)[:-1])
        num_tokens = num_tokens.copy()
        for i, ids in zip(which.tolist(), slow, strict=True):
            parts[i] = ids
            num_tokens[i] = len(ids)
        return _joined(parts), num_tokens

    def _encode_slowly(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        if self._slow is None:
            from tokenizers import Tokenizer

            self._slow = Tokenizer.from_str(self.whole_json)
            self._slow.encode_special_tokens = True
        encodings = self._slow.encode_batch_fast([text.decode("utf-8") for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def with_proof(self, proof: Proof) -> Encoder:
        """This encoder, with what was proven of it."""
        other = copy.copy(self)
        other.proof = proof
        other._classes = CharacterClasses(proof.slow_code_points)
        return other

    def save(self, directory: Path) -> None:
        """Write what `load_encoder` needs."""
        values = [self.whole_json, self.fast_json, self.num_ids, self.proof.to_dict(), self._split_numbers]
        write_atomically(directory / "encoder.json", json.dumps(values))


def load_encoder(directory: Path) -> Encoder:
    """The encoder that was saved in a directory."""
    values = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    whole_json, fast_json, num_ids, proof, split_numbers = values
    proof["slow_code_points"] = tuple((first, last) for first, last in proof["slow_code_points"])
    return Encoder(whole_json, fast_json, num_ids, Proof(**proof), split_numbers)


def cut(texts: Iterator[str], max_chars: int = MAX_PIECE_CHARS) -> Iterator[str]:
    """Bring a long text, which comes in parts of any length, into pieces that can be encoded one by one.

    A piece ends before a space between two letters. Where the last part of a piece has none, it is cut anyway: its
    ids may then differ from those of the whole, its text does not.
    """
    rest = ""
    for part in texts:
        rest += part
        begin = 0
        while len(rest) - begin > max_chars:
            end = _last_cut(rest, begin, begin + max_chars)
            yield rest[begin:end]
            begin = end
        rest = rest[begin:]
    if rest:
        yield rest


def _last_cut(text: str, begin: int, end: int) -> int:
    """The last position from `begin` to `end` where a space stands between letters; `end` where there is none near."""
    first = max(begin + 1, end - CUT_WINDOW_CHARS)
    place = end
    while (place := text.rfind(" ", first, place)) > 0:
        if text[place - 1].isalpha() and text[place + 1].isalpha():
            return place
    return end


def _flat(encoded: Any) -> tuple[np.ndarray, np.ndarray]:
    """An awkward array of lists as flat values and lengths."""
    layout = encoded.layout
    offsets = np.asarray(layout.offsets.data, np.int64)
    if len(offsets) < 2:
        return np.zeros(0, np.uint32), np.zeros(0, np.int64)
    flat = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
    return flat, np.diff(offsets)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint32), *arrays])
