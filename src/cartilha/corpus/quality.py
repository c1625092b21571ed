"""Signs of poor text, by FineWeb-2's rules (Penedo et al. 2025, arXiv:2506.20920), most of them MassiveText's.

The rules are those of Rae et al. 2021 (arXiv:2112.11446, table A1) and of FineWeb. The thresholds of a language are
those that FineWeb-2 publishes (`cartilha.languages`). Words are runs of letters and digits, in lower case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cartilha.corpus.signatures import ODD, blocks, lower_case, mixed, word_hashes
from cartilha.errors import UserError
from cartilha.languages import Language, Thresholds, find_language, language_codes

BLOCK_CHARS = 1 << 18  # looked at together; the arrays stay in the processor's cache
LENGTH_BITS, HASH_BITS = 10, 39  # of an n-gram's number, whose other bits tell its text


_ENDS = (".", "!", "?", "…", '"', "'", "”", "’", "»")
_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")


def thresholds(language: Language) -> Thresholds:
    """Those of a language; a UserError says that there are none."""
    if language.thresholds is None:
        known = ", ".join(code for code in language_codes() if find_language(code).thresholds)
        raise UserError(
            f"The steps lines, words and ngrams have thresholds for {known} only, not for {language.code}; leave them"
            " out of --clean, or give a language file with FineWeb-2's (docs/extending.md)."
        )
    return language.thresholds


def line_fault(text: str, most: Thresholds) -> str:
    """The first rule about lines that a text breaks, empty if none; lists, menus and cut-off pages do."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    distinct, num_lines, num_chars = set(lines), len(lines), sum(map(len, lines))
    if num_lines - len(distinct) > most.repeated_lines * num_lines:
        return "repeated"
    if num_chars - sum(map(len, distinct)) > most.repeated_line_chars * num_chars:
        return "repeated"
    if sum(line.endswith(_ENDS) for line in lines) <= most.ending_lines * num_lines:
        return "no punctuation"
    if sum(line.startswith(_BULLETS) for line in lines) > most.bullet_lines * num_lines:
        return "bullets"
    if sum(line.endswith(_ELLIPSES) for line in lines) > most.ellipsis_lines * num_lines:
        return "ellipses"
    if len(lines) > 1 and text.count("\n") > most.lines_per_word * len(text.split()):
        return "few words"
    return ""


@dataclass(frozen=True)
class _Words:
    """The words of some texts; `firsts` has the number of each text's first word, and of all words at its end."""

    firsts: np.ndarray
    hashes: np.ndarray
    num_chars: np.ndarray  # of each word
    has_letter: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> _Words:
        lowered = lower_case(texts)
        data = b"\n".join(lowered)
        starts, ends, hashes = word_hashes(data)
        signs = np.frombuffer(data, np.uint8)
        begun = np.cumsum((signs & 0xC0) != 0x80, dtype=np.int32)  # characters, one byte of each
        digits = np.cumsum((signs - ord("0")) < 10, dtype=np.int32)
        has_letter = digits[ends - 1] - digits[starts] + 1 < ends - starts  # all but perhaps its first byte
        has_letter |= (signs[starts] - ord("0")) >= 10
        firsts = np.searchsorted(starts, np.cumsum([0, *(len(text) + 1 for text in lowered)]))
        return cls(firsts, hashes, (begun[ends - 1] - begun[starts] + 1).astype(np.int64), has_letter)

    def per_text(self, values: np.ndarray) -> np.ndarray:
        """The sums over each text's words."""
        sums: np.ndarray = np.diff(np.concatenate([[0], np.cumsum(values)])[self.firsts])
        return sums


def word_faults(texts: Sequence[str], most: Thresholds) -> Iterator[str]:
    """For each text the first rule about its words that it breaks, empty if none."""
    stop_words = word_hashes("\n".join(most.stop_words).encode("utf-8"))[2]
    for begin, end in blocks(texts, BLOCK_CHARS):
        own = texts[begin:end]
        words = _Words.of(own)
        num_words = np.diff(words.firsts)
        least = np.maximum(num_words, 1)
        symbols = np.array([max(text.count("#"), text.count("...") + text.count("…")) for text in own])
        mean = words.per_text(words.num_chars) / least
        broken = {
            "few": num_words < most.num_words[0],
            "many": num_words > most.num_words[1],
            "length": (mean < most.word_chars[0]) | (mean > most.word_chars[1]),
            "symbols": symbols > most.symbols_per_word * least,
            "no letters": words.per_text(words.has_letter) < most.letter_words * num_words,
            "no stop words": words.per_text(np.isin(words.hashes, stop_words)) < most.num_stop_words,
        }
        names = np.array([*broken, ""])
        yield from names[np.argmax([*broken.values(), np.ones(len(own), bool)], axis=0)].tolist()


