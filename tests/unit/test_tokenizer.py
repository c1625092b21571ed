"""Tokenizers: nothing added to a text, nothing in it special, the same in every format, and refused when unfit."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, processors

from cartilha.corpus.primer import primer_texts
from cartilha.errors import UserError
from cartilha.model_reference import conversion_directory
from cartilha.tokens import tokenizer as tokenizer_module
from cartilha.tokens.tokenizer import TextTokenizer, gguf_tokenizer, load_tokenizer
from reading import complaint_of

TINY = load_tokenizer("random:tiny")
BRASIL = "O Brasil foi descoberto em 1500 por"
BRASIL_IDS = [2, 673, 17128, 718, 9565, 118, 2694, 876, 38128, 2841, 18597, 2953]  # shared/opt_tokenizer/SOURCE.md
MIXED = "Irmã, são 2 </s> e <pad>: 1500,  já\n\n\tção 😀 ñ <s>"


def ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode([text])[0].tolist()


def complaint(ref: Path | str) -> str:
    return complaint_of(load_tokenizer, str(ref))


def peer_ids(folder: Path, text: str) -> list[int]:
    """What transformers makes of the text with the tokenizer in this folder."""
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(folder)
    return peer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


# Bytes


@given(st.text() | st.lists(st.sampled_from(["</s>", "<s>", "<pad>", "é", " ", "😀", "Ġ", "\x00"])).map("".join))
@example("</s>")
@example("\ufeff\r\n\x00\x7f\u0301")
def test_the_bytes_of_any_text_are_its_ids_and_come_back(text):
    assert ids(TINY, text) == list(text.encode("utf-8"))
    assert TINY.decode(ids(TINY, text)) == text
    assert [i.tolist() for i in TINY.encode([text, "x", text])] == [ids(TINY, text), [ord("x")], ids(TINY, text)]
    assert TINY.decode_batch(TINY.encode([text, ""])) == [text, ""]


def test_bytes_and_special_tokens_have_their_ids():
    assert (TINY.prefix_id, TINY.end_id, TINY.pad_id, TINY.num_ids) == (256, 257, 258, 259)
    assert TINY.decode([256, ord("a"), 257]) == "<s>a</s>"  # special tokens are kept


def test_ids_are_whole_numbers_wide_enough_for_all():
    assert {i.dtype.name for i in TINY.encode(["a", ""])} == {"uint32"}
    assert TINY.encode([]) == [] and TINY.encode([""])[0].shape == (0,)


# OPT: vocab.json and merges.txt


def test_the_known_encoding_of_opt(shared):
    tokenizer = load_tokenizer(str(shared / "opt_tokenizer"))
    assert [tokenizer.prefix_id, *ids(tokenizer, BRASIL)] == BRASIL_IDS
    assert tokenizer.decode(BRASIL_IDS) == "</s>" + BRASIL
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.num_ids) == (2, 2, 1, 50265)


def test_a_special_token_in_the_text_stays_text(opt_tokenizer):
    tokenizer = load_tokenizer(str(opt_tokenizer))
    assert ids(tokenizer, "</s>")[0] != 2 and not {0, 1, 2, 3} & set(ids(tokenizer, MIXED))
    assert tokenizer.decode(ids(tokenizer, MIXED)) == MIXED
    tokenizer.backend.encode_special_tokens = False
    assert ids(tokenizer, "</s>") == [2]  # not vacuous: it would become one


@pytest.fixture(scope="module")
def opt_in_one_file(opt_tokenizer, tmp_path_factory) -> Path:
    """OPT's tokenizer as transformers saves it: tokenizer.json."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("opt-tokenizer-json")
    AutoTokenizer.from_pretrained(opt_tokenizer).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").exists()
    return folder


def test_the_same_tokenizer_in_another_format_has_the_same_fingerprint(opt_tokenizer, opt_in_one_file):
    two_files, one_file = load_tokenizer(str(opt_tokenizer)), load_tokenizer(str(opt_in_one_file))
    assert one_file.fingerprint == two_files.fingerprint
    assert ids(one_file, MIXED) == ids(two_files, MIXED)


def changed(tokenizer: TextTokenizer, change) -> TextTokenizer:
    """A copy whose tokenizer.json went through `change`."""
    whole = json.loads(tokenizer.backend.to_str())
    change(whole)
    backend = Tokenizer.from_str(json.dumps(whole))
    backend.encode_special_tokens = True
    return replace(tokenizer, backend=backend)


