"""`evaluate` and `compare` from the command line, on models without any training: every figure against a naive one."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, OPTConfig

from cartilha.corpus.document import Document
from cartilha.errors import install_command
from cartilha.evaluation import corpus as corpus_module
from cartilha.evaluation import nll as nll_module
from cartilha.evaluation.documents import ScoredDocuments
from cartilha.evaluation.nll import TokenRows
from cartilha.evaluation.scorer import Scorer
from cartilha.evaluation.windows import Protocol
from cartilha.machine import devices
from cartilha.model.load import load_model
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import load_tokenizer

Refused = Callable[..., str]
Evaluated = Callable[..., dict[str, Any]]

TINY = ["--model", "random:tiny"]
FLOAT32 = ["--dtype", "float32"]
RECORD_KEYS = {
    "model", "perplexity", "word_perplexity", "bits_per_byte", "bits_per_char", "bits_per_byte_interval", "num_tokens",
    "num_bytes", "num_chars", "num_words", "num_documents", "unused_rows_mass", "baselines", "domains", "seconds",
    "tokens_per_second",
}  # fmt: skip
NUM_SPARE_ROWS = 7


def saved_opt(folder: Path, merges: list[tuple[str, str]]) -> Path:
    """A small OPT in a directory: a byte-level tokenizer with these merges, and rows that no token uses."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    config = OPTConfig(
        vocab_size=len(vocabulary) + 1 + NUM_SPARE_ROWS, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
        bos_token_id=len(vocabulary), eos_token_id=len(vocabulary), pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with another tokenizer than random:tiny, and seven spare rows."""
    return saved_opt(tmp_path_factory.mktemp("models") / "opt", [("d", "a"), ("d", "e"), ("Ġ", "a"), ("n", "h")])


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """random:tiny with a head of zeros."""
    folder = tmp_path_factory.mktemp("models") / "uniforme"
    loaded = load_model("random:tiny", torch.device("cpu"))
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.zero_()
    loaded.model.save_pretrained(folder)
    load_tokenizer("random:tiny").save(folder)
    return folder


@pytest.fixture
def evaluated(cartilha) -> Evaluated:
    """The JSON of `evaluate`, in float32."""

    def call(*arguments: object) -> dict[str, Any]:
        outcome = cartilha("evaluate", *arguments, *FLOAT32, "--json")
        assert outcome.code == 0, outcome.err
        found: dict[str, Any] = json.loads(outcome.out)
        return found

    return call


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))
    return path


def held_out_texts(store: Path) -> list[str]:
    return [document.text for document in TokenStore(store).read_documents("validation")]


def without_clock(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("seconds", "tokens_per_second")}


# What the JSON holds


def test_two_models_that_were_never_trained_have_every_figure(evaluated: Evaluated, store, opt):
    result = evaluated("--model", "random:tiny", opt, "--store", store)
    assert {"protocol", "corpus_hash", "models"} <= result.keys()
    assert {"name", "window", "stride", "prefix_id", "dtype", "hash"} <= result["protocol"].keys()
    assert result["protocol"]["name"] == "full" and result["protocol"]["dtype"] == "float32"
    first, second = result["models"]
    assert [first["model"], second["model"]] == ["random:tiny", str(opt)]
    texts = held_out_texts(store)
    assert len(texts) > 1
    for row in (first, second):
        assert row.keys() >= RECORD_KEYS
        assert row["corpus_hash"] == result["corpus_hash"]
        # Whatever the tokenizer, the text is the same.
        assert row["num_bytes"] == sum(len(text.encode()) for text in texts)
        assert row["num_chars"] == sum(map(len, texts)) and row["num_chars"] < row["num_bytes"]
        assert row["num_words"] == sum(len(text.split()) for text in texts)
        assert row["num_documents"] == len(texts)
        nats = row["loss"] * row["num_tokens"]
        assert row["perplexity"] == pytest.approx(math.exp(nats / row["num_tokens"]))
        assert row["word_perplexity"] in (None, pytest.approx(math.exp(nats / row["num_words"])))
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / row["num_bytes"])
        assert row["bits_per_char"] == pytest.approx(nats / math.log(2) / row["num_chars"])
        low, high = row["bits_per_byte_interval"]
        assert low < row["bits_per_byte"] < high
        assert row["seconds"] > 0 and row["tokens_per_second"] == pytest.approx(row["num_tokens"] / row["seconds"])
        assert row["baselines"]["uniform"]["perplexity"] in (259, 268)
    assert first["num_tokens"] == first["num_bytes"] > second["num_tokens"] > 0
    assert 200 < first["perplexity"] < 400, "fresh weights know next to nothing"
    assert first["protocol"]["hash"] == result["protocol"]["hash"] != second["protocol"]["hash"]


def test_a_store_and_its_text_give_the_same_figures(evaluated: Evaluated, store, tmp_path):
    lines = write_lines(tmp_path / "textos.txt", held_out_texts(store))
    (of_store,) = evaluated(*TINY, "--store", store)["models"]
    (of_text,) = evaluated(*TINY, "--input", lines)["models"]
    alike = RECORD_KEYS - {"baselines", "domains", "seconds", "tokens_per_second"} | {"corpus_hash", "macro"}
    assert {key: of_store[key] for key in alike} == {key: of_text[key] for key in alike}
    assert (of_store["contamination"], of_text["contamination"]) == (0.0, None)
    # Without training text there is nothing to fit or to prime with.
    assert of_text["baselines"].keys() == {"uniform", "xz", "zstd"}
    assert of_store["baselines"].keys() == {"uniform", "unigram", "xz", "xz_primed", "zstd", "zstd_primed"}


def test_a_corpus_of_several_domains(evaluated: Evaluated, cartilha, opt, tmp_path):
    rows = [("carta", "Querida avó, chegámos bem."), ("receita", "Dois ovos e açúcar."), ("carta", "Um abraço.")]
    path = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": text, "domain": name}) for name, text in rows])
    other = write_lines(
        tmp_path / "outros.txt", ["Era uma vez na fazenda.", "O café da manhã esfriou na mesa da sala."]
    )
    per_document = tmp_path / "documentos.parquet"
    (row,) = evaluated("--model", opt, "--input", path, other, "--save", per_document)["models"]
    domains = row["domains"]
    assert len(domains) == 3 and {"carta", "receita"} <= domains.keys()
    for unit in ("num_tokens", "num_bytes", "num_documents"):
        assert sum(domain[unit] for domain in domains.values()) == row[unit]
    nats = [math.log(domain["perplexity"]) * domain["num_tokens"] for domain in domains.values()]
    assert sum(nats) == pytest.approx(row["loss"] * row["num_tokens"])
    bits = [domain["bits_per_byte"] * domain["num_bytes"] for domain in domains.values()]
    assert sum(bits) == pytest.approx(row["bits_per_byte"] * row["num_bytes"])
    table = pq.read_table(per_document).to_pydict()
    losses = [nll / n for nll, n in zip(table["nll"], table["num_tokens"], strict=True)]
    of_bytes = [nll / math.log(2) / n for nll, n in zip(table["nll"], table["num_bytes"], strict=True)]
    assert len(losses) == 5
    assert row["macro"]["loss"] == pytest.approx(np.mean(losses))
    assert row["macro"]["perplexity"] == pytest.approx(math.exp(np.mean(losses)))
    assert row["macro"]["bits_per_byte"] == pytest.approx(np.mean(of_bytes))
    assert abs(row["macro"]["loss"] - row["loss"]) > 1e-4, "all documents weigh alike, so micro and macro cannot differ"
    shown = cartilha("evaluate", "--model", opt, "--input", path, other, *FLOAT32)
    assert shown.code == 0 and all(name in shown.out for name in ("carta", "receita", "Protocol: full"))


# Token by token


def tokens_of(path: Path) -> dict[tuple[str, int, int], tuple[int, float, float, int]]:
    """Token id, nll, entropy and rank by model, document and position; every token once."""
    table = pq.read_table(path).to_pydict()
    keys = list(zip(table["model"], table["document"], table["position"], strict=True))
    assert len(set(keys)) == len(keys)
    values = zip(table["token_id"], table["nll"], table["entropy"], table["rank"], strict=True)
    return dict(zip(keys, values, strict=True))


def test_every_token_is_in_the_parquet_file_once(evaluated: Evaluated, corpus, opt, tmp_path):
    path = tmp_path / "tokens.parquet"
    result = evaluated("--model", "random:tiny", opt, "--input", corpus, "--per_token", path, "--window", 16)
    tokens = tokens_of(path)
    texts = corpus.read_text(encoding="utf-8").splitlines()
    assert len(tokens) == sum(row["num_tokens"] for row in result["models"])
    for row, num_rows in zip(result["models"], (259, 268), strict=True):
        encoded = load_tokenizer(row["model"]).encode(texts)
        for document, ids in enumerate(encoded):
            found = [tokens[row["model"], document, position][0] for position in range(len(ids))]
            assert found == ids.tolist()
        mine = [value for key, value in tokens.items() if key[0] == row["model"]]
        _, nll, entropy, rank = (np.array(column) for column in zip(*mine, strict=True))
        assert math.fsum(nll) == pytest.approx(row["loss"] * row["num_tokens"], rel=1e-6)
        assert (entropy > 0).all() and (entropy <= math.log(num_rows) + 1e-5).all()
        assert rank.min() >= 1 and rank.max() <= num_rows and len(set(rank.tolist())) > 10
        assert (nll[rank == 1] <= entropy[rank == 1] + 1e-4).all(), "the likeliest token costs no more than the mean"


def test_a_uniform_model_is_as_uncertain_as_can_be(evaluated: Evaluated, corpus, uniform, tmp_path):
    path = tmp_path / "tokens.parquet"
    (row,) = evaluated("--model", uniform, "--input", corpus, "--per_token", path)["models"]
    assert row["perplexity"] == pytest.approx(259, rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(row["baselines"]["uniform"]["bits_per_byte"], rel=1e-6)
    for _, nll, entropy, rank in tokens_of(path).values():
        assert nll == pytest.approx(math.log(259), rel=1e-5) and entropy == pytest.approx(math.log(259), rel=1e-5)
        assert rank == 130, "in the middle of 259 that are all alike"


@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_neither_batch_size_nor_order_changes_a_token(
    evaluated: Evaluated, corpus, opt, tmp_path, num_rows, monkeypatch
):
    lines = corpus.read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(num_rows).permutation(len(lines)).tolist()
    shuffled = write_lines(tmp_path / "outra-ordem.txt", [lines[i] for i in order])
    window = 32
    evaluate = ["--model", opt, "--window", window, "--per_token"]
    evaluated(*evaluate, tmp_path / "a.parquet", "--input", corpus)
    shapes: set[tuple[int, int]] = set()
    scored_tokens = nll_module.scored_tokens
    monkeypatch.setattr(
        nll_module,
        "scored_tokens",
        lambda model, batch, *a, **o: shapes.add(batch.input_ids.shape) or scored_tokens(model, batch, *a, **o),
    )
    monkeypatch.setitem(nll_module.TOKENS_PER_FORWARD, "cpu", num_rows * window)
    evaluated(*evaluate, tmp_path / "b.parquet", "--input", shuffled)
    assert max(shape[0] for shape in shapes) == min(num_rows, max(shape[0] for shape in shapes)) >= min(num_rows, 7)
    expected, found = tokens_of(tmp_path / "a.parquet"), tokens_of(tmp_path / "b.parquet")
    assert len(found) == len(expected)
    for (model, document, position), (token, nll, entropy, _) in found.items():
        same = expected[model, order[document], position]
        assert token == same[0]
        assert (nll, entropy) == pytest.approx(same[1:3], abs=1e-4)


# What stands beside


def test_the_mass_of_rows_that_no_token_uses_is_the_naive_sum(evaluated: Evaluated, corpus, opt):
    (row,) = evaluated("--model", opt, "--input", corpus)["models"]
    model = AutoModelForCausalLM.from_pretrained(opt, dtype=torch.float32, attn_implementation="eager")
    tokenizer = load_tokenizer(str(opt))
    assert model.config.vocab_size == tokenizer.num_ids + NUM_SPARE_ROWS
    masses = []
    for ids in tokenizer.encode(corpus.read_text(encoding="utf-8").splitlines()):
        stream = torch.tensor([[tokenizer.prefix_id, *ids.tolist()]])
        with torch.no_grad():
            probabilities = model(stream[:, :-1]).logits[0].double().softmax(-1)
        masses += probabilities[:, -NUM_SPARE_ROWS:].sum(dim=1).tolist()
    assert len(masses) == row["num_tokens"]
    assert row["unused_rows_mass"] == pytest.approx(np.mean(masses), rel=1e-5)
    assert row["unused_rows_mass"] > 1e-3
    (tiny,) = evaluated(*TINY, "--input", corpus)["models"]
    assert tiny["unused_rows_mass"] == 0, "all 259 rows are tokens"


def test_unigram_is_the_naive_count_of_the_training_bytes(evaluated: Evaluated, store):
    (row,) = evaluated(*TINY, "--store", store)["models"]
    counts = Counter(b"".join(document.text.encode() for document in TokenStore(store).read_documents("train")))
    total, distinct = sum(counts.values()), len(counts)
    text = b"".join(text.encode() for text in held_out_texts(store))
    nats = -sum(math.log((counts[byte] + distinct / 259) / (total + distinct)) for byte in text)
    assert row["baselines"]["unigram"]["perplexity"] == pytest.approx(math.exp(nats / len(text)))
    assert row["baselines"]["unigram"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text))
    assert row["baselines"]["unigram"]["perplexity"] < row["baselines"]["uniform"]["perplexity"] == 259


def test_unigram_needs_the_tokenizer_of_the_store(evaluated: Evaluated, store, opt):
    (row,) = evaluated("--model", opt, "--store", store)["models"]
    assert "unigram" not in row["baselines"] and "xz_primed" in row["baselines"]


def test_compressors_are_there_and_the_training_text_helps_them(evaluated: Evaluated, store):
    (row,) = evaluated(*TINY, "--store", store)["models"]
    for name in ("xz", "zstd"):
        plain, primed = row["baselines"][name], row["baselines"][f"{name}_primed"]
        assert 0 < primed["bits_per_byte"] < plain["bits_per_byte"]
        texts = held_out_texts(store)
        assert plain["num_bytes"] == primed["num_bytes"] == len("\n".join(texts).encode())


def test_documents_of_the_training_text_are_counted(evaluated: Evaluated, cartilha, store, tmp_path):
    known = [document.text for document in TokenStore(store).read_documents("train")]
    fresh = [f"Um texto novo, número {number}." for number in range(3)]
    clean = write_lines(tmp_path / "novos.txt", fresh)
    mixed = write_lines(tmp_path / "mistura.txt", [known[3], *fresh, known[0] + "!"])
    (row,) = evaluated(*TINY, "--store", store, "--input", clean)["models"]
    assert row["contamination"] == 0 and not any("word for word" in note for note in row["notes"])
    (row,) = evaluated(*TINY, "--store", store, "--input", mixed)["models"]
    assert row["contamination"] == 1 / 5
    assert any("20.0% of these documents are in the store's training text" in note for note in row["notes"])
    outcome = cartilha("evaluate", *TINY, "--store", store, "--input", mixed, *FLOAT32)
    assert "20.0% of the documents are in the store's training side" in outcome.out


def test_the_training_text_is_labelled(cartilha, store):
    outcome = cartilha("evaluate", *TINY, "--store", store, "--split", "train", *FLOAT32, "--json")
    (row,) = json.loads(outcome.out)["models"]
    assert row["contamination"] == 1
    assert any("training text" in note for note in row["notes"])
    assert "Scoring the training text" in outcome.err
    assert row["num_documents"] == TokenStore(store).counts["train"].num_documents


# Two models


def compared(cartilha, *arguments: object) -> dict[str, Any]:
    outcome = cartilha("compare", *arguments, "--json")
    assert outcome.err.count("No GPU was found") <= 1
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_two_tokenizers_compare_by_bits_per_byte(cartilha, evaluated: Evaluated, corpus, opt):
    result = compared(cartilha, "--models", "random:tiny", opt, "--input", corpus, *FLOAT32)
    first, second = (evaluated("--model", model, "--input", corpus)["models"][0] for model in ("random:tiny", opt))
    assert first["num_tokens"] > second["num_tokens"]
    difference = second["bits_per_byte"] - first["bits_per_byte"]
    assert result["bits_per_byte_difference"] == pytest.approx(difference)
    assert result["bits_per_byte_first"] == pytest.approx(first["bits_per_byte"])
    low, high = result["bits_per_byte_difference_interval"]
    assert low < difference < high
    assert 0 < result["p_value"] <= 1 and 0 <= result["share_improved"] <= 1
    assert result["num_documents"] == 20 and result["num_documents_left_out"] == 0
    assert all(row["loss"] > 0 and row["num_tokens"] > 0 for rows in result["loss_by_position"] for row in rows)
    assert [sum(row["num_tokens"] for row in rows) for rows in result["loss_by_position"]] == [
        first["num_tokens"],
        second["num_tokens"],
    ]
    changed = {row["doc_id"] for row in result["gained_most"] + result["lost_most"]}
    assert changed and all(name.startswith("textos.txt:") for name in changed)
    turned = compared(cartilha, "--models", opt, "random:tiny", "--input", corpus, *FLOAT32)
    assert turned["bits_per_byte_difference"] == pytest.approx(-difference)


def test_saved_evaluations_compare_like_the_models(cartilha, evaluated: Evaluated, store, opt, tmp_path):
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for model, file in zip(("random:tiny", opt), files, strict=True):
        evaluated("--model", model, "--store", store, "--save", file)
    saved = compared(cartilha, "--evaluations", *files)
    scored = compared(cartilha, "--models", "random:tiny", opt, "--store", store, *FLOAT32)
    for key in ("corpus_hash", "models", "protocols", "loss_by_position", "gained_most", "lost_most", "domains"):
        assert saved[key] == scored[key]
    for key in ("bits_per_byte_difference", "bits_per_byte_difference_interval", "p_value", "share_improved"):
        assert saved[key] == scored[key]


def test_other_documents_and_other_protocols_are_refused(evaluated: Evaluated, refused: Refused, corpus, opt, tmp_path):
    def save(name: str, *options: object) -> Path:
        evaluated(*options, "--input", corpus, "--save", tmp_path / name)
        return tmp_path / name

    whole = save("whole.parquet", *TINY)
    fewer = save("fewer.parquet", *TINY, "--limit_documents", 19)
    first = save("first.parquet", *TINY, "--protocol", "first-12")
    other = save("other.parquet", "--model", opt, "--protocol", "first-12")
    assert "different documents" in refused("compare", "--evaluations", whole, fewer)
    sentence = refused("compare", "--evaluations", whole, first)
    assert "full" in sentence and "first-12" in sentence
    # The first 12 tokens of two tokenizers are not the same text.
    assert "cuts these documents at other places" in refused("compare", "--evaluations", first, other)
    assert "no saved evaluation" in refused("compare", "--evaluations", whole, corpus)
    assert "two models" in refused("compare", "--evaluations", whole)
    assert "two models" in refused("compare", "--models", "random:tiny", "--evaluations", whole)


def test_two_evaluations_with_other_windows_are_compared_with_a_warning(
    evaluated: Evaluated, cartilha, corpus, tmp_path
):
    files = [tmp_path / f"{window}.parquet" for window in (64, 32)]
    for window, file in zip((64, 32), files, strict=True):
        evaluated(*TINY, "--input", corpus, "--window", window, "--save", file)
    assert "window 64 and 32; stride 32 and 16" in cartilha("compare", "--evaluations", *files).err
    assert "not scored alike" not in cartilha("compare", "--evaluations", files[0], files[0]).err


def test_the_drift_of_bf16_is_a_comparison_of_two_dtypes(cartilha, corpus, opt, tmp_path, monkeypatch):
    """As docs/measures.md says it is had; this machine may lack bf16, and emulates it then."""
    monkeypatch.setattr(devices, "hardware_dtypes", lambda *_: ("bfloat16", "float32"))
    files = []
    for dtype in ("float32", "bfloat16"):
        files.append(tmp_path / f"{dtype}.parquet")
        saved = cartilha("evaluate", "--model", opt, "--input", corpus, "--dtype", dtype, "--save", files[-1])
        assert saved.code == 0, saved.err
    result = compared(cartilha, "--evaluations", *files)
    assert [protocol["dtype"] for protocol in result["protocols"]] == ["float32", "bfloat16"]
    assert result["protocols"][0]["hash"] != result["protocols"][1]["hash"]
    assert 0 < abs(result["bits_per_byte_difference"]) < 0.02 * result["bits_per_byte_first"]


def test_the_drift_of_half_precision_is_of_few_tokens_and_the_wall_time_is_told(cartilha, opt, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "hardware_dtypes", lambda *_: ("bfloat16", "float32"))
    rows = [json.dumps({"text": f"{i} " * 90, "domain": f"d{i % 30}"}) for i in range(120)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    arguments = ["--input", path, "--dtype", "bfloat16"]
    result = json.loads(cartilha("evaluate", "--model", opt, opt, *arguments, "--json").out)
    for row in result["models"]:
        assert row["dtype_drift"]["num_tokens"] == row["num_tokens"] // 20 <= 2000
        assert abs(row["dtype_drift"]["nats_per_token"]) < 0.05
    assert result["wall_seconds"] > sum(row["seconds"] for row in result["models"]) > 0
    shown = cartilha("evaluate", "--model", opt, *arguments).out
    assert "s of them scoring" in shown and "and 10 other domains" in shown and shown.count(": perplexity") == 20


# Several processes, and memory


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "cartilha", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)


def test_two_processes_give_the_figures_of_one_and_one_of_them_prints(evaluated: Evaluated, store, opt, tmp_path):
    files = [tmp_path / "um.parquet", tmp_path / "dois.parquet"]
    evaluate = ["--model", opt, "--store", store, "--split", "train", "--save"]
    (alone,) = evaluated(*evaluate, files[0])["models"]
    found = torchrun("evaluate", *evaluate, files[1], *FLOAT32, "--json")
    assert found.returncode == 0, found.stderr
    (together,) = json.loads(found.stdout)["models"]  # one JSON object: the other process printed nothing
    assert together.keys() == alone.keys()
    for key in ("perplexity", "bits_per_byte", "word_perplexity", "bits_per_char", "loss", "unused_rows_mass"):
        assert together[key] == pytest.approx(alone[key], rel=1e-9), key
    assert together["bits_per_byte_interval"] == pytest.approx(alone["bits_per_byte_interval"], rel=1e-6)
    for key in ("corpus_hash", "protocol", "num_tokens", "num_bytes", "num_documents", "contamination", "notes"):
        assert together[key] == alone[key]
    assert together["baselines"] == alone["baselines"]
    assert together["domains"].keys() == alone["domains"].keys()
    one, two = (pq.read_table(file).to_pydict() for file in files)
    assert len(one["nll"]) == alone["num_documents"] > 10
    assert {key: value for key, value in one.items() if key != "nll"} == {
        key: value for key, value in two.items() if key != "nll"
    }
    np.testing.assert_allclose(two["nll"], one["nll"], rtol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dois.parquet", "um.parquet"]


@pytest.mark.parametrize("option", [["--per_token", "tokens.parquet"], ["--continuations", 2], ["--tasks", "x"]])
def test_what_takes_one_process_is_refused_in_several(refused: Refused, store, tmp_path, option, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sentence = refused("evaluate", *TINY, "--store", store, *option)
    assert option[0] in sentence and "one process" in sentence
    assert not list(tmp_path.iterdir())


def test_each_token_is_the_same_on_one_process_and_on_two(corpus, opt, monkeypatch):
    tokenizer = load_tokenizer(str(opt))
    loaded = load_model(str(opt), torch.device("cpu"), tokenizer=tokenizer)
    scorer = Scorer(loaded, tokenizer, Protocol("full", 32, 16, tokenizer.prefix_id, "float32"))
    documents = [Document(line, f"d{i}", "t", "t") for i, line in enumerate(corpus.read_text("utf-8").splitlines())]

    def score(rank: int, num_ranks: int) -> tuple[dict[tuple[int, int], float], str]:
        """Nll by document and position; each rank goes through all documents and scores its own."""
        monkeypatch.setattr(corpus_module, "world", lambda: (rank, num_ranks))
        monkeypatch.setattr(corpus_module, "gather_objects", lambda mine: [mine])
        found: dict[tuple[int, int], float] = {}

        def take(rows: TokenRows) -> None:
            for document, position, nll in zip(rows.document, rows.position, rows.nll, strict=True):
                assert (int(document), int(position)) not in found
                found[int(document), int(position)] = float(nll)

        scored, _ = corpus_module.score_corpus(scorer, documents, take_rows=take)
        return found, scored.corpus_hash

    alone, hash_alone = score(0, 1)
    (one, hash_one), (two, hash_two) = score(0, 2), score(1, 2)
    assert one and two and not one.keys() & two.keys()
    assert {**one, **two} == pytest.approx(alone, abs=1e-4)
    # Each rank alone knows the hash of the whole corpus.
    assert hash_alone == hash_one == hash_two


def test_no_more_than_a_shard_of_the_corpus_is_in_memory(evaluated: Evaluated, corpus, opt, tmp_path, monkeypatch):
    """Token ids are the bulk of what is kept of a text; those of scored shards must be gone."""
    lines = corpus.read_text(encoding="utf-8").splitlines()
    path = write_lines(tmp_path / "longo.txt", [f"{line} ({i})" for i in range(10) for line in lines])
    monkeypatch.setattr(corpus_module, "SHARD_CHARS", 500)
    shards: list[list[weakref.ref[Any]]] = []
    alive: list[int] = []
    encode_documents, scored_tokens = corpus_module.encode_documents, nll_module.scored_tokens

    def encode(*arguments: Any, **options: Any) -> ScoredDocuments:
        found = encode_documents(*arguments, **options)
        shards.append([weakref.ref(ids) for ids in found.ids])
        return found

    def score(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(any(ids() is not None for ids in shard) for shard in shards))
        return scored_tokens(*arguments, **options)

    monkeypatch.setattr(corpus_module, "encode_documents", encode)
    monkeypatch.setattr(nll_module, "scored_tokens", score)
    (row,) = evaluated("--model", opt, "--input", path, "--per_token", tmp_path / "tokens.parquet")["models"]
    assert row["num_documents"] == 200 and len(shards) > 20
    assert set(alive) == {1}
    assert sum(any(ids() is not None for ids in shard) for shard in shards) == 0


def test_shards_change_no_figure(evaluated: Evaluated, corpus, opt, monkeypatch):
    (whole,) = evaluated("--model", opt, "--input", corpus)["models"]
    monkeypatch.setattr(corpus_module, "SHARD_CHARS", 150)
    (parts,) = evaluated("--model", opt, "--input", corpus)["models"]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert parts["positions"] == [{**row, "loss": pytest.approx(row["loss"], rel=1e-5)} for row in whole["positions"]]
    for key in ("corpus_hash", "num_documents", "num_tokens", "num_bytes"):
        assert parts[key] == whole[key]


# Bad input (more of it in test_bad_input.py)


@pytest.fixture
def text_refused(refused: Refused, corpus) -> Iterator[Refused]:
    """`evaluate` on the corpus, refused."""
    yield lambda *options: refused("evaluate", *TINY, "--input", corpus, *options)


def test_no_documents(refused: Refused, tmp_path):
    for number, lines in enumerate(([], ["", "  ", ""])):
        path = write_lines(tmp_path / f"{number}.txt", lines)
        assert "no documents to score" in refused("evaluate", *TINY, "--input", path)


def test_a_document_in_another_encoding_is_named_and_the_remedy_works(refused: Refused, evaluated: Evaluated, tmp_path):
    path = tmp_path / "antigo.txt"
    path.write_bytes("Primeiro.\nMaçã.\n".encode("latin-1"))
    sentence = refused("evaluate", *TINY, "--input", path)
    assert "antigo.txt, line 2" in sentence and "--encoding" in sentence
    (row,) = evaluated(*TINY, "--input", path, "--encoding", "latin-1")["models"]
    assert row["num_bytes"] == len("Primeiro.Maçã.".encode())


def test_a_model_without_bos_and_eos(refused: Refused, corpus, opt, tmp_path):
    for file in opt.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("tokenizer_config.json", "config.json"):
        values = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        kept = {key: value for key, value in values.items() if not key.startswith(("bos", "eos"))}
        (tmp_path / name).write_text(json.dumps(kept), encoding="utf-8")
    sentence = refused("evaluate", "--model", tmp_path, "--input", corpus)
    assert "neither a bos nor an eos" in sentence and "tokenizer_config.json" in sentence


def test_a_hub_that_cannot_be_reached(refused: Refused, corpus):
    sentence = refused("evaluate", "--model", "facebook/opt-125m", "--input", corpus)  # tests run without a hub
    assert "facebook/opt-125m" in sentence and "cannot be reached" in sentence


def test_a_protocol_beyond_the_context(refused: Refused, corpus, opt):
    evaluate = ["evaluate", "--model", opt, "--input", corpus]
    for options in (["--protocol", "first-257"], ["--window", 257]):
        sentence = refused(*evaluate, *options)
        assert "257" in sentence and "256" in sentence
    compare = ["compare", "--models", "random:tiny", opt, "--input", corpus, "--window", 257]
    assert "context of 256" in refused(*compare)


def test_an_unknown_task(text_refused: Refused):
    pytest.importorskip("lm_eval", reason="needs lm-eval (extra `eval`)")
    sentence = text_refused("--tasks", "leitura_que_nao_existe")
    assert "'leitura_que_nao_existe'" in sentence and "lm-eval ls tasks" in sentence


def test_tasks_without_the_extra(text_refused: Refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert install_command("eval") in text_refused("--tasks", "lambada_openai")


@pytest.mark.parametrize("number", [1, 0, -2])
def test_too_few_continuations(text_refused: Refused, number):
    assert "2 or more" in text_refused("--continuations", number)


def test_one_file_for_two_models(refused: Refused, corpus, opt, tmp_path):
    sentence = refused("evaluate", "--model", "random:tiny", opt, "--input", corpus, "--save", tmp_path / "a.parquet")
    assert "--save" in sentence and not list(tmp_path.iterdir())


def test_a_refused_evaluation_leaves_no_file_of_tokens(text_refused: Refused, tmp_path):
    text_refused("--per_token", tmp_path / "tokens.parquet", "--window", 4096)
    assert not list(itertools.chain(tmp_path.iterdir()))
