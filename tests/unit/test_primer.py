"""The primer: its size, mix and order, and that it is written anew, varied and well spelt.

Each check that is a function (shared runs, near-duplicates, distinct words, ...) is also given a copy of the primer
with a fault planted in it, and must find that fault: a check that finds nothing anywhere would pass for ever.
"""

from __future__ import annotations

import json
import lzma
import re
import shutil
import subprocess
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import pytest

from cartilha.corpus import primer
from cartilha.corpus.primer import PrimerText, primer_texts

FOLDER = Path(primer.__file__).parent
VARIETIES = ["pt-BR", "pt-PT", "pt-AO", "pt-MZ", "pt-CV"]
GENRES = [
    *("cronica", "ciencia", "dialogo", "receita", "carta", "noticia", "historia", "geografia"),
    *("instrucoes", "lenda", "trabalho-e-escola", "esporte", "musica", "tecnologia", "saude", "poema"),
]


@pytest.fixture(scope="module")
def texts() -> list[PrimerText]:
    return primer_texts()


def with_text(texts: Sequence[PrimerText], index: int, text: str) -> list[PrimerText]:
    """A copy of the primer in which one text is replaced."""
    copy = list(texts)
    copy[index] = replace(copy[index], text=text)
    return copy


def lower_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


# Form and size


def test_each_line_is_an_object_with_the_same_keys_in_order(texts):
    *lines, end = (FOLDER / "texts.jsonl").read_text(encoding="utf-8").split("\n")
    assert end == "" and len(lines) == 150
    for line, text in zip(lines, texts, strict=True):
        values = json.loads(line)
        assert list(values) == ["id", "title", "genre", "variety", "text"]
        assert all(isinstance(value, str) and value.strip() for value in values.values()), values["id"]
        assert values == vars(text)


def test_ids_and_titles_are_unique(texts):
    assert [name for name, count in Counter(text.id for text in texts).items() if count > 1] == []
    assert [name for name, count in Counter(text.title for text in texts).items() if count > 1] == []


def test_length(texts):
    num_words = {text.id: len(text.text.split()) for text in texts}
    assert sum(num_words.values()) >= 30_000, f"{sum(num_words.values())} words in all"
    outside = {name: count for name, count in num_words.items() if not 120 <= count <= 400}
    assert not outside, f"words of the texts that are too short or too long: {outside}"


def test_varieties_and_genres(texts):
    varieties = Counter(text.variety for text in texts)
    assert (varieties["pt-BR"], varieties["pt-PT"], varieties.total()) == (110, 30, 150), varieties
    assert set(varieties) == set(VARIETIES), varieties
    assert {text.genre for text in texts} == set(GENRES)


# Order: whoever takes the first hundred gets the same mix


def lopsided(texts: Sequence[PrimerText], first: int = 100, tolerance: float = 0.025) -> dict[str, float]:
    """The varieties and genres whose share of the first texts is not that of all, and by how much it differs.

    The tolerance is two and a half texts of a hundred, about what a random order misses by for a group of thirty of the
    150 (its standard deviation is 2.3 texts).
    """
    differences = {}
    for field in ("variety", "genre"):
        every = Counter(getattr(text, field) for text in texts)
        some = Counter(getattr(text, field) for text in texts[:first])
        for group in every:
            differences[group] = some[group] / first - every[group] / len(texts)
    return {group: difference for group, difference in differences.items() if abs(difference) > tolerance}


def test_the_first_hundred_are_representative(texts):
    assert not lopsided(texts), f"share of the first 100 less share of all: {lopsided(texts)}"
    assert {text.variety for text in texts[:100]} == set(VARIETIES)
    assert {text.genre for text in texts[:100]} == set(GENRES)


@pytest.mark.parametrize("field", ["variety", "genre"])
def test_a_sorted_order_is_not_representative(texts, field):
    assert lopsided(sorted(texts, key=lambda text: getattr(text, field)))


# Characters, and what a text is made of


