"""FineWeb-2's rules: each fault is named, good text passes, and what is counted is what the rules say."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cartilha.corpus import quality
from cartilha.corpus.cleaning import GROUPS, Cleaner, Rejected
from cartilha.corpus.document import Document
from cartilha.corpus.primer import primer_texts
from cartilha.corpus.quality import _repeated_chars, _top_chars, _Words, thresholds
from cartilha.errors import UserError
from cartilha.languages import find_language

PROSE = next(text.text for text in primer_texts() if 250 < len(text.text.split()) < 400 and text.text.count("\n") < 12)


def judged(*texts: str, steps: tuple[str, ...] = GROUPS["fineweb"]) -> list[str]:
    """The reason why each text is rejected, empty if it is kept."""
    results = Cleaner(steps)([Document(text, str(i), "s", "d") for i, text in enumerate(texts)])
    return [result.reason if isinstance(result, Rejected) else "" for result in results]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE, ""),
        (PROSE + "\nInício.\nContato." * 10, "lines:repeated"),
        ("\n".join(f"Um menu {i} com palavras" for i in range(30)), "lines:no punctuation"),
        ("\n".join(f"• Um menu {i} com palavras." for i in range(30)), "lines:bullets"),
        ("\n".join(f"O texto {i} é assim e continua…" for i in range(30)), "lines:ellipses"),
        ("\n".join(f"Item {i}." for i in range(30)), "lines:few words"),
        ("Poucas palavras, e são todas boas.", "words:few"),
        ("a e o é. " * 30, "words:length"),
        ("inconstitucionalissimamente de a " + "antidesestabelecimentarismo " * 60 + ".", "words:length"),
        (" ".join(f"de {i}{i}{i} 2023 1999" for i in range(100, 130)) + ".", "words:no letters"),
        (PROSE + " #tudo" * 80 + ".", "words:symbols"),
        (re.sub(r"\b(de|a|e|o|em|d[oa]|que|uma?|n[oa]|com|para|é|foi)\b", "xyz", PROSE.lower()), "words:no stop words"),
        ("Compre já. " * 20 + PROSE, "ngrams:top 2"),
        (PROSE + "\n" + "\n".join(PROSE[i : i + 150] + "." for i in range(0, 600, 149)), "ngrams:repeated 5"),
    ],
)
def test_each_fault_is_named(text, reason):
    assert judged(text) == [reason]


def test_texts_of_a_batch_are_judged_apart(monkeypatch):
    texts = ["", PROSE, "Compre já. " * 20 + PROSE, "", PROSE + " #tudo" * 80 + ".", PROSE]
    alone = [judged(text)[0] for text in texts]
    assert judged(*texts) == alone and alone.count("") == 2
    monkeypatch.setattr(quality, "BLOCK_CHARS", 100)
    assert judged(*texts) == alone


def test_no_thresholds_for_another_language():
    with pytest.raises(UserError, match=r"thresholds for es, gl, pt only, not for ca"):
        Cleaner(["words"], language=find_language("ca"))


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def ngrams_of(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def naive_top(words: list[str], n: int) -> int:
    counts = Counter(ngrams_of(words, n))
    most = max(counts.values(), default=0)
    return max((len(" ".join(ngram)) * most for ngram, times in counts.items() if times == most > 1), default=0)


def naive_repeated(words: list[str], n: int) -> int:
    inside, seen = set[int](), set[tuple[str, ...]]()
    for place, ngram in enumerate(ngrams_of(words, n)):
        if ngram in seen:
            inside.update(range(place, place + n))
        seen.add(ngram)
    return sum(len(words[place]) for place in inside) + sum(place + 1 in inside for place in inside)


TEXTS = st.lists(
    st.lists(st.sampled_from(["a", "Não", "é", "12", "2a", "pão-de-ló", "casa."]), max_size=30).map(" ".join)
)


@example(["a a a", "", "a a a a a"])
@given(TEXTS)
def test_words_and_ngrams_are_counted_as_the_rules_say(texts):
    found = _Words.of(texts)
    words = [words_of(text) for text in texts]
    assert found.per_text(found.num_chars).tolist() == [sum(map(len, own)) for own in words]
    assert found.per_text(found.has_letter).tolist() == [sum(not word.isdigit() for word in own) for own in words]
    for n in (1, 2, 5):
        assert _top_chars(found, n).tolist() == [naive_top(own, n) for own in words]
        for i, own in enumerate(words):
            part = slice(found.firsts[i], found.firsts[i + 1])
            assert _repeated_chars(found.hashes[part], found.num_chars[part], n) == naive_repeated(own, n)


@given(TEXTS)
def test_the_quick_look_at_repetition_misses_nothing(texts):
    def faults() -> list[str]:
        return list(quality.ngram_faults(texts, thresholds(find_language("pt"))))

    quick = faults()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "_repeated_bound", lambda words, n: quality.np.full(len(words.firsts) - 1, 1 << 40))
        assert faults() == quick