MERGED = TextTokenizer(Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")])), 3, 3, None)


def swap_ids(whole):
    vocabulary = whole["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add_token(content: str, token_id: int, special: bool = False):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return lambda whole: whole["added_tokens"].append({"id": token_id, "content": content, **flags})


CHANGES = {
    "ids": (swap_ids, "a"),
    "merges": (lambda whole: whole["model"]["merges"].clear(), "ab"),
    "normaliser": (lambda whole: whole.update(normalizer={"type": "Lowercase"}), "AB"),
    "splitter": (lambda whole: whole.update(pre_tokenizer={"type": "Digits", "individual_digits": True}), None),
    "added token": (add_token("ba", 4), "ba"),
    "added token of the vocabulary": (add_token("b", 1), "ab"),
    "merges ignored": (lambda whole: whole["model"].update(ignore_merges=True), None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_ids_changes_the_fingerprint(name):
    change, text = CHANGES[name]
    assert changed(MERGED, lambda whole: None).fingerprint == MERGED.fingerprint
    assert changed(MERGED, change).fingerprint != MERGED.fingerprint
    if text is not None:
        assert ids(changed(MERGED, change), text) != ids(MERGED, text)


@pytest.mark.parametrize("name", ["bos_id", "eos_id"])
def test_prefix_and_end_belong_to_the_fingerprint(name):
    assert replace(TINY, **{name: 65}).fingerprint != TINY.fingerprint


def test_what_does_not_change_ids_does_not_change_the_fingerprint():
    template = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 3)])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}

    def split_with(trim_offsets: bool):
        splitters = [byte_level | {"trim_offsets": trim_offsets}]
        return lambda whole: whole.update(pre_tokenizer={"type": "Sequence", "pretokenizers": splitters})

    assert changed(MERGED, split_with(True)).fingerprint == changed(MERGED, split_with(False)).fingerprint

    def decorate(whole):
        whole["post_processor"] = json.loads(template.__getstate__())
        whole["truncation"] = {"max_length": 1, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
        add_token("</s>", 3, special=True)(whole)

    assert changed(MERGED, decorate).fingerprint == MERGED.fingerprint


# Saved and loaded again


def test_saved_files_are_the_exact_ones_and_load_anywhere(opt_tokenizer, opt_in_one_file, tmp_path):
    for i, folder in enumerate((opt_tokenizer, opt_in_one_file)):
        tokenizer = load_tokenizer(str(folder))
        saved = tmp_path / str(i)
        tokenizer.save(saved)
        names = {path.name for path in saved.iterdir()}
        assert names == {path.name for path in folder.iterdir()} - {"config.json", "SOURCE.md"}
        assert all((saved / name).read_bytes() == (folder / name).read_bytes() for name in names)
        again = load_tokenizer(str(saved))
        assert again.fingerprint == tokenizer.fingerprint
        assert ids(again, MIXED) == ids(tokenizer, MIXED) == peer_ids(saved, MIXED)


def test_a_tokenizer_made_here_loads_anywhere(tmp_path):
    from transformers import AutoTokenizer

    TINY.save(tmp_path)
    again, peer = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == TINY.fingerprint
    assert ids(again, MIXED) == peer_ids(tmp_path, MIXED) == list(MIXED.encode("utf-8"))
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (256, 257, 258)
    assert (again.bos_id, again.eos_id, again.pad_id) == (256, 257, 258)


@pytest.mark.parametrize("tokenizer_config", [None, {"model_max_length": 1024, "bos_token": None}])
@pytest.mark.parametrize("one_file", [True, False])
def test_special_ids_of_config_json_survive_a_save(
    opt_tokenizer, opt_in_one_file, tmp_path, one_file, tokenizer_config
):
    # As the hub's gpt2: only config.json, which is the model's and stays behind, names bos and eos.
    folder = tmp_path / "modelo"
    folder.mkdir()
    source = opt_in_one_file if one_file else opt_tokenizer
    for name in ["tokenizer.json"] if one_file else ["vocab.json", "merges.txt"]:
        shutil.copyfile(source / name, folder / name)
    (folder / "config.json").write_text('{"bos_token_id": 2, "eos_token_id": 2}')
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    tokenizer = load_tokenizer(str(folder))
    tokenizer.save(tmp_path / "salvo")
    again = load_tokenizer(str(tmp_path / "salvo"))
    assert (again.prefix_id, again.end_id) == (2, 2)
    assert again.fingerprint == tokenizer.fingerprint
    assert peer_ids(tmp_path / "salvo", BRASIL) == ids(load_tokenizer(str(source)), BRASIL)
    saved_config = json.loads((tmp_path / "salvo" / "tokenizer_config.json").read_text())
    assert saved_config["bos_token"] == "</s>"
    assert saved_config.get("model_max_length") == (tokenizer_config or {}).get("model_max_length")


# Which tokens begin and end a text


def write_tiny(folder: Path, tokenizer_config: dict | None = None, **files: dict) -> Path:
    """A folder with the byte tokenizer's tokenizer.json and these other files."""
    folder.mkdir(exist_ok=True)
    TINY.backend.save(str(folder / "tokenizer.json"))
    if tokenizer_config is not None:
        files["tokenizer_config"] = tokenizer_config
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize(
    ("given_files", "prefix_id", "end_id"),
    [
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}, 256, 257),
        ({"tokenizer_config": {"bos_token": "<s>"}}, 256, 256),
        ({"tokenizer_config": {"eos_token": "</s>", "bos_token": None}}, 257, 257),
        ({"tokenizer_config": {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}}, 256, 257),
        ({"special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"}}, 256, 257),
        ({"special_tokens_map": {"bos_token": "<pad>"}, "tokenizer_config": {"bos_token": "<s>"}}, 258, 258),
        ({"tokenizer_config": {"bos_token": "<fim>"}}, 259, 259),  # transformers gives it the next id
        ({"config": {"bos_token_id": 256, "eos_token_id": 257}}, 256, 257),
        ({"config": {"bos_token_id": 256, "eos_token_id": [257, 258]}}, 256, 256),
        ({"config": {"bos_token_id": 5}, "tokenizer_config": {"eos_token": "</s>"}}, 257, 257),
    ],
)
def test_prefix_is_bos_else_eos_and_end_is_eos_else_bos(tmp_path, given_files, prefix_id, end_id):
    tokenizer = load_tokenizer(str(write_tiny(tmp_path / "modelo", **given_files)))
    assert (tokenizer.prefix_id, tokenizer.end_id) == (prefix_id, end_id)


