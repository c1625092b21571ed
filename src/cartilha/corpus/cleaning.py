"""Cleaning: named steps that mend a document or reject it with a reason; only the steps asked for are applied.

Each step begins with a test that clean text passes at hundreds of megabytes per second. Thresholds are those of C4
(Raffel et al. 2020, arXiv:1910.10683), mC4 and MassiveText (Rae et al. 2021, arXiv:2112.11446, table A1); `quality` has
those of FineWeb-2.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cartilha.corpus.document import Document
from cartilha.corpus.language import languages, load_identifier
from cartilha.corpus.quality import line_fault, ngram_faults, thresholds, word_faults
from cartilha.corpus.signatures import run_hashes
from cartilha.errors import UserError, import_extra
from cartilha.languages import DEFAULT, Language, Thresholds, find_language, language_codes

MIN_CHARS = 200  # of `short`, without white space at the ends
MAX_REPEATED_LINES, MAX_REPEATED_LINE_CHARS = 0.3, 0.2  # shares of a document's lines and of their characters
MAX_REPEATED_NGRAMS = 0.15  # share of a document's runs of about five words that occurred in it before
MAX_BOILERPLATE_CHARS = 250  # longer passages are text, which may mention cookies
PHRASE_CHARS = 40  # no phrase of `boilerplate` extends further from its anchor
_SENTENCE_ENDS = (". ", "! ", "? ")
# Of `language`: a short sample suffices for nearly all text in the wanted language (94 % of Portuguese, no Galician);
# otherwise a longer one decides, if it has enough letters.
GLANCE_CHARS, GLANCE_PLACES = 120, 2
SURE = 0.8
SAMPLE_CHARS, SAMPLE_PLACES = 240, 3
MIN_LETTERS = 20

# Controls except tab and line feed; characters without width; marks of text direction; line ends of Unicode.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Searches in the UTF-8 bytes are several times faster than in the text, because each begins with a fixed byte.
_CONTROL_BYTES = bytes((byte < 32 and byte not in b"\t\n") or byte == 127 for byte in range(256))
_C1_BYTES = re.compile(rb"\xc2[\x80-\x9f\xad]")
_NO_WIDTH_BYTES = re.compile(rb"\xe2(?:\x80[\x8b\x8e\x8f\xa8-\xae]|\x81[\xa0\xa6-\xa9])")
# UTF-8 read as Latin-1 or Windows-1252: a letter from U+00C0 to U+00FF and then a sign that does not follow letters.
# Also Windows-1252 read as Latin-1, where its dashes, quotes and ellipsis are controls (U+0080 to U+009F).
_MOJIBAKE_BYTES = re.compile(rb"\xc3[\x82-\xb4][\xc2\xc5\xc6\xcb\xe2]|\xc2[\x80-\x9f]")


@dataclass(frozen=True)
class Rejected:
    """A document that a step left out, as it was read; the reason names the step, and the language: `language:es`."""

    document: Document
    reason: str


Found = str | None  # a text, mended or the same object; None, or a `_Reason`, if it is rejected
Step = Callable[[Sequence[str]], Sequence[Found]]


class Cleaner:
    """Applies steps to documents, in the order of `STEPS`: mending before judging, cheap before expensive.

    `language` is what the step of that name keeps. A UserError says that a step needs an extra that is not installed,
    or has no thresholds for the language.
    """

    def __init__(self, steps: Sequence[str], language: Language | None = None) -> None:
        known = find_language(DEFAULT) if language is None else language
        self._steps = {name: make(known) for name, make in _MAKERS.items() if name in steps}

    def __call__(self, documents: Sequence[Document]) -> list[Document | Rejected]:
        """Each document, mended or the same object, or the reason why it is left out."""
        result: list[Document | Rejected] = list(documents)
        for name, step in self._steps.items():
            kept = [(i, document) for i, document in enumerate(result) if isinstance(document, Document)]
            for (i, document), text in zip(kept, step([document.text for _, document in kept]), strict=True):
                if text is None or isinstance(text, _Reason):
                    result[i] = Rejected(documents[i], text or name)
                elif text is not document.text:
                    result[i] = replace(document, text=text)
        return result


class _Reason(str):
    """A reason with detail; its type tells it from a text."""


def _each(judge: Callable[[str], Found]) -> Callable[[Language], Step]:
    """The maker of a step that looks at one text at a time, whatever the language."""
    return lambda language: lambda texts: [judge(text) for text in texts]


def _mojibake(language: Language) -> Step:
    """Mends text that was decoded wrongly, such as "vocÃª"; curly quotes and the like are kept."""
    ftfy = import_extra("ftfy", "Cleaning", "text")  # reads about 5 MB/s, the search below 400
    search = _MOJIBAKE_BYTES.search
    return lambda texts: [ftfy.fix_encoding(text) if search(text.encode("utf-8")) else text for text in texts]


def _nfc(text: str) -> str:
    """Joins letters and their accents: one code point where Unicode has one."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _control(text: str) -> str:
    """Removes control characters and characters without width; other line ends become line feeds."""
    data = text.encode("utf-8")
    found = b"\1" in data.translate(_CONTROL_BYTES) or b"\xef\xbb\xbf" in data
    found = found or bool(_C1_BYTES.search(data) or _NO_WIDTH_BYTES.search(data))
    return _CONTROLS.sub("", _LINE_ENDS.sub("\n", text)) if found else text