def ngram_faults(texts: Sequence[str], most: Thresholds) -> Iterator[str]:
    """For each text the first rule about repeated n-grams of words that it breaks, empty if none."""
    for begin, end in blocks(texts, BLOCK_CHARS):
        own = texts[begin:end]
        words, sizes = _Words.of(own), np.array(list(map(len, own)))
        faults = [""] * len(own)
        for n, share in sorted(most.top_ngrams.items(), reverse=True):
            for i in np.flatnonzero(_top_chars(words, n) > share * sizes).tolist():
                faults[i] = f"top {n}"
        # What repeats longer n-grams repeats the shorter ones in them, so that most texts need one look.
        shortest, least = min(most.repeated_ngrams), min(most.repeated_ngrams.values())
        for i in np.flatnonzero(_repeated_bound(words, shortest) > least * sizes).tolist():
            part = slice(words.firsts[i], words.firsts[i + 1])
            for n, share in most.repeated_ngrams.items():
                chars = _repeated_chars(words.hashes[part], words.num_chars[part], n)
                if not faults[i] and chars > share * sizes[i]:
                    faults[i] = f"repeated {n}"
        yield from faults


def _hashes(words: np.ndarray, n: int) -> np.ndarray:
    """The hash of the n-gram that begins at each word."""
    result = words[: max(0, len(words) - n + 1)]
    for place in range(1, n):
        result = mixed(result * ODD + words[place : place + len(result)])
    return result


def _counted(words: _Words, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct n-grams of each text, in the order of the texts: the text's number, how often, the characters."""
    text = np.repeat(np.arange(len(words.firsts) - 1), np.diff(words.firsts))
    hashes = _hashes(words.hashes, n)
    ends = np.concatenate([[0], np.cumsum(words.num_chars)])
    num_chars = np.minimum(ends[n:] - ends[: len(hashes)] + n - 1, (1 << LENGTH_BITS) - 1)
    # One number to sort: the text, a part of the hash, the length, which the same n-grams share.
    keys = text[: len(hashes)].astype(np.uint64) << np.uint64(LENGTH_BITS + HASH_BITS)
    keys |= (hashes >> np.uint64(64 - HASH_BITS)) << np.uint64(LENGTH_BITS)
    keys |= num_chars.astype(np.uint64)
    keys = keys[text[: len(hashes)] == text[n - 1 :]]
    found, times = np.unique(keys, return_counts=True)
    lengths = (found & np.uint64((1 << LENGTH_BITS) - 1)).astype(np.int64)
    return (found >> np.uint64(LENGTH_BITS + HASH_BITS)).astype(np.int64), times, lengths


def _top_chars(words: _Words, n: int) -> np.ndarray:
    """The characters in the n-gram that each text has most often, if it has one twice."""
    text, times, lengths = _counted(words, n)
    result = np.zeros(len(words.firsts) - 1, np.int64)
    if len(text):
        texts, first = np.unique(text, return_index=True)
        best = np.maximum.reduceat(np.where(times > 1, times << LENGTH_BITS | lengths, 0), first)
        result[texts] = (best >> LENGTH_BITS) * (best & ((1 << LENGTH_BITS) - 1))
    return result


def _repeated_bound(words: _Words, n: int) -> np.ndarray:
    """At least the characters in n-grams that occurred before in each text; those in two of them count twice."""
    text, times, lengths = _counted(words, n)
    return np.bincount(text, (times - 1) * lengths, len(words.firsts) - 1)


def _repeated_chars(hashes: np.ndarray, num_chars: np.ndarray, n: int) -> int:
    """The characters of a text in n-grams that occurred before in it, each once."""
    ngrams = _hashes(hashes, n)
    again = np.ones(len(ngrams), bool)
    again[np.unique(ngrams, return_index=True)[1]] = False
    inside = np.zeros(len(hashes), bool)
    for place in range(n):
        inside[place : place + len(again)] |= again
    return int(num_chars[inside].sum() + np.count_nonzero(inside[1:] & inside[:-1]))
