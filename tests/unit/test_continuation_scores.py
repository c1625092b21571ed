"""Continuations held against what really follows: cuts, ROUGE-L and distinct-n by hand, sacrebleu as the peer."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cartilha.corpus.document import Document
from cartilha.errors import UserError
from cartilha.evaluation.continuation_scores import (
    ContinuationScores,
    Cut,
    continuation_measures,
    cut_documents,
    derangement,
    distinct_ngrams,
    first_words,
    longest_common_subsequence,
    repeated_ngrams,
    rouge_l,
    score_continuations,
    tokenize_words,
)

needs_sacrebleu = pytest.mark.skipif(
    importlib.util.find_spec("sacrebleu") is None, reason="needs sacrebleu (extra `eval`)"
)

CUTS = [
    Cut("a", "A vaca foi", " para o pasto verde, e lá ficou até à noite."),
    Cut("b", "O menino viu", " uma onça no mato: correu depressa para casa!"),
    Cut("c", "Na cozinha da avó", "\nhavia pão quente, café e bolo de fubá."),
    Cut("d", "Choveu muito em", " São João; a educação das crianças parou três dias."),
]
PERFECT = [cut.reference for cut in CUTS]


def documents(num: int = 30, num_words: int = 12) -> list[Document]:
    """Texts of made-up words, all different."""
    draw = random.Random(7)
    return [
        Document(" ".join(f"ação{i}x{draw.randrange(10**6)}" for _ in range(num_words)), f"doc-{i}", "here", "test")
        for i in range(num)
    ]


def usual_words(text: str) -> list[str]:
    """The tokenizer of the rouge-score package (0.1.2, `tokenize.py`) without stemming."""
    return [word for word in re.split(r"\s+", re.sub(r"[^a-z0-9]+", " ", text.lower())) if word]


# Words


def test_words_with_accents_stay_whole_where_the_usual_tokenizer_splits_them() -> None:
    assert usual_words("A educação") == ["a", "educa", "o"]
    assert tokenize_words("A educação") == ["a", "educação"]
    assert tokenize_words("«Não» à 1ª irmã: guarda-chuva d’água_fria") == [
        *("não", "à", "1ª", "irmã", "guarda", "chuva", "d", "água", "fria")
    ]


def test_the_usual_tokenizer_sees_likeness_where_there_is_none() -> None:
    # "ação" and "não" share the splinter "o"; "é" and "à" vanish.
    hypothesis, reference = "ação", "não"
    assert set(usual_words(hypothesis)) & set(usual_words(reference)) == {"o"}
    assert rouge_l(hypothesis, reference) == 0.0
    assert usual_words("é à") == [] and rouge_l("é à", "é à") == 1.0


def test_composed_and_decomposed_capital_and_small_are_the_same_words() -> None:
    text = "A EDUCAÇÃO de São João"
    assert tokenize_words(unicodedata.normalize("NFD", text)) == tokenize_words(text.lower())
    assert tokenize_words("edu\u00adcação") == ["educação"]
    assert tokenize_words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]  # vowel signs are marks
    assert tokenize_words("amor \u2764\ufe0f 3") == ["amor", "3"]  # a heart and its variation selector, which is a mark


@given(st.text(st.characters(max_codepoint=127)))
def test_on_ascii_the_words_are_the_usual_ones(text: str) -> None:
    assert tokenize_words(text) == usual_words(text)


# ROUGE-L, distinct-n and repetition by hand


def test_rouge_l_by_hand() -> None:
    # Lin 2004, section 3.1: S1 = police killed the gunman; S2 = police kill the gunman; S3 = the gunman kill police.
    # LCS 3 and 2 of 4 words on both sides.
    assert rouge_l("police kill the gunman", "police killed the gunman") == 3 / 4
    assert rouge_l("the gunman kill police", "police killed the gunman") == 2 / 4
    # "o gato" of 2 and 5 words: P = 1, R = 2/5, F1 = 4/7.
    assert rouge_l("o gato", "O velho gato preto dormiu.") == pytest.approx(4 / 7, abs=1e-15)
    assert rouge_l("O velho gato preto dormiu.", "o gato") == pytest.approx(4 / 7, abs=1e-15)
    assert rouge_l("", "o gato") == 0.0 == rouge_l("cão", "o gato")


words = st.lists(st.sampled_from("abc"), max_size=12)


@given(words, words)
def test_the_bit_parallel_subsequence_is_that_of_the_table(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(a, b) == table[-1][-1]


def test_distinct_n_by_hand() -> None:
    texts = [["a", "b", "a", "b"], ["a", "b", "c"], []]
    assert distinct_ngrams(texts, 1) == 3 / 7  # a b c in 7 words
    assert distinct_ngrams(texts, 2) == 3 / 7  # ab ba bc: no pair crosses from text to text, and words are what divides
    assert distinct_ngrams([[], []], 1) is None


def test_repeated_4grams_by_hand() -> None:
    # a b c d a b c d a: 6 4-grams, 4 of them new (abcd bcda cdab dabc); the other text repeats nothing of its own.
    texts = [["a", "b", "c", "d", "a", "b", "c", "d", "a"], ["a", "b", "c", "d", "e"], ["a", "b", "c"]]
    assert repeated_ngrams(texts, 4) == 2 / 8
    assert repeated_ngrams([["a", "b", "c"]], 4) is None


@given(st.integers(2, 60), st.integers(0, 2**32))
def test_nothing_keeps_its_place_in_a_derangement(num: int, seed: int) -> None:
    order = derangement(num, seed)
    assert sorted(order) == list(range(num))
    assert all(i != other for i, other in enumerate(order))
    assert order == derangement(num, seed)


# Cuts


def test_a_cut_is_the_beginning_of_its_document() -> None:
    text = "  Era uma\u00a0vez, na\n\nfazenda,\tuma vaca. Fim"
    (cut,), *_ = cut_documents([Document(text, "x", "here", "test")], 3, prompt_words=4, reference_words=3)
    assert cut == Cut("x", "  Era uma\u00a0vez, na", "\n\nfazenda,\tuma vaca.")
    assert first_words("um dois ", 5) == "um dois" and first_words("  ", 5) == ""


def test_a_cut_is_never_inside_a_word() -> None:
    # Random text has little white space: some of every kind is put in.
    spaces = [" ", "\n", "\t", "\u00a0", "\u2003", "\u3000", "\x1f", "\u0085", "\r\n"]
    some_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
    pieces = st.tuples(some_text, st.sampled_from(spaces)).map("".join)
    outcomes: Counter[str] = Counter()

    @settings(max_examples=300)
    @given(st.lists(pieces, min_size=3, max_size=12).map("".join), st.integers(1, 3), st.integers(1, 3))
    def check(text: str, prompt_words: int, reference_words: int) -> None:
        document = Document(text, "x", "here", "test")
        right = text.split()[prompt_words : prompt_words + reference_words]
        try:
            (cut,), *_ = cut_documents([document], 1, prompt_words=prompt_words, reference_words=reference_words)
        except UserError:
            assert len(right) < reference_words or not tokenize_words(" ".join(right))
            outcomes["passed over"] += 1
            return
        outcomes["cut"] += 1
        assert text.startswith(cut.prompt + cut.reference)
        assert cut.prompt.split() == text.split()[:prompt_words]
        assert cut.reference.split() == right and len(right) == reference_words
        assert not cut.prompt[-1].isspace() and cut.reference[0].isspace()
        rest = text[len(cut.prompt + cut.reference) :]
        assert not rest or rest[0].isspace()

    check()
    assert min(outcomes["cut"], outcomes["passed over"]) >= 20, outcomes


def test_the_choice_depends_on_texts_and_seed_not_on_order() -> None:
    corpus = documents()
    chosen, *_ = cut_documents(corpus, 10, prompt_words=4, reference_words=4)
    assert len(chosen) == 10
    assert chosen == cut_documents(corpus[::-1], 10, prompt_words=4, reference_words=4)[0]
    assert chosen[:4] == cut_documents(corpus, 4, prompt_words=4, reference_words=4)[0]
    others, *_ = cut_documents(corpus, 10, 1, prompt_words=4, reference_words=4)
    assert {cut.doc_id for cut in chosen} != {cut.doc_id for cut in others}
    assert {cut.doc_id for cut in chosen} != {document.id for document in corpus[:10]}


def test_documents_passed_over_are_counted() -> None:
    corpus = documents(6)
    short = [
        Document("demasiado curto", "s", "here", "test"),
        Document("um dois três quatro * * * *", "p", "here", "t"),
    ]
    copy = Document("Outro começo, de certo" + corpus[0].text[len(first_words(corpus[0].text, 4)) :], "c", "here", "t")
    everything = [*corpus, *short, copy]
    cuts, *passed_over = cut_documents(everything, 100, prompt_words=4, reference_words=4)
    assert len(cuts) == 6 and passed_over == [2, 1]
    if importlib.util.find_spec("sacrebleu"):
        scores = continuation_measures(everything, lambda _: [""] * 6, 100, prompt_words=4, reference_words=4)
        assert (scores.num_too_short, scores.num_repeated) == (2, 1)
    for num_words in (3, 4, 5, 7):
        beginning = Document(first_words(corpus[0].text, num_words), "x", "here", "test")
        with pytest.raises(UserError, match="long"):
            cut_documents([beginning], 1, prompt_words=4, reference_words=4)
    with pytest.raises(UserError, match="None of the 2 documents has the 8 words"):
        cut_documents(short, 1, prompt_words=4, reference_words=4)
    for numbers in ((0, 4, 4), (1, 0, 4), (1, 4, 0)):
        with pytest.raises(UserError, match="1 or more"):
            cut_documents(corpus, numbers[0], prompt_words=numbers[1], reference_words=numbers[2])


# Scores


@needs_sacrebleu
def test_chrf_and_bleu_are_sacrebleus_with_their_signatures() -> None:
    import sacrebleu

    hypotheses = [
        *(" para o pasto verde e lá ficou, até de noite.", " uma onça no rio: correu depressa para a casa!"),
        *("", " São Paulo; a educação das crianças parou dois dias."),
    ]
    result = score_continuations(CUTS, hypotheses)
    assert result.scores.chrf == sacrebleu.corpus_chrf(hypotheses, [PERFECT]).score
    assert result.scores.bleu == sacrebleu.corpus_bleu(hypotheses, [PERFECT]).score
    assert 20 < result.scores.bleu < result.scores.chrf < 90
    assert result.signatures["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert result.signatures["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert result.signatures["bleu"].endswith(sacrebleu.__version__)
    # The mean of the four, the empty one among them: by hand, LCS over words.
    by_hand = (2 * 9 / (10 + 10) + 2 * 7 / (9 + 8) + 0 + 2 * 7 / (9 + 9)) / 4
    assert result.scores.rouge_l == pytest.approx(by_hand, abs=1e-12)


@needs_sacrebleu
def test_a_perfect_continuation_scores_all_and_the_floor_far_less() -> None:
    result = score_continuations(CUTS, PERFECT)
    assert (result.scores.chrf, result.scores.bleu, result.scores.rouge_l) == (100.0, 100.0, 1.0)
    floor = result.floor
    assert floor is not None
    assert 0 < floor.chrf < 50 and floor.bleu < 50 and floor.rouge_l < 0.5
    # The floor is the same texts in other places: what does not look at the reference does not change.
    assert (floor.distinct_1, floor.distinct_2, floor.mean_words) == (
        *(result.scores.distinct_1, result.scores.distinct_2, result.scores.mean_words),
    )
    # It does not depend on what the model wrote, only on the seed.
    assert score_continuations(CUTS, [""] * 4).floor == floor
    assert {score_continuations(CUTS, PERFECT, seed=seed).floor for seed in range(5)} > {floor}
    assert score_continuations(CUTS[:1], PERFECT[:1]).floor is None


@needs_sacrebleu
def test_empty_continuations_are_counted_and_stay_in_the_means() -> None:
    some = score_continuations(CUTS, [PERFECT[0], "", " \n", PERFECT[3]])
    assert (some.scores.num_empty, some.num_continuations) == (2, 4)
    assert some.scores.rouge_l == 0.5
    assert some.scores.mean_words == (len(PERFECT[0].split()) + len(PERFECT[3].split())) / 4
    assert some.scores.chrf < 100 and some.scores.bleu < 100
    none = score_continuations(CUTS, [""] * 4).scores
    assert (none.chrf, none.bleu, none.rouge_l, none.mean_words, none.num_empty) == (0, 0, 0, 0, 4)
    assert none.distinct_1 is None and none.distinct_2 is None and none.repeated_4grams is None


@needs_sacrebleu
def test_a_loop_is_seen_as_one() -> None:
    # Three words in 24, three pairs; of 21 4-grams three are new.
    by_hand = score_continuations(CUTS, [" a vaca foi" * 8, "", "", ""]).scores
    assert (by_hand.distinct_1, by_hand.distinct_2, by_hand.repeated_4grams) == (3 / 24, 3 / 24, 18 / 21)
    short = score_continuations(CUTS, ["a b c", "a b d", "", "e"]).scores
    assert (short.distinct_1, short.distinct_2, short.repeated_4grams) == (5 / 7, 3 / 7, None)
    loop = score_continuations(CUTS, [" e a casa e" * 8] * 4).scores
    real = score_continuations(CUTS, PERFECT).scores
    assert loop.repeated_4grams is not None and real.repeated_4grams == 0.0 and loop.repeated_4grams > 0.8
    assert loop.distinct_1 is not None and real.distinct_1 is not None and loop.distinct_1 < 0.1 < real.distinct_1


@needs_sacrebleu
def test_documents_in_scores_out() -> None:
    corpus = documents(num_words=12)
    prompts: list[str] = []

    def oracle(given: list[str]) -> list[str]:
        prompts.extend(given)
        text_of = {first_words(document.text, 5): document.text for document in corpus}
        return [text_of[prompt][len(prompt) :] for prompt in given]  # goes on to the document's end

    result = continuation_measures(corpus, oracle, 8, 3, prompt_words=5, reference_words=4)
    cuts, *_ = cut_documents(corpus, 8, 3, prompt_words=5, reference_words=4)
    assert prompts == [cut.prompt for cut in cuts]
    # Seven words were written after each prompt, and as many as the reference has are scored.
    assert (result.scores.bleu, result.scores.rouge_l, result.scores.mean_words) == (100.0, 1.0, 4.0)
    assert result.seed == 3 and result.num_continuations == 8
    assert (result.num_too_short, result.num_repeated) == (0, 0)
    with pytest.raises(AssertionError, match="without their prompts"):
        continuation_measures(
            corpus, lambda given: [text + " mais" for text in given], 8, 3, prompt_words=5, reference_words=4
        )
    with pytest.raises(AssertionError, match="one continuation per prompt"):
        continuation_measures(corpus, lambda given: given[1:], 8, 3, prompt_words=5, reference_words=4)


@needs_sacrebleu
def test_the_record_is_plain_and_complete() -> None:
    result: ContinuationScores = score_continuations(CUTS, PERFECT)
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    scores = ["chrf", "bleu", "rouge_l", "distinct_1", "distinct_2", "repeated_4grams", "mean_words", "num_empty"]
    counts = ["floor", "signatures", "num_continuations", "num_too_short", "num_repeated", "seed"]
    assert list(record) == scores + counts
    assert list(record["floor"]) == scores
    assert record["chrf"] == 100.0 > record["floor"]["chrf"]
    assert record["signatures"]["rouge_l"].startswith("f:1|level:sentence|average:mean|")


def test_without_sacrebleu_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match=r"pip install .*\[eval\]"):
        score_continuations(CUTS, PERFECT)

    def never(prompts: list[str]) -> list[str]:
        raise AssertionError("the missing package is named before anything is generated")

    with pytest.raises(UserError, match="sacrebleu"):
        continuation_measures(documents(), never, 8)