def test_a_bos_whose_id_is_0_is_a_bos():
    assert (replace(TINY, bos_id=0).prefix_id, replace(TINY, eos_id=0).end_id) == (0, 0)


def test_ids_may_have_gaps():
    backend = Tokenizer(models.BPE({"a": 0, "b": 7}, []))
    assert TextTokenizer(backend, bos_id=0, eos_id=None, pad_id=None).num_ids == 8


@pytest.mark.parametrize("config", [{}, {"bos_token": None}, {"pad_token": "<pad>"}])
def test_a_tokenizer_with_neither_bos_nor_eos_is_refused(tmp_path, config):
    assert "neither a bos nor an eos token" in complaint(write_tiny(tmp_path / "modelo", config))


def test_what_the_file_adds_and_cuts_is_switched_off(tmp_path):
    folder = write_tiny(tmp_path / "modelo", {"bos_token": "<s>"})
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [("<s>", 256), ("</s>", 257)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_id=258, pad_token="<pad>")
    backend.save(str(folder / "tokenizer.json"))
    assert backend.encode("abcdef").ids[:3] == [256, 97, 98]  # not vacuous: left alone, the file adds and cuts
    assert [i.tolist() for i in load_tokenizer(str(folder)).encode(["abcdef", ""])] == [list(b"abcdef"), []]


