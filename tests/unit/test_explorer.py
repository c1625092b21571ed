"""The explorer's computing and drawing, without its web framework."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cartilha.config import EvaluateConfig, ExploreConfig, PrepareConfig
from cartilha.errors import UserError
from cartilha.evaluation.windows import make_protocol
from cartilha.explorer import parts
from cartilha.explorer.choices import Shaping, expect, shaped_probabilities, softmax
from cartilha.explorer.reading import MAX_CHARS, Reader, read, take_text
from cartilha.explorer.session import Answers, Explorer, Spot
from cartilha.explorer.token_text import token_label, token_texts, visible
from cartilha.explorer.walking import StoreWalk
from cartilha.explorer.wording import PageWording, preferred_language
from cartilha.pipeline.evaluate import evaluate
from cartilha.pipeline.explore import open_explorer
from cartilha.pipeline.prepare import prepare
from cartilha.reporting.wording import _strings
from cartilha.tokens.store import TokenStore

TEXT = "O sertão é do tamanho do mundo. 😀 Não?"
EN, PT = PageWording("en"), PageWording("pt")


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return open_explorer(ExploreConfig(models=("random:tiny", "random:tiny-opt"), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def reader(explorer: Explorer) -> Reader:
    return explorer.readers["A"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walked")
    texts = [f"Texto {number}: {'água e roça ' * (number % 4)}<b>fim</b>" for number in range(30)]
    (folder / "textos.txt").write_text("\n".join(texts), encoding="utf-8")
    prepare(PrepareConfig(input=(str(folder / "textos.txt"),), model="random:tiny", output=str(folder / "store")))
    return folder / "store"


# Numbers


def test_a_text_has_the_figures_that_evaluate_gives_it(explorer: Explorer, tmp_path: Path) -> None:
    # Longer than two windows of random:tiny (1,024 positions), so that strides count, too.
    text = f"{TEXT}\n" * 60
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    expected = evaluate(
        EvaluateConfig(
            model=("random:tiny", "random:tiny-opt"),
            input=(str(tmp_path / "text.jsonl"),),
            device="cpu",
            dtype="float32",
            per_token=str(tmp_path / "tokens.parquet"),
        )
    ).evaluations
    for found, known in zip(explorer.read(text).values(), expected, strict=True):
        assert len(found.ids) == known.total.num_tokens > 2 * found.reader.protocol.window
        assert found.evaluation.perplexity == pytest.approx(known.perplexity, rel=1e-9)
        assert found.evaluation.bits_per_byte == pytest.approx(known.bits_per_byte, rel=1e-9)
        assert found.evaluation.protocol.hash == known.protocol.hash
        assert found.nll.sum() == pytest.approx(known.total.nll, rel=1e-6)
        assert found.running_perplexity[-1] == pytest.approx(known.perplexity, rel=1e-6)


def test_logits_of_each_position_give_the_probability_that_was_scored(reader: Reader) -> None:
    short = dataclasses.replace(
        reader, protocol=make_protocol("full", 16, 4, prefix_id=256, dtype="float32", context_length=1024)
    )
    found = read(short, TEXT)
    assert found is not None and len(found.ids) > 2 * 16
    logits = short.logits
    for position, token_id in enumerate(found.ids):
        expectation = expect(logits(found.ids, position), Shaping(), asked=int(token_id))
        candidate = next(c for c in expectation.candidates if c.token_id == token_id)
        assert -math.log(candidate.probability) == pytest.approx(found.nll[position], abs=2e-5)
        assert candidate.logit - expectation.log_normaliser == pytest.approx(-found.nll[position], abs=2e-5)
        assert candidate.rank == found.rank[position]
    assert len(short._kept) <= 4
    assert softmax(logits(found.ids, len(found.ids))).sum() == pytest.approx(1)


@given(
    logits=st.lists(st.integers(-96, 96).map(lambda n: n / 8), min_size=2, max_size=40, unique=True),
    temperature=st.floats(0.1, 2),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.05, 1),
)
def test_shaping_is_what_transformers_samples_from(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    scores = torch.tensor([logits], dtype=torch.float64)
    nothing = torch.zeros((1, 0), dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(nothing, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(nothing, scores)
    expected = scores.softmax(-1)[0].numpy()
    if top_p < 1:
        sums = np.cumsum(np.sort(expected)[::-1])
        if np.abs(sums - top_p).min() < 1e-9:
            return  # which side of a sum a probability lies on is a matter of rounding
        expected = TopPLogitsWarper(top_p)(nothing, scores).softmax(-1)[0].numpy()
    found = shaped_probabilities(np.array(logits), Shaping(temperature, top_k, top_p))
    assert found == pytest.approx(expected, abs=1e-9)
    assert ((found > 0) == (expected > 0)).all() and found.sum() == pytest.approx(1)


def test_the_candidates_are_the_likeliest_and_the_token_asked_about() -> None:
    logits = np.array([0.0, 3.0, 1.0, -2.0, 2.0])
    found = expect(logits, Shaping(top_k=2), num_shown=3, asked=3)
    assert [(c.token_id, c.rank) for c in found.candidates] == [(1, 1), (4, 2), (2, 3), (3, 5)]
    assert found.num_left == 2
    assert [c.shaped > 0 for c in found.candidates] == [True, True, False, False]
    assert found.log_normaliser == pytest.approx(math.log(np.exp(logits).sum()))


# Texts of tokens


@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
@settings(max_examples=60)
def test_pieces_are_the_whole_text_in_order(reader: Reader, text: str) -> None:
    pieces = token_texts(text, reader.tokenizer.backend.encode(text, add_special_tokens=False).offsets)
    assert len(pieces) == len(text.encode("utf-8"))  # a token a byte
    assert "".join(piece.text for piece in pieces if piece.part <= 1) == text
    for piece in pieces:
        assert text[piece.start : piece.end] == piece.text
        assert (piece.num_parts == 0) == (len(piece.text.encode("utf-8")) == 1)


def test_a_space_that_a_tokenizer_trims_belongs_to_the_word_behind_it() -> None:
    pieces = token_texts("a casa ", [(0, 1), (2, 6)])
    assert [piece.text for piece in pieces] == ["a", " casa "]


def test_half_a_character_is_shown_by_its_bytes_and_controls_by_their_code(reader: Reader) -> None:
    assert token_label(reader.tokenizer, 0xC3) == "<C3>"
    assert token_label(reader.tokenizer, ord("a")) == "a"
    assert token_label(reader.tokenizer, 257) == "</s>"
    assert token_label(reader.tokenizer, 9999) == "[row 9999]"
    assert visible(" a\n\x07") == "␣a↵<U+0007>"


# The page's answers


@pytest.mark.parametrize("say", [EN, PT], ids=["en", "pt"])
def test_text_from_outside_is_escaped_everywhere(explorer: Explorer, store: Path, say: PageWording) -> None:
    attack = "<script>alert(1)</script>"
    shaping = Shaping()
    view = Answers(explorer, say).reading(attack)
    begun = Answers(explorer, say).new_draft("A", attack, shaping)
    walk = dataclasses.replace(explorer, walk=StoreWalk(TokenStore(store)))
    answers = [
        view.notices,
        *view.readings.values(),
        view.chart,
        *Answers(explorer, say).choices(attack, Spot("A", 20, 20), shaping).values(),
        begun.text,
        begun.alternatives,
        Answers(explorer, say).three_ways(attack, 5, shaping),
        Answers(explorer, say)._failure(UserError(attack)),
        Answers(walk, say).document("train", 1).shown,
        Answers(walk, say).document("validation", 1).shown,
        Answers(walk, say).block(1, 64, 0, 1).shown,
    ]
    for answer in answers:
        assert answer == "" or not re.search(r"<(script|b|img)\b", answer)
    assert "&lt;" in view.readings["A"] and "&lt;" in begun.text and "&lt;" in answers[-1]


def test_an_empty_text_asks_for_words_and_a_long_one_is_cut_and_said(explorer: Explorer) -> None:
    for nothing in ("", None):
        view = Answers(explorer, EN).reading(nothing)
        assert "Write something" in view.notices and view.chart == "" and set(view.readings.values()) == {""}
        assert Answers(explorer, EN).most_surprising(nothing) is None
    assert (
        "escreva" not in Answers(explorer, PT).reading("").notices
        and "Escreva" in Answers(explorer, PT).reading("").notices
    )
    given = take_text("é" * 200_000)
    assert len(given.text) == MAX_CHARS and given.was_cut
    assert "10.000 de 200.000" in parts.cut_notice(PT, given)
    assert take_text("a\ud800b").text == "a?b"  # half a surrogate pair is no text


def test_a_text_that_a_model_cannot_read_is_said_and_has_no_token(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Explorer, text: str) -> None:
        raise UserError("The model gives no number.")

    monkeypatch.setattr(Explorer, "read", fail)
    assert Answers(explorer, EN).most_surprising("Casa") is None
    assert "The model gives no number." in Answers(explorer, EN).reading("Casa").notices


def test_a_token_is_coloured_by_its_bits_and_a_character_in_parts_is_numbered(explorer: Explorer) -> None:
    assert [parts.level(bits) for bits in (0, 0.99, 1, 3.9, 4, 11.9, 12, 50)] == [0, 0, 1, 2, 3, 4, 5, 5]
    shown = Answers(explorer, PT).reading("é", Spot("A", 1, 0)).readings["A"]
    assert shown.count('class="tok ') == shown.count("chosen") == 2
    assert "<sub>1/2</sub>" in shown and "<sub>2/2</sub>" in shown
    assert "parte 2 de 2 de é" in shown


def test_the_chart_has_a_curve_a_model_and_the_uniform_one(explorer: Explorer) -> None:
    chart = Answers(explorer, EN).reading("Casa").chart
    assert chart.count('class="curve') == 3 and "uniform model (259)" in chart
    single = Explorer({"A": explorer.readers["A"]})
    assert 'class="curve b"' not in Answers(single, EN).reading("Casa").chart
    assert '<circle class="a"' in Answers(single, EN).reading("C").chart  # one token is a point


def test_a_spot_beyond_a_text_that_became_shorter_is_its_last_token(explorer: Explorer) -> None:
    found = Answers(explorer, EN).choices("Casa", Spot("A", 400, 400), Shaping())
    assert "“Cas”" in found["A"] and "“Cas”" in found["B"]
    assert "Click a token" in Answers(explorer, EN).choices("Casa", None, Shaping())["A"]


def test_two_tokenizers_are_said_not_to_be_compared_by_perplexity(explorer: Explorer) -> None:
    readings = explorer.read("Casa")
    assert parts.different_tokens(EN, readings) == ""
    readings["B"] = dataclasses.replace(readings["B"], tokens=readings["B"].tokens[:2])
    assert "bits per byte" in parts.different_tokens(EN, readings)


def test_a_draft_grows_by_what_is_chosen_and_shrinks_again(explorer: Explorer) -> None:
    shaping = Shaping(top_k=1)
    begun = Answers(explorer, EN).new_draft("A", "Era ", shaping)
    assert begun.draft is not None and "space at the end" in begun.alternatives
    likely = Answers(explorer, EN).step("A", begun.draft, shaping, "likeliest")
    drawn = Answers(explorer, EN).step("A", begun.draft, shaping, "draw")
    assert likely.draft == drawn.draft and likely.draft is not None  # of one token there is one to draw
    chosen = Answers(explorer, EN).step("A", likely.draft, shaping, ord("z"))
    assert chosen.draft is not None and chosen.draft.chosen[-1] == ord("z") and "z</span>" in chosen.text
    assert Answers(explorer, EN).step("A", chosen.draft, shaping, "undo").draft == likely.draft
    ended = Answers(explorer, EN).step("A", chosen.draft, shaping, 257)
    assert "finished" in ended.alternatives and "&lt;/s&gt;" not in ended.text
    assert Answers(explorer, EN).step("A", ended.draft, shaping, "draw").draft == ended.draft
    assert Answers(explorer, EN).step("A", chosen.draft, shaping, 10**9).draft == chosen.draft


def test_a_draft_that_fills_the_context_is_a_sentence(explorer: Explorer) -> None:
    full = Answers(explorer, PT).new_draft("A", "a" * 1023, Shaping())
    assert "ocupa todo o contexto do modelo, de 1024 tokens" in full.alternatives
    assert "do not fit the model&#39;s context of 1024" in Answers(explorer, EN).three_ways("a" * 1023, 5, Shaping())


def test_the_three_ways_are_those_of_generate(explorer: Explorer) -> None:
    from cartilha.config import GenerateConfig
    from cartilha.evaluation.continuation import continue_prompts

    found = Answers(explorer, EN).three_ways("Era", 6, Shaping(temperature=0.7, top_k=5))
    reader = explorer.readers["A"]
    for num_beams in (1, 4):
        settings = GenerateConfig(prompt=("Era",), max_new_tokens=6, num_beams=num_beams)
        text = continue_prompts(reader.loaded, reader.tokenizer, settings)[0].text[3:]
        assert str(escape(text)) in found
    # The model's attention is as it was: scoring gives the same as before.
    assert read(reader, TEXT) is not None


# A store


def test_a_store_is_walked_document_by_document(store: Path) -> None:
    walk = StoreWalk(TokenStore(store))
    total = walk.store.counts["train"].num_documents
    texts = [document.text for document in walk.store.read_documents("train")]
    for number in range(total):
        found = walk.document("train", number)
        assert "".join(token.text for token in found.tokens) == texts[number]
        assert len(found.tokens) == found.num_tokens
    assert walk.document("train", -5).number == 0 and walk.document("train", 10**9).number == total - 1
    view = Answers(Explorer({}, walk), EN).document("validation", 1)
    assert view.number == 1 and "Document 1 of" in view.shown


def test_blocks_hold_every_training_token_once_with_their_boundaries(store: Path) -> None:
    walk = StoreWalk(TokenStore(store))
    counts = walk.store.counts["train"]
    first = walk.block(0, 32, seed=3, epoch=1)
    kinds: dict[str, int] = {}
    for number in range(first.num_blocks):
        block = walk.block(number, 32, seed=3, epoch=1)
        tokens = [token for segment in block.segments for token in segment.tokens]
        assert len(tokens) == 32
        for segment in block.segments:
            assert all(token.kind == "text" for token in segment.tokens[1:-1]) or segment.tokens[0].kind == "padding"
            assert segment.begins == (segment.tokens[0].kind == "prefix")
            last = number + 1 == first.num_blocks and segment is [s for s in block.segments if s.ends][-1]
            assert segment.ends == (segment.tokens[-1].kind == "end" or last)  # the last end token is no input
        for token in tokens:
            kinds[token.kind] = kinds.get(token.kind, 0) + 1
    assert kinds["text"] == counts.num_tokens and kinds["prefix"] == counts.num_documents
    assert kinds["end"] == counts.num_documents - 1  # the last one is a target only
    assert kinds["padding"] == first.num_blocks * 32 - counts.num_tokens - 2 * counts.num_documents + 1 > 0


def test_a_store_that_went_away_is_a_sentence(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    walk = Explorer({}, StoreWalk(TokenStore(copy)))
    shutil.rmtree(copy)
    gone = Answers(walk, EN)
    for view in (gone.document("train", 1), gone.document("validation", 1), gone.block(1, 64, 0, 1)):
        assert "This did not work" in view.shown
    answers = Answers(Explorer({}, StoreWalk(TokenStore(store))), PT)
    assert "tamanho do bloco" in answers.block(1, 0, 0, 1).shown
    assert "época" in answers.block(1, 64, 0, 0).shown and "época" in answers.block(1, 64, 0, 10**9).shown
    assert "época" not in answers.block(1, 64, 0, 1).shown


# Words


def test_both_languages_say_everything_with_the_same_values() -> None:
    for key, words in _strings("cartilha.explorer").items():
        assert set(words) == {"en", "pt"}, key
        en, pt = (sorted(re.findall(r"{(\w+)}", words[language])) for language in ("en", "pt"))
        assert en == pt, key


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("pt-BR,pt;q=0.9,en;q=0.8", "pt"),
        ("en-US,en;q=0.9", "en"),
        ("fr,en;q=0.3,pt;q=0.7", "pt"),
        ("pt;q=0,en;q=0.1", "en"),
        ("fr-FR", "pt"),
        ("", "pt"),
        ("pt;q=x,en", "en"),
    ],
)
def test_the_language_is_the_browsers_first_of_ours(header: str, language: str) -> None:
    assert preferred_language(header, "pt") == language


def test_small_probabilities_keep_their_digits() -> None:
    assert [EN.probability(p) for p in (1.0, 0.416, 0.0596, 0.0096, 9.1e-6, 0.0)] == [
        "100.0%",
        "41.6%",
        "5.96%",
        "0.96%",
        "0.00091%",
        "0%",
    ]
    assert PT.probability(1e-12) == "< 0,0000001%"