def character_faults(text: str) -> list[str]:
    """What is wrong with a text's characters."""
    faults = []
    if not unicodedata.is_normalized("NFC", text):
        faults.append("not NFC")
    odd = {c for c in text if unicodedata.category(c)[0] in "CZ" and c not in " \n"}
    faults.extend(f"{c!a}: a control or format character, or a space of another kind" for c in sorted(odd))
    if "  " in text:
        faults.append("two spaces in a row")
    if re.search(r"^\s|\s\Z| $", text, flags=re.MULTILINE):
        faults.append("white space at the beginning or the end of a line or of the text")
    return faults


def test_characters(texts):
    faults = {text.id: character_faults(text.text) + character_faults(text.title) for text in texts}
    assert {name: found for name, found in faults.items() if found} == {}


@pytest.mark.parametrize(
    "fault",
    ["ma\u0303e", "a\tb", "a\r\nb", "a\u200bb", "a\xa0b", "a  b", "a \nb", "a\n b", "a\n", "\ufeffa", "a\u2028b"],
)
def test_faulty_characters_are_found(fault):
    assert character_faults("Uma mãe,\numa avó.") == []
    assert character_faults(fault)


MONTHS = "janeiro|fevereiro|março|abril|maio|junho|julho|agosto|setembro|outubro|novembro|dezembro"
ELEMENTS = {
    "names": r"[a-zà-ÿ],? [A-ZÀ-Ý][a-zà-ÿ]+",
    "dates": rf"\b\d{{1,2}}º? de (?:{MONTHS})\b|\b(?:{MONTHS}) de \d{{4}}\b",
    "numbers": r"\d",
    "quotations": r"“[^“”]+”|«[^«»]+»",
    "questions": r"\w[”»)]?\?",
}


def num_texts_with(pattern: str, texts: Iterable[PrimerText]) -> int:
    return sum(re.search(pattern, text.text) is not None for text in texts)


@pytest.mark.parametrize("element", ELEMENTS)
def test_elements_occur(texts, element):
    found = num_texts_with(ELEMENTS[element], texts)
    assert found >= 15, f"{element} in {found} of {len(texts)} texts"
    plain = [replace(text, text=re.sub(r"[\d“«?]", "", text.text.lower())) for text in texts]
    assert num_texts_with(ELEMENTS[element], plain) == 0


# Variety of words, and nothing said twice


def num_distinct(words: Iterable[str], first: int = 10_000) -> int:
    words = list(words)[:first]
    assert len(words) == first
    return len(set(words))


TOKENIZERS = {"split": lambda text: text.lower().split(), "word characters": lower_words}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_distinct_words_in_the_first_ten_thousand(texts, tokenizer):
    def measure(texts: Iterable[PrimerText]) -> int:
        return num_distinct(word for text in texts for word in TOKENIZERS[tokenizer](text.text))

    assert measure(texts) >= 3_300, f"{measure(texts)} distinct words in the first 10,000 ({tokenizer})"
    assert measure([*texts[:20], *texts[:20], *texts]) < 3_300


def shared_runs(texts: Iterable[PrimerText], length: int = 8) -> dict[str, list[str]]:
    """The runs of words that several texts contain, each with their ids; case and punctuation do not count."""
    owners: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for text in texts:
        words = lower_words(text.text)
        for run in zip(*(words[start:] for start in range(length)), strict=False):
            owners[run].add(text.id)
    return {" ".join(run): sorted(ids) for run, ids in owners.items() if len(ids) > 1}


def test_no_two_texts_share_a_run_of_eight_words(texts):
    assert shared_runs(texts) == {}


def test_a_shared_run_of_eight_words_is_found(texts):
    words = lower_words(texts[3].text)
    borrowed = " ".join(words[20:28])
    copy = with_text(texts, 140, f"{texts[140].text} Eis: {borrowed.upper()}! Fim.")
    assert shared_runs(copy) == {borrowed: sorted([texts[3].id, texts[140].id])}
    copy = with_text(texts, 140, f"{texts[140].text} Eis: {' '.join(words[20:27])}! Fim.")
    assert shared_runs(copy) == {}