def _boilerplate(language: Language) -> Step:
    """Removes short lines and sentences in which sites speak of themselves: cookies, rights, sharing, placeholders.

    The phrases are those of all built-in languages, whatever the text's: a site's banner is often in another one.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    # Arrow's expressions (RE2) search for all phrases in one pass, in a tenth of the time that their anchors take.
    phrases = _all_phrases([*map(find_language, language_codes()), language])
    any_phrase = "|".join(f"(?:{pattern.pattern})" for pattern in phrases.values())

    def step(texts: Sequence[str]) -> list[Found]:
        found = pc.match_substring_regex(pa.array(texts, pa.large_string()), any_phrase, ignore_case=True).to_pylist()
        return [_without(phrases, text) if has else text for text, has in zip(texts, found, strict=True)]

    return step


def _all_phrases(languages: Iterable[Language]) -> dict[str, re.Pattern[str]]:
    """The phrases of some languages by their anchors, without which a text is passed over at once."""
    found: dict[str, dict[str, None]] = {}
    for language in languages:
        for anchor, phrases in language.boilerplate.items():
            found.setdefault(anchor, {}).update(dict.fromkeys(phrases))
    return {anchor: re.compile("|".join(phrases)) for anchor, phrases in found.items()}


def _without(phrases: dict[str, re.Pattern[str]], text: str) -> Found:
    lowered = text.lower()
    if len(lowered) != len(text):  # a few capitals become two small letters
        lowered = text
    kept, done = [], 0
    for begin, end in sorted({_segment(text, place) for place in _places(phrases, lowered)}):
        if begin < end:
            kept.append(text[done:begin])
            done = max(done, end)
    left = "".join([*kept, text[done:]])
    return left if not kept or left.strip() else None


def _places(phrases: dict[str, re.Pattern[str]], lowered: str) -> Iterator[int]:
    for anchor, pattern in phrases.items():
        place = lowered.find(anchor)
        while place >= 0:
            if pattern.search(lowered, max(0, place - PHRASE_CHARS), place + len(anchor) + PHRASE_CHARS):
                yield place
            place = lowered.find(anchor, place + len(anchor))


def _segment(text: str, place: int) -> tuple[int, int]:
    """The line around a place, with its end; in a long line the sentence; nothing if that is long, too."""
    begin, end = text.rfind("\n", 0, place) + 1, text.find("\n", place) + 1 or len(text)
    if end - begin > MAX_BOILERPLATE_CHARS:
        before = [found + 2 for sign in _SENTENCE_ENDS if (found := text.rfind(sign, begin, place)) >= 0]
        after = [found + 2 for sign in _SENTENCE_ENDS if (found := text.find(sign, place, end)) >= 0]
        begin, end = max([begin, *before]), min([end, *after])
    return (begin, end) if end - begin <= MAX_BOILERPLATE_CHARS else (place, place)


def _short(text: str) -> Found:
    return text if len(text) >= MIN_CHARS and len(text.strip()) >= MIN_CHARS else None


def _repeated_lines(text: str) -> Found:
    """Rejects texts in which many lines occurred before: lists, menus, listings."""
    lines = [line for line in (line.strip() for line in text.split("\n")) if line]
    distinct = set(lines)
    num_chars = sum(map(len, lines))
    repeated, repeated_chars = len(lines) - len(distinct), num_chars - sum(map(len, distinct))
    alike = repeated > MAX_REPEATED_LINES * len(lines) or repeated_chars > MAX_REPEATED_LINE_CHARS * num_chars
    return None if alike else text


def _repeated_ngrams(text: str) -> Found:
    """Rejects texts that repeat the same words over and over."""
    hashes = run_hashes(text.encode("utf-8"))
    hashes.sort()
    repeated = np.count_nonzero(hashes[1:] == hashes[:-1])
    return None if repeated > MAX_REPEATED_NGRAMS * len(hashes) else text


def _language(language: Language) -> Step:
    """Keeps texts in one language, which py3langid tells from a sample; a text with too few letters is kept."""
    import_extra("py3langid", "Cleaning", "text")
    wanted = language.identified_as

    def step(texts: Sequence[str]) -> list[Found]:
        identifier = load_identifier()  # takes half a second: only processes that clean load it
        if wanted not in identifier.labels:
            raise UserError(f"py3langid knows no language {wanted!r} to keep; leave `language` out of --clean.")
        glances = languages(identifier, [_sample(text, GLANCE_CHARS, GLANCE_PLACES) for text in texts])
        result: list[Found] = list(texts)
        doubtful = [i for i, (found, share) in enumerate(glances) if not (found == wanted and share > SURE)]
        samples = [_sample(texts[i], SAMPLE_CHARS, SAMPLE_PLACES) for i in doubtful]
        for i, sample, (found, _) in zip(doubtful, samples, languages(identifier, samples), strict=True):
            if found != wanted and sum(map(str.isalpha, sample)) >= MIN_LETTERS:
                result[i] = _Reason(f"language:{found}")
        return result

    return step


def _sample(text: str, num_chars: int, num_places: int) -> str:
    """A bounded part of the text, from several places: a page's head and foot are often in another language."""
    if len(text) <= 2 * num_chars:
        return text[:num_chars]
    size, stride = num_chars // num_places, len(text) // num_places
    return " ".join(text[begin : begin + size] for begin in range((stride - size) // 2, len(text) - size, stride))


def _by_faults(name: str, faults: Callable[[Sequence[str], Thresholds], Iterator[str]]) -> Callable[[Language], Step]:
    """The maker of a step that rejects texts by the first fault of each, as `quality` names it."""

    def make(language: Language) -> Step:
        most = thresholds(language)
        return lambda texts: [
            _Reason(f"{name}:{fault}") if fault else text
            for fault, text in zip(faults(texts, most), texts, strict=True)
        ]

    return make


_MAKERS: dict[str, Callable[[Language], Step]] = {
    "mojibake": _mojibake,
    "control": _each(_control),
    "nfc": _each(_nfc),
    "boilerplate": _boilerplate,
    "short": _each(_short),
    "language": _language,
    "repeated_lines": _each(_repeated_lines),
    "repeated_ngrams": _each(_repeated_ngrams),
    "lines": _by_faults("lines", lambda texts, most: (line_fault(text, most) for text in texts)),
    "words": _by_faults("words", word_faults),
    "ngrams": _by_faults("ngrams", ngram_faults),
}
STEPS = tuple(_MAKERS)
GROUPS = {"web": STEPS[:-3], "fineweb": STEPS[-3:], "none": ()}


def named_steps(names: Iterable[str]) -> tuple[str, ...]:
    """The steps that `--clean` names, those of groups among them; a UserError says that there is none of that name."""
    steps = tuple(step for name in names for step in GROUPS.get(name, (name,)))
    if unknown := [step for step in steps if step not in _MAKERS]:
        raise UserError(f"There is no cleaning step {unknown[0]!r}; choose web, fineweb, or from {', '.join(STEPS)}.")
    return steps
