"""Questions in a text: every run of their words is found, however it is written, and nothing else is."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cartilha.corpus import questions as module
from cartilha.corpus.document import Document
from cartilha.corpus.primer import primer_texts
from cartilha.corpus.questions import (
    LEAST_WORDS,
    MAX_SHARING,
    RUN_WORDS,
    Contaminated,
    Question,
    QuestionFinder,
    QuestionRuns,
    load_runs,
    record_texts,
)

# Two texts of each of the primer's first fifty, of 20 words: a hundred questions that no other text holds.
WORDS = [text.text.split() for text in primer_texts() if len(text.text.split()) >= 40]
QUESTIONS = [" ".join(words[begin : begin + 20]) for words in WORDS[:50] for begin in (0, 20)]


def finder(*texts: str) -> QuestionFinder:
    return QuestionFinder(QuestionRuns.of(Question("prova", str(i), (text,)) for i, text in enumerate(texts)))


def found(find: QuestionFinder, texts: list[str]) -> list[tuple[int, ...]]:
    """The numbers of the questions in each text."""
    results = find([Document(text, str(i), "s", "d") for i, text in enumerate(texts)])
    return [result.questions if isinstance(result, Contaminated) else () for result in results]


@pytest.fixture(scope="module")
def paragraphs(shared) -> list[str]:
    lines = (line for path in sorted((shared / "text").glob("*.txt")) for line in path.read_text("utf-8").split("\n"))
    return [line for line in lines if line][:10_000]


def changed(text: str, rng: random.Random) -> str:
    """The same words with other case, punctuation and white space."""
    words = [rng.choice([word, word.upper(), word.title(), word.strip(".,;:!?"), f"“{word}”"]) for word in text.split()]
    return rng.choice([" ", "\n", ", ", " – "]).join(words)


def test_planted_questions_are_found_and_ten_thousand_paragraphs_hold_none(paragraphs):
    find, rng = finder(*QUESTIONS), random.Random(0)
    assert len(paragraphs) == 10_000 and set(found(find, paragraphs)) == {()}
    pairs = list(zip(QUESTIONS, paragraphs[::90], paragraphs[1::90], strict=False))
    verbatim = found(find, [f"{before} {question} {after}" for question, before, after in pairs])
    assert verbatim == [(number,) for number in range(100)]
    other = found(find, [f"{before}\n{changed(question, rng)}\n{after}" for question, before, after in pairs])
    assert sum(number in numbers for number, numbers in enumerate(other)) >= 95


def test_how_long_a_run_must_be():
    words = [f"palavra{chr(97 + n)}" for n in range(20)]
    long, short, shortest = words[:RUN_WORDS], words[:LEAST_WORDS], words[: LEAST_WORDS - 1]
    assert found(finder(" ".join(words)), [" ".join(long), " ".join(long[:-1])]) == [(0,), ()]
    assert found(finder(" ".join(short)), [" ".join(["e", *short, "e"]), " ".join(shortest)]) == [(0,), ()]
    runs = QuestionRuns.of([Question("prova", "1", (" ".join(shortest), "sim"))])
    assert not len(runs.keys) and runs.benchmarks[0].num_too_short == 1


def test_a_run_ends_with_its_document():
    words = QUESTIONS[0].split()
    assert found(finder(QUESTIONS[0]), [" ".join(words[:12]), " ".join(words[12:])]) == [(), ()]
    assert found(finder(QUESTIONS[0]), ["", " ".join(words), ""]) == [(), (0,), ()]


def test_the_span_is_as_the_document_writes_it():
    text = f"Ontem: {QUESTIONS[3].upper()}!"
    (result,) = finder(QUESTIONS[3])([Document(text, "1", "s", "d")])
    assert isinstance(result, Contaminated) and result.reason == "contaminated:prova" and result.questions == (0,)
    assert result.span in text and len(result.span.split()) >= 12


def test_words_that_many_questions_share_are_instructions():
    instructions = "Leia com atenção o texto que se segue e escolha depois a única alternativa correta entre as cinco."
    # Each question's own words have other initials, so that no two share a run.
    many = [f"{instructions} {' '.join(f'{chr(97 + n)}{chr(97 + i)}x' for i in range(15))}" for n in range(20)]
    runs = QuestionRuns.of(Question("prova", str(n), (text,)) for n, text in enumerate(many))
    assert runs.benchmarks[0].num_common_runs == len(instructions.split()) - RUN_WORDS + 1
    assert found(QuestionFinder(runs), [instructions, many[7][-80:]]) == [(), (7,)]
    few = QuestionRuns.of(Question("prova", str(n), (text,)) for n, text in enumerate(many[:MAX_SHARING]))
    assert found(QuestionFinder(few), [instructions]) == [tuple(range(MAX_SHARING))]


def test_runs_of_several_benchmarks_come_back_from_their_file(tmp_path):
    questions = [Question(name, f"{name}:{i}", (text,)) for name in ("a", "ç") for i, text in enumerate(QUESTIONS[:3])]
    runs = QuestionRuns.of(questions)
    runs.save(tmp_path / "questions.npz")
    again = load_runs(tmp_path / "questions.npz")
    assert again.fingerprint == runs.fingerprint and again.ids == runs.ids and again.benchmarks == runs.benchmarks
    assert [again.benchmark_of(number) for number in range(6)] == ["a", "a", "a", "ç", "ç", "ç"]
    assert found(QuestionFinder(again), [QUESTIONS[1]]) == [(1, 4)]
    assert QuestionRuns.of(questions[:-1]).fingerprint != runs.fingerprint


def test_the_texts_of_a_record_are_found_however_deep():
    record = {"id": 7, "pergunta": "Quem?", "opções": {"texto": ["Eu", "Tu"], "letra": ["A", None]}}
    assert list(record_texts(record)) == ["Quem?", "Eu", "Tu", "A"]


def naive(question: str, text: str) -> bool:
    """The rule, retold on lists of words."""

    def words(of: str) -> list[str]:
        composed = unicodedata.normalize("NFC", of).lower()
        return "".join(sign if sign.isalnum() else " " for sign in composed).split()

    own, other = words(question), words(text)
    size = min(RUN_WORDS, len(own))
    runs = {tuple(own[i : i + size]) for i in range(len(own) - size + 1)} if size >= LEAST_WORDS else set()
    return any(tuple(other[i : i + size]) in runs for i in range(len(other) - size + 1))


# Few words, so that runs come together by chance; most initials are alike.
TEXT = st.lists(st.sampled_from(["á", "a\u0301", "Á", "ao", "AO", "às", "2"]), max_size=40).flatmap(
    lambda words: st.sampled_from([" ", ", ", " – ", "\n"]).map(lambda sign: sign.join(words))
)


@example(["á " * 8], ["Á, " * 8])
@example(["ao " * 13], ["AO " * 12 + "às"])
@given(st.lists(TEXT, min_size=1, max_size=4), st.lists(TEXT, max_size=4))
def test_what_is_found_is_what_the_rule_says(questions, texts):
    expected = [tuple(i for i, one in enumerate(questions) if naive(one, text)) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        for block in (8, module.BLOCK_CHARS):  # the cuts between blocks change nothing
            patch.setattr(module, "BLOCK_CHARS", block)
            assert found(finder(*questions), texts) == expected