def most_similar(texts: Iterable[PrimerText], length: int = 5) -> tuple[float, str, str]:
    """The largest Jaccard similarity of two texts' sets of runs of words, exact and over all pairs, and the two ids."""
    runs = []
    for text in texts:
        words = lower_words(text.text)
        runs.append((text.id, set(zip(*(words[start:] for start in range(length)), strict=False))))
    return max((len(a & b) / len(a | b), name, other) for (name, a), (other, b) in combinations(runs, 2))


def test_no_two_texts_are_near_duplicates(texts):
    similarity, name, other = most_similar(texts)
    assert similarity < 0.1, f"Jaccard similarity {similarity:.3f}: {name}, {other}"


def test_near_duplicates_are_found(texts):
    words = texts[7].text.split()
    pair = [texts[7].id, texts[120].id]
    reworded = " ".join("então" if place % 15 == 0 else word for place, word in enumerate(words))
    similarity, *found = most_similar(with_text(texts, 120, reworded))
    assert 0.3 < similarity < 1 and found == pair
    # A third of a text, put before another one, is found too.
    start = " ".join(words[: len(words) // 3])
    similarity, *found = most_similar(with_text(texts, 120, f"{start} {texts[120].text}"))
    assert similarity >= 0.1 and found == pair


def xz_ratio(texts: Iterable[PrimerText]) -> float:
    """How many times smaller the strongest setting of xz makes the texts."""
    data = "\n".join(text.text for text in texts).encode("utf-8")
    return len(data) / len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def test_xz_compresses_the_texts_at_most_three_times(texts):
    assert xz_ratio(texts) <= 3, f"{xz_ratio(texts):.3f} times"
    assert xz_ratio([*texts, *texts]) > 3


# Spelling


@dataclass(frozen=True)
class Spelling:
    """What a dictionary makes of some texts.

    Attributes:
        num_words: All words but names, and but those with a digit in them.
        unknown: Those of them that the dictionary does not have, with how often they occur.
    """

    num_words: int
    unknown: Counter[str]

    @property
    def share(self) -> float:
        return self.unknown.total() / self.num_words

    def __str__(self) -> str:
        words = ", ".join(f"{word} {count}" for word, count in self.unknown.most_common(20))
        return f"{self.unknown.total()} of {self.num_words} words unknown ({self.share:.2%}): {words}"


# Letters, with hyphens inside; the ordinal signs are letters in Unicode but words in no dictionary.
WORD = re.compile(r"(?<!\w)[^\W\d_ªº]+(?:-[^\W\d_ªº]+)*(?!\w)")


def words_and_names(texts: Iterable[PrimerText]) -> tuple[list[str], set[str]]:
    """Every word of the texts, and which of them are names.

    A name is a capitalised word that stands, at least once in these texts, inside a sentence: after another word of
    its line, with nothing but a space or a comma and a space between them. It is then a name wherever it has its
    capital, as at the beginning of another sentence; its lower-case twin is not a name. So a word is not excused for
    beginning a sentence, a verse, a quotation or an item of a list, nor for following a full stop (that of an
    abbreviation included), a colon or a dash.
    """
    words: list[str] = []
    names: set[str] = set()
    for line in (line for text in texts for line in text.text.split("\n")):
        end = None
        for match in WORD.finditer(line):
            words.append(match[0])
            if match[0][0].isupper() and end is not None and line[end : match.start()] in (" ", ", "):
                names.add(match[0])
            end = match.end()
    return words, names


def hunspell_unknown(words: Iterable[str], dictionary: str) -> set[str]:
    """The words that hunspell's dictionary lacks; of a word with hyphens it may name the unknown parts alone."""
    if shutil.which("hunspell") is None:
        pytest.skip("hunspell is not installed")
    # -i and bytes: whatever the locale and the platform's line ends are.
    command = ["hunspell", "-i", "utf-8", "-d", dictionary, "-l"]
    done = subprocess.run(command, input="".join(f"{word}\n" for word in words).encode("utf-8"), capture_output=True)
    complaint = done.stderr.decode("utf-8", errors="replace")
    if "Can't open affix or dictionary files" in complaint:
        pytest.skip(f"hunspell has no dictionary {dictionary}")
    assert done.returncode == 0, complaint
    return set(done.stdout.decode("utf-8").split())


def spelling(texts: Sequence[PrimerText], dictionary: str) -> Spelling:
    """Checks all words beside names with one run of hunspell; a word with hyphens is unknown if one part is."""
    words, names = words_and_names(texts)
    counts = Counter(word for word in words if word not in names)
    reported = hunspell_unknown(sorted(counts), dictionary)
    unknown = {word: count for word, count in counts.items() if not reported.isdisjoint([word, *word.split("-")])}
    return Spelling(counts.total(), Counter(unknown))


def of_dictionary(texts: Iterable[PrimerText], dictionary: str) -> list[PrimerText]:
    """Brazil's dictionary reads Brazil's texts, Portugal's all others."""
    return [text for text in texts if (text.variety == "pt-BR") == (dictionary == "pt_BR")]


@pytest.mark.parametrize("dictionary", ["pt_BR", "pt_PT"])
def test_spelling(texts, dictionary):
    # Words of the African varieties that Portugal's dictionary lacks (zungueira, machamba) count as unknown.
    texts = of_dictionary(texts, dictionary)
    words, names = words_and_names(texts)
    share_of_names = sum(word in names for word in words) / len(words)
    assert share_of_names < 0.1, f"{share_of_names:.2%} of the words are excused as names"
    found = spelling(texts, dictionary)
    assert found.share < 0.01, str(found)


@pytest.mark.parametrize("dictionary", ["pt_BR", "pt_PT"])
def test_misspelt_text_is_found(texts, dictionary):
    texts = of_dictionary(texts, dictionary)[:20]
    before = spelling(texts, dictionary)
    # Four misspellings: in lower case, at the beginning of a line and of a sentence, and in one part of a word.
    text = f"{texts[5].text}\nPortuguezmente falando, ele xegou. Asúcar ele trouxe, e um guarda-xuva."
    found = spelling(with_text(texts, 5, text), dictionary)
    assert found.unknown - before.unknown == Counter(["Portuguezmente", "xegou", "Asúcar", "guarda-xuva"])
    assert found.num_words == before.num_words + 10
    # One frequent word misspelt throughout is more than the texts may have.
    assert (
        spelling([replace(text, text=text.text.replace(" que ", " qeu ")) for text in texts], dictionary).share > 0.01
    )


def test_names(texts):
    text = "Ontem, Zubrina viu Xisto-Luz.\nZubrina riu. Qorvo voou: Pyxe. — Nhac, disse zubrina, dr. Fulk 4x100 e 2º."
    words, names = words_and_names([replace(texts[0], text=text)])
    assert names == {"Zubrina", "Xisto-Luz"}
    assert " ".join(words) == "Ontem Zubrina viu Xisto-Luz Zubrina riu Qorvo voou Pyxe Nhac disse zubrina dr Fulk e"


# What its page says


@pytest.mark.parametrize("language", ["English", "Portuguese"])
def test_readme_has_the_figures_of_the_texts(texts, language):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    english, portuguese = readme.split("\n# ")
    page = english if language == "English" else portuguese
    thousands = round(sum(len(text.text.split()) for text in texts) / 1000)
    assert (f"{thousands},000 words" if language == "English" else f"{thousands} mil palavras") in page
    counts = Counter((text.genre, text.variety) for text in texts)
    rows = {genre: [counts[genre, variety] for variety in VARIETIES] for genre in GENRES}
    rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    table = [re.findall(r"[\w-]+", line) for line in page.splitlines() if line.startswith("|") and "---" not in line]
    assert table[0][1:] == [*VARIETIES, "total"]
    written = {genre: [int(figure) for figure in figures] for genre, *figures in table[1:]}
    assert written == {genre: [*figures, sum(figures)] for genre, figures in rows.items()}
