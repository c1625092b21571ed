"""Cleaning: each step mends or rejects what it is named for, and leaves clean text as it is."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cartilha.corpus.cleaning import GROUPS, Cleaner, Rejected, named_steps
from cartilha.corpus.document import Document
from cartilha.corpus.primer import primer_texts
from cartilha.errors import UserError
from cartilha.languages import find_language

pytest.importorskip("ftfy", reason="the extra `text` is not installed")
pytest.importorskip("py3langid", reason="the extra `text` is not installed")
pytest.importorskip("rensa", reason="the extra `text` is not installed")

PROSE = (
    "O moleiro subiu ao telhado com uma escada curta demais e ficou lá em cima até ao fim da tarde, à espera de que"
    " alguém passasse. Quando o vizinho apareceu, já a chuva tinha lavado as telhas e o moleiro cantava baixinho.\n"
    "No dia seguinte comprou outra escada, mais comprida, e emprestou a primeira às crianças, que fizeram dela ponte"
    " sobre o ribeiro."
)


def clean(text: str, *steps: str, **settings) -> str:
    """The text after the steps, or the reason of its rejection."""
    found = Cleaner(steps, **settings)([Document(text, "1", "s", "d")])[0]
    return f"rejected: {found.reason}" if isinstance(found, Rejected) else found.text


def test_the_primer_passes_unchanged():
    cleaner = Cleaner(GROUPS["web"])
    for text in primer_texts():
        document = Document(text.text, text.id, "primer", text.genre)
        assert cleaner([document])[0] is document


def test_nothing_is_done_that_was_not_asked_for():
    dirty = "vocÃª \0 e\u0301 Aceite os cookies"
    assert clean(dirty) == dirty
    assert clean(dirty, "nfc") == "vocÃª \0 é Aceite os cookies"
    assert clean(dirty, "mojibake") == "você \0 e\u0301 Aceite os cookies"


@pytest.mark.parametrize("good", ["você não tem ação", "“Olá – disse ele… É isto?", "a coração à ânsia º ª «sim»"])
@pytest.mark.parametrize("read_as", ["cp1252", "latin-1"])
def test_mojibake_is_mended_and_good_text_kept(good, read_as):
    assert clean(good, "mojibake") == good
    bad = good.encode("utf-8").decode(read_as)
    assert bad != good and clean(bad, "mojibake") == good


def test_windows_signs_that_were_read_as_latin_1_are_mended():
    text = "Ele disse – e ela “sim” … ao coração."
    bad = text.encode("cp1252").decode("latin-1")
    assert clean(bad, "mojibake", "control") == clean(bad, "mojibake") == text
    assert clean(f"{bad} €", "mojibake") == f"{text} €"  # beside a character that Latin-1 has not
    assert clean(f"{text}\x96", "mojibake") == f"{text}–"


def test_control_characters_go_and_line_ends_become_line_feeds():
    dirty = "a\0b\x08c\r\nd\re\u2028f\tg\x85h\u200bi\ufeffj\xadk\x96l\u202em"
    assert clean(dirty, "control") == "abc\nd\ne\nf\tg\nhijklm"
    zero_width_joiner = "👨\u200d👩"  # means something
    assert clean(zero_width_joiner, "control") == zero_width_joiner


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Um.\nEste site usa cookies.\nDois.", "Um.\nDois."),
        ("Um.\n© 2020 Todos os direitos reservados", "Um.\n"),
        ("POLÍTICA DE PRIVACIDADE | Termos de uso\nUm.", "Um."),
        ("Um. " * 100 + "Clique aqui para saber mais. Dois.", "Um. " * 100 + "Dois."),
        ("Um.\nDeixe um comentário\nDeixe seu comentário\nDois.", "Um.\nDois."),
        ("O padeiro fez cookies de chocolate.", None),  # the word alone is no reason
        ("Comprou os direitos reservados" + " e o campo" * 40 + ".", None),  # nor is a long sentence taken
        ("Aceito cookies", "rejected: boilerplate"),
        ("\u0130 Aceitar cookies\nUm.", "\u0130 Aceitar cookies\nUm."),  # its small letter is two characters
    ],
)
def test_boilerplate_lines_and_sentences_go(text, left):
    assert clean(text, "boilerplate") == (text if left is None else left)


def test_each_phrase_is_found():
    for phrase in ("usamos cookies", "ative o javascript", "direitos reservados", "política de privacidade",
                   "termos de uso", "lorem ipsum", "deixe um comentário", "assine a newsletter", "compartilhe isso",
                   "clique aqui para ver", "privacy policy", "all rights reserved"):  # fmt: skip
        assert clean(f"Um.\n{phrase}\n", "boilerplate") == "Um.\n"


def test_short_texts_are_rejected(monkeypatch):
    assert clean("x" * 199, "short") == clean(" " * 300 + "x", "short") == "rejected: short"
    assert clean("x" * 200, "short") == "x" * 200
    monkeypatch.setattr("cartilha.corpus.cleaning.MIN_CHARS", 1)
    assert clean("x", "short") == "x"


def test_repeated_lines_and_words_are_rejected():
    lines = PROSE.replace(". ", ".\n")
    assert clean(lines, "repeated_lines") == lines
    assert clean(lines + "\n\n\n\n", "repeated_lines") == lines + "\n\n\n\n"  # blank lines are none
    assert clean("\n".join([lines, *["Início | Contato"] * 3]), "repeated_lines") == "rejected: repeated_lines"
    assert clean(PROSE, "repeated_ngrams") == PROSE
    assert clean(PROSE + " compre já o seu bilhete aqui" * 12, "repeated_ngrams") == "rejected: repeated_ngrams"
    assert clean("", "repeated_ngrams") == "" and clean("a b", "repeated_ngrams") == "a b"


SPANISH = (
    "El molinero subió al tejado con una escalera demasiado corta y se quedó allí arriba hasta el final de la tarde,"
    " esperando a que pasara alguien. Cuando apareció el vecino, la lluvia ya había lavado las tejas."
)
GALICIAN = (
    "O muiñeiro subiu ao tellado cunha escaleira curta de máis e quedou alí arriba ata o final da tarde, á espera"
    " de que alguén pasase. Cando apareceu o veciño, a chuvia xa lavara as tellas e o muiñeiro cantaba baixiño."
)
ENGLISH = "The miller climbed to the roof with a ladder that was far too short and stayed there until evening."


def test_other_languages_are_rejected_by_name():
    assert clean(PROSE, "language") == PROSE
    for text, code in ((SPANISH, "es"), (GALICIAN, "gl"), (ENGLISH, "en")):
        assert clean(text, "language") == f"rejected: language:{code}"
        assert clean(text, "language", language=find_language(code)) == text
    assert clean("123 456 789", "language") == "123 456 789"  # nothing to tell by
    with pytest.raises(UserError, match="'xx'"):
        clean(PROSE, "language", language=find_language("xx"))


def test_language_is_told_from_several_places():
    menu = "Home. About us. Our products. Contact. Find a store near you. Log in. "
    assert clean(menu + PROSE * 4, "language") == menu + PROSE * 4
    assert clean(PROSE[:150] + ENGLISH * 20, "language") == "rejected: language:en"


def test_steps_run_in_their_own_order(monkeypatch):
    monkeypatch.setattr("cartilha.corpus.cleaning.MIN_CHARS", 3)
    cleaner = Cleaner(["short", "nfc"])
    document = Document("e\u0301é", "1", "s", "d")  # three characters before, two after
    assert cleaner([document]) == [Rejected(document, "short")]
    assert named_steps(["web"]) == GROUPS["web"] and named_steps(["none"]) == ()
    with pytest.raises(UserError, match=r"'html'.*web, fineweb.*mojibake, control, nfc"):
        named_steps(["web", "html"])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=r"pip install .*\[text\]"):
        Cleaner(["mojibake"])


@example("e\u00ad\u0301")  # a soft hyphen between a letter and its accent
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_mends_mends_for_good(text):
    cleaner = Cleaner(["nfc", "control"])
    (once,) = cleaner([Document(text, "1", "s", "d")])
    assert isinstance(once, Document)
    assert cleaner([once]) == [once]
    assert unicodedata.is_normalized("NFC", once.text) and json.dumps(once.text)
    assert not any(unicodedata.category(sign) == "Cc" and sign not in "\t\n" for sign in once.text)
