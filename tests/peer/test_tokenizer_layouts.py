"""The files in which a byte-level tokenizer may lie, against what transformers makes of them: texts, ids, and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cartilha.tokens.tokenizer import load_tokenizer
from cartilha.tokens.vocabulary import count_words, extend, learn_merges, save_extended

BYTES = sorted(load_tokenizer("random:tiny").backend.get_vocab(with_added_tokens=False).items(), key=lambda x: x[1])
MERGES = ["Ġ a", "e n", "en s", "c a", "Ã ©"]
END = "<|endoftext|>"
WORDS = [character for character, _ in BYTES] + [merge.replace(" ", "") for merge in MERGES]
NEW = len(WORDS) + 1  # the first id after the vocabulary and its end of text
GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
ENDS = {**GPT2, "bos_token": END, "eos_token": END}
TEXTS = [
    "a mesa ensina  a ler: casa, cadeira, porta e ção <|pt|> <m> x<img><boi><|u|>",
    f"{END} mesa[PAD] zz yy  a   b <|z|><|x|> ens ensaio",
    "acasa a casamento casa <b>",
]


def token(content: str, special: bool = False, **flags: Any) -> dict[str, Any]:
    whole = {"content": content, "lstrip": False, "rstrip": False, "normalized": not special, "single_word": False}
    return {**whole, "special": special, **flags}


def typed(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", **token(content, True)}


def decoder(*tokens: dict[str, Any], first: int = NEW - 1) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(first + i): one for i, one in enumerate(tokens)}}


EOT, PAD, MESA = token(END, True), token("[PAD]", True), token("mesa")
OPT = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
CONFIG, MAP, ADDED, MODEL = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"
SEVEN = {f"{name}_token": f"<{name}>" for name in ("pad", "mask", "eos", "bos", "unk", "sep", "cls")}
TWO_FILES: dict[str, dict[str, Any]] = {
    "GPT-2's class, nothing named": {CONFIG: GPT2, MODEL: {"model_type": "gpt2"}},
    "GPT-2's type, nothing named": {MODEL: {"model_type": "gpt2"}},
    "GPT-2's type and a null": {CONFIG: {**GPT2, "bos_token": None, "eos_token": END, "unk_token": None}},
    "special_tokens_map alone": {MAP: {name: END for name in OPT}, MODEL: {"model_type": "opt"}},
    "added_tokens.json": {CONFIG: ENDS, ADDED: {"<|pt|>": NEW, "ção": NEW + 1}},
    "added_tokens.json, not sorted": {CONFIG: GPT2, ADDED: {"zz": NEW + 1, "yy": NEW}},
    "added_tokens.json, in the vocabulary": {CONFIG: GPT2, ADDED: {"ens": WORDS.index("ens"), "casa": NEW}},
    "added_tokens.json, padding": {CONFIG: {**ENDS, "pad_token": "[PAD]"}, ADDED: {"[PAD]": NEW}},
    "added_tokens.json, named in the map": {
        CONFIG: ENDS,
        MAP: {**ENDS, "additional_special_tokens": ["<|pt|>"]},
        ADDED: {"<|pt|>": NEW, "ção": NEW + 1},
    },
    "a decoder of the vocabulary alone": {CONFIG: {**ENDS, **decoder(EOT)}},
    "a decoder with new tokens": {CONFIG: {**ENDS, "pad_token": "[PAD]", **decoder(EOT, PAD, MESA)}},
    "a decoder with a gap": {CONFIG: {**ENDS, **decoder(MESA, first=NEW + 7)}},
    "a decoder beside added_tokens.json": {CONFIG: {**ENDS, **decoder(EOT, MESA)}, ADDED: {"casa": NEW}},
    "a decoder with flags": {
        CONFIG: {**ENDS, **decoder(EOT, token("<m>", lstrip=True, rstrip=True), token("casa", single_word=True))}
    },
    "a decoder without normalisation": {CONFIG: {**GPT2, **decoder(token("ção", normalized=False), first=NEW)}},
    "a decoder of a token of the vocabulary": {CONFIG: {**GPT2, **decoder(token("ens"), first=WORDS.index("ens"))}},
    "a decoder of a bos that is not special": {CONFIG: {**GPT2, "bos_token": "<b>", **decoder(token("<b>"))}},
    "a decoder beside another map": {CONFIG: {**ENDS, **decoder(EOT)}, MAP: {"bos_token": "ens", "pad_token": "[X]"}},
    "another map": {CONFIG: ENDS, MAP: {"bos_token": "ens", "eos_token": "ens", "pad_token": "[X]"}},
    "a map of objects": {CONFIG: GPT2, MAP: {"bos_token": token(END), "pad_token": token("[PAD]")}},
    "objects in the configuration": {CONFIG: {**GPT2, "bos_token": typed(END), "eos_token": typed("<fim>")}},
    "seven names": {CONFIG: {**SEVEN, **GPT2}},
    "ends that the vocabulary lacks": {CONFIG: {**GPT2, "bos_token": "<s>", "eos_token": "</s>"}},
    "special tokens in a list": {CONFIG: {**GPT2, "extra_special_tokens": ["<|u|>", "<|a|>"]}},
    "special tokens with names": {CONFIG: {**GPT2, "extra_special_tokens": {"image_token": "<img>"}}},
    "a name of the model's own": {CONFIG: {**GPT2, "image_token": "<img>", "boi_token": token("<boi>", True)}},
    "the fast class": {CONFIG: {"tokenizer_class": "GPT2TokenizerFast", "eos_token": END, **decoder(EOT, MESA)}},
    "a space before each text": {CONFIG: {**GPT2, "add_prefix_space": True, **decoder(EOT, MESA)}},
    "Qwen2's type": {MODEL: {"model_type": "qwen2"}},
    "Qwen2's type, GPT-2's class": {CONFIG: {**GPT2, "eos_token": END}, MODEL: {"model_type": "qwen2"}},
    "Qwen2's class in config.json": {MODEL: {"model_type": "llama", "tokenizer_class": "Qwen2Tokenizer"}},
    "GPT-2's class in config.json": {MODEL: {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}},
    "CodeGen's class": {CONFIG: {"tokenizer_class": "CodeGenTokenizer"}, ADDED: {"  ": NEW, "   ": NEW + 1}},
}
MORE = decoder(EOT, MESA, PAD, token("cadeira"), token("<|z|>", True))
ONE_FILE: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "a decoder with more": {CONFIG: MORE},
    "GPT-2's class, a decoder with more": {CONFIG: {**GPT2, **MORE}},
    "padding in the configuration alone": {CONFIG: {"pad_token": "<novo>"}},
    "padding in the map alone": {MAP: {"pad_token": "<novo>"}},
    "padding in the map, beside a decoder": {CONFIG: MORE, MAP: {"pad_token": "<novo>"}},
    "added_tokens.json with more": {ADDED: {"porta": NEW + 2}},
    "special tokens in a list": {CONFIG: {"additional_special_tokens": ["<|q|>"]}},
    "other flags": {CONFIG: decoder(EOT, token("mesa", lstrip=True), PAD)},
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def write_two_files(folder: Path, files: dict[str, Any]) -> Path:
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return write(folder, {"vocab.json": {token: i for i, token in enumerate([*WORDS, END])}, **files})


def write_one_file(folder: Path, files: dict[str, Any]) -> Path:
    """As transformers 5 saves it, with two added tokens in tokenizer.json, and the files beside it changed."""
    from transformers import AutoTokenizer

    source = folder / "two-files"
    source.mkdir()
    write_two_files(source, {CONFIG: {**ENDS, "pad_token": "[PAD]", **decoder(EOT, MESA, PAD)}})
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return write(folder, {**files, CONFIG: {**config, **files.get(CONFIG, {})}})


def assert_same(folder: Path) -> None:
    from transformers import AutoTokenizer

    ours, peer = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    theirs = peer(TEXTS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [ids.tolist() for ids in ours.encode(TEXTS)] == theirs
    assert ours.backend.get_vocab(with_added_tokens=True) == peer.get_vocab() and ours.num_ids == len(peer)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id)


@pytest.mark.parametrize("name", TWO_FILES)
def test_two_files_have_the_ids_that_transformers_gives_them(tmp_path, name):
    assert_same(write_two_files(tmp_path, TWO_FILES[name]))


@pytest.mark.parametrize("name", ONE_FILE)
def test_one_file_has_the_ids_that_transformers_gives_it(tmp_path, name):
    assert_same(write_one_file(tmp_path, ONE_FILE[name]))


@pytest.mark.parametrize(
    "name", ["added_tokens.json", "a decoder with new tokens", "a decoder with a gap", "seven names"]
)
def test_saved_and_extended_it_keeps_every_id(tmp_path, name):
    from transformers import AutoTokenizer

    folder = write_two_files(tmp_path, TWO_FILES[name])
    tokenizer, peer = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    tokenizer.save(tmp_path / "saved")
    assert_same(tmp_path / "saved")
    learnt = extend(learn_merges(tokenizer, count_words(tokenizer, ["banana banana"]), 3))
    assert learnt.first_id == len(peer)
    save_extended(tokenizer, learnt.tokenizer, tmp_path / "extended")
    assert_same(tmp_path / "extended")
    after = load_tokenizer(str(tmp_path / "extended")).backend.get_vocab(with_added_tokens=True)
    assert peer.get_vocab().items() <= after.items() and len(after) == len(peer) + 3


@pytest.mark.parametrize("added", ["ção", "São", "São Paulo", "日本", "e\u0301", "<ã>", "çç"])
def test_a_text_with_an_added_token_comes_back(tmp_path, added):
    tokenizer = load_tokenizer(str(write_two_files(tmp_path, {CONFIG: GPT2, ADDED: {added: NEW}})))
    texts = [f"can{added} de {added}{added}", added, "é", f"ã{added}é", "", "sem nada"]
    encoded = tokenizer.encode(texts)
    assert NEW in encoded[0] and tokenizer.decode_batch(encoded) == texts
    assert [tokenizer.decode(ids) for ids in encoded] == texts
