"""Languages are told as py3langid tells them, text by text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cartilha.corpus.english import english_sample
from cartilha.corpus.language import Identifier, languages, load_identifier
from cartilha.corpus.primer import primer_texts

langid = pytest.importorskip("py3langid.langid", reason="needs the extra text")

STRANGE = [
    "",
    "a",
    "123 456",
    "ERA UMA VEZ NA FAZENDA",
    "Era e\u0301 uma",
    "čeština",
    "この文",
    "српски језик је",
    "\0\x01",
]


@pytest.fixture(scope="module")
def identifier() -> Identifier:
    return load_identifier()


@pytest.fixture(scope="module")
def peer():
    found = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    found.nb_ptc = found.nb_ptc.astype("float32")  # its float16 gives the last digits otherwise
    return found


def compare(identifier: Identifier, peer, texts: list[str]) -> None:
    found = languages(identifier, texts)
    assert len(found) == len(texts)
    for text, (label, share) in zip(texts, found, strict=True):
        expected, confidence = peer.classify(text)
        assert share == pytest.approx(confidence, abs=1e-4), text
        assert label == expected or peer.rank(text)[1][1] > confidence - 1e-4, text


def test_pieces_of_real_texts(identifier, peer):
    texts = [text.text for text in primer_texts()] + english_sample()
    pieces = [text[: 3 + 37 * i % 260] for i, text in enumerate(texts)]
    compare(identifier, peer, [*pieces, *STRANGE, *pieces[::-1]])
    told = [label for label, _ in languages(identifier, [text[:240] for text in texts])]
    assert told == ["pt"] * len(primer_texts()) + ["en"] * len(english_sample())
    assert languages(identifier, []) == []


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=5))
def test_any_text(identifier, peer, texts):
    compare(identifier, peer, texts)