def test_an_added_token_that_is_not_special_is_read_as_the_model_reads_it(tmp_path):
    folder = write_tiny(tmp_path / "modelo", {"bos_token": "<s>"})
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("ão", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    assert ids(tokenizer, "mão <s>") == [ord("m"), 259, *b" <s>"] == peer_ids(folder, "mão <s>")
    assert tokenizer.num_ids == 260


# Faults


@pytest.mark.parametrize("broken", ["{", "[1", '{"version": "1.0"}', ""])
def test_a_broken_tokenizer_json(tmp_path, broken):
    folder = write_tiny(tmp_path / "modelo", {"bos_token": "<s>"})
    (folder / "tokenizer.json").write_text(broken)
    assert "tokenizer.json" in complaint(folder) and str(folder) in complaint(folder)


@pytest.mark.parametrize("broken", [b"{", b"", b"\xff"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_broken_json_beside_it_is_named(tmp_path, name, broken):
    folder = write_tiny(tmp_path / "modelo")
    (folder / name).write_bytes(broken)
    assert f"{folder / name} is not valid JSON" in complaint(folder)


@pytest.mark.parametrize(("name", "broken"), [("vocab.json", "{"), ("merges.txt", "a\n"), ("merges.txt", "zz qq\n")])
def test_broken_vocabulary_or_merges(tmp_path, name, broken):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    assert ids(load_tokenizer(str(tmp_path)), "ab") == [2]
    (tmp_path / name).write_text(broken)
    assert "vocab.json and merges.txt" in complaint(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"model_type": "llama"}'},
        {"config.json": '{"model_type": "opt"}'},
        {"config.json": '{"model_type": "opt"}', "tokenizer_config.json": '{"bos_token": "</s>"}'},
        {"config.json": '{"model_type": "gpt2"}', "vocab.json": '{"a": 0}'},
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, files, caplog):
    # transformers makes an empty tokenizer of a folder with only OPT's config.json: no text would have any token.
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert "holds no tokenizer that can be read" in complaint(tmp_path)


def test_two_files_of_another_class_are_read_by_that_class(opt_tokenizer, tmp_path, caplog):
    # Qwen2's vocab.json and merges.txt look like GPT-2's, but each digit is a piece of its own.
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(opt_tokenizer / name, tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert ids(tokenizer, "1500") == peer_ids(tmp_path, "1500") and len(ids(tokenizer, "1500")) == 4
    assert len(ids(load_tokenizer(str(opt_tokenizer)), "1500")) < 4
    assert "converted through transformers" in caplog.text
    tokenizer.save(tmp_path / "salvo")
    assert ids(load_tokenizer(str(tmp_path / "salvo")), "1500") == ids(tokenizer, "1500")


def test_a_random_model_has_no_tokenizer_of_its_own():
    assert "random:opt-125m has no tokenizer of its own" in complaint("random:opt-125m")
    assert load_tokenizer("random:tiny-opt").fingerprint == TINY.fingerprint
    assert "There is no architecture random:big; choose from random:tiny" in complaint("random:big")


def train_sentencepiece(folder: Path) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra `sentencepiece`")
    text = "\n".join(text.text for text in primer_texts()[:40])
    (folder / "texto.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texto.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_a_sentencepiece_model_alone(tmp_path, caplog):
    folder = train_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(str(folder))
    assert "converted through transformers" in caplog.text
    assert ids(tokenizer, BRASIL) == peer_ids(folder, BRASIL) and tokenizer.decode(ids(tokenizer, BRASIL)) == BRASIL
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    tokenizer.save(tmp_path / "salvo")
    assert load_tokenizer(str(tmp_path / "salvo")).fingerprint == tokenizer.fingerprint


def test_a_sentencepiece_model_without_the_library(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the extra `sentencepiece`"):
        load_tokenizer(str(tmp_path))


def test_a_hub_models_tokenizer_files_are_fetched(tmp_path, monkeypatch):
    folder = write_tiny(tmp_path / "modelo", {"bos_token": "<s>"})
    asked = []
    monkeypatch.setattr(
        tokenizer_module, "download", lambda source, patterns: asked.append((source, patterns)) or folder
    )
    assert ids(load_tokenizer("org/nome"), "é") == list("é".encode())
    ((source, patterns),) = asked
    assert source.name == "org/nome" and {"tokenizer.json", "vocab.json", "merges.txt", "config.json"} <= set(patterns)
    assert not [p for p in patterns if "safetensors" in p or p.endswith(".bin")]  # a tokenizer needs no weights


# Inside a GGUF file


CONTROL, NORMAL = 3, 1
WORDS = {"a": NORMAL, "b": NORMAL, "ab": NORMAL, "1": NORMAL, "2": NORMAL, "Ġ": NORMAL, "ĠĠ": NORMAL, "12": NORMAL}
MARKS = {"<|endoftext|>": CONTROL, "<|im_start|>": CONTROL}


def write_gguf(
    path: Path, tokens: dict[str, int], model: str = "gpt2", pre: str = "smollm", chat: str = "", **special_ids: int
) -> Path:
    gguf = pytest.importorskip("gguf", reason="reading GGUF needs the extra `demo`")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(tokens.values()))
    writer.add_token_merges(["a b", "Ġ Ġ", "1 2"])
    if chat:
        writer.add_chat_template(chat)
    for name, token_id in special_ids.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_gguf_texts_begin_with_end_of_text_and_not_with_the_chat_mark(tmp_path):
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", WORDS | MARKS, bos=9, eos=9, pad=9)))
    end = list(WORDS | MARKS).index("<|endoftext|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (end, end, end)
    assert ids(tokenizer, "ab<|endoftext|>") == [2]  # spelt out; the characters of the mark are not in this vocabulary


def test_gguf_digits_are_split_off_first_where_the_file_says_so(tmp_path):
    smollm = load_tokenizer(str(write_gguf(tmp_path / "s.gguf", WORDS | MARKS)))
    gpt2 = load_tokenizer(str(write_gguf(tmp_path / "g.gguf", WORDS | MARKS, pre="gpt-2")))
    names = list(WORDS)
    assert [names[i] for i in ids(smollm, "ab  12")] == ["ab", "ĠĠ", "1", "2"]
    assert [names[i] for i in ids(gpt2, "ab  12")] == ["ab", "Ġ", "Ġ", "12"]


def test_gguf_without_end_of_text_takes_the_files_ids(tmp_path):
    tokens = WORDS | {"<s>": CONTROL, "</s>": CONTROL}
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "a.gguf", tokens, bos=8, eos=9)))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (8, 9, None)
    assert "neither a bos nor an eos token" in complaint(write_gguf(tmp_path / "b.gguf", tokens))


def test_gguf_is_converted_once(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", WORDS | MARKS)
    first = load_tokenizer(str(path))
    monkeypatch.setattr(tokenizer_module, "gguf_tokenizer", None)  # the second time it is not called
    second = load_tokenizer(str(path))
    assert second.fingerprint == first.fingerprint and second.num_ids == first.num_ids
    assert (second.bos_id, second.eos_id, second.pad_id) == (first.bos_id, first.eos_id, first.pad_id)
    shutil.rmtree(conversion_directory(path))
    second.save(tmp_path / "salvo")  # what was read from the cache does not need it any more
    assert load_tokenizer(str(tmp_path / "salvo")).fingerprint == first.fingerprint


def test_gguf_keeps_its_chat_template(tmp_path):
    from transformers import AutoTokenizer

    chat = "{% for message in messages %}{{ message['content'] }}\nção{% endfor %}"
    path = write_gguf(tmp_path / "m.gguf", WORDS | MARKS, chat=chat)
    for place in ("primeiro", "da-cache"):
        load_tokenizer(str(path)).save(tmp_path / place)
        assert AutoTokenizer.from_pretrained(tmp_path / place).chat_template == chat
    load_tokenizer(str(tmp_path / "primeiro")).save(tmp_path / "outra-vez")
    assert (tmp_path / "outra-vez" / "chat_template.jinja").read_text(encoding="utf-8") == chat


def test_gguf_with_a_cache_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "arquivo").write_text("no directory")
    monkeypatch.setenv("CARTILHA_CACHE", str(tmp_path / "arquivo"))
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "m.gguf", WORDS | MARKS)))
    assert ids(tokenizer, "ab") == [2] and "could not be kept in the cache" in caplog.text


@pytest.mark.parametrize(("model", "pre"), [("llama", "smollm"), ("gpt2", "qwen2"), ("gpt2", "default")])
def test_gguf_tokenizers_of_another_kind_are_refused(tmp_path, model, pre):
    path = write_gguf(tmp_path / "m.gguf", WORDS | MARKS, model, pre)
    assert f"m.gguf has a tokenizer of the kind {model}/{pre}" in complaint(path)


@pytest.mark.parametrize("data", [b"", b"GGUF", b"not a GGUF file at all" * 9])
def test_gguf_that_is_none(tmp_path, data):
    pytest.importorskip("gguf", reason="reading GGUF needs the extra `demo`")
    (tmp_path / "m.gguf").write_bytes(data)
    assert "is not a GGUF file that can be read" in complaint(tmp_path / "m.gguf")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_gguf_that_was_cut_short(tmp_path, share):
    path = write_gguf(tmp_path / "m.gguf", WORDS | MARKS)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "is not a GGUF file that can be read" in complaint(path)


def test_gguf_without_the_extra(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", WORDS | MARKS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install .*\[demo\]"):
        gguf_tokenizer(path)
