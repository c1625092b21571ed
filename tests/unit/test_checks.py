"""Each check finds the fault that it is there for, and a sound set-up passes them all."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

from cartilha.blocks.packing import PackedStream, stack
from cartilha.checks import machine, model, text, training
from cartilha.checks.outcome import CheckResult, Subject
from cartilha.config import CheckConfig, TrainConfig
from cartilha.corpus.document import Document
from cartilha.corpus.primer import read_primer
from cartilha.corpus.questions import Question, QuestionRuns
from cartilha.evaluation import nll as nll_module
from cartilha.evaluation.nll import DocumentScores
from cartilha.evaluation.scorer import make_scorer
from cartilha.model import attention, forward, rows
from cartilha.model import loss as loss_module
from cartilha.model.configuration import model_config
from cartilha.model.load import load_model, prepare_model
from cartilha.model.packed_or_rows import runs_packed
from cartilha.pipeline import check
from cartilha.pipeline.check import CHEAP_CHECKS, CHECKS, run_checks, sample_documents
from cartilha.tokens.store import TokenStore
from cartilha.tokens.store_writer import writing_store
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer
from cartilha.training import checkpoint as checkpoint_module
from cartilha.training import loop
from cartilha.training.optimizer import StateSize, resolve_lr
from cartilha.training.schedule import Schedule
from stores import add_documents

CPU = torch.device("cpu")


def subject_of(loaded: Any, tokenizer: TextTokenizer, folder: Path, **changes: Any) -> Subject:
    held_out, trained_on = sample_documents(None, quick=True)
    scorer = make_scorer(loaded, tokenizer, torch.float32)
    subject = Subject(
        scorer.loaded, scorer.tokenizer, scorer.protocol, held_out=held_out, training=trained_on, store=None,
        block_size=128, lr=3e-3, optimizer="rmsprop", micro_batch_size=2, planned_bytes=2**24, disk_bytes=2**24,
        output=folder, quick=True, is_random=True,
    )  # fmt: skip
    return replace(subject, **changes)


@pytest.fixture()
def fresh(tmp_path) -> Subject:
    tokenizer = load_tokenizer("random:tiny")
    return subject_of(load_model("random:tiny", CPU, tokenizer=tokenizer), tokenizer, tmp_path)


@pytest.fixture()
def taught(taught_once) -> Subject:
    """One that has scored nothing yet."""
    return replace(taught_once)


@pytest.fixture(scope="module")
def taught_once(tmp_path_factory) -> Iterator[Subject]:
    """A tiny model that has learnt something: below a unigram model."""
    tokenizer = load_tokenizer("random:tiny")
    subject = subject_of(load_model("random:tiny", CPU, tokenizer=tokenizer), tokenizer, tmp_path_factory.mktemp("run"))
    sampler = training._sampler(subject.stream(subject.training, 128), blocks_per_step=4)
    for _ in training._steps(subject, training._state(subject, 0.02), sampler, Schedule(150, 0.02, 0.1, 0.1), 4):
        pass
    yield replace(subject, is_random=False)


@pytest.fixture()
def store(tmp_path) -> TokenStore:
    """The primer's first texts, split by hand."""
    return TokenStore(made_store(tmp_path / "store", list(read_primer())[:30], leaked=0))


def made_store(path: Path, documents: list[Document], leaked: int, tokenizer: TextTokenizer | None = None) -> Path:
    """Ten documents held out, of which so many are trained on, too."""
    with writing_store(path, tokenizer or load_tokenizer("random:tiny"), replace=False) as writer:
        held_out, trained = documents[:10], documents[10:] + documents[:leaked]
        add_documents(writer, "validation", held_out)
        add_documents(writer, "train", trained)
        writer.finish({"inputs": [], "settings": {}, "dropped": {}})
    return path


def on_store(subject: Subject, store: TokenStore) -> Subject:
    held_out, trained_on = sample_documents(store, quick=True)
    return replace(subject, store=store, held_out=held_out, training=trained_on)


def failed(results: list[CheckResult]) -> list[str]:
    return [result.name for result in results if result.outcome == "failed"]


# A sound set-up passes


def architectures() -> dict[str, Any]:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    return {
        "opt": lambda v: OPTConfig(vocab_size=v, word_embed_proj_dim=64, ffn_dim=128, **shape),
        "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=64, n_layer=2, n_head=4, n_positions=512),
        "llama": lambda v: LlamaConfig(vocab_size=v, intermediate_size=128, **shape),
        "gpt_neox": lambda v: GPTNeoXConfig(vocab_size=v, intermediate_size=128, **shape),
    }


@pytest.mark.parametrize("name", list(architectures()))
def test_no_false_alarm(name, opt_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "OVERFIT_TEXTS_QUICK", 3)
    tokenizer = load_tokenizer(str(opt_tokenizer))
    torch.manual_seed(1)
    config = architectures()[name](50272)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    loaded = prepare_model(plain, name, CPU, tokenizer)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    results = run_checks(subject_of(loaded, tokenizer, tmp_path), CHECKS)
    assert failed(results) == []
    outcomes = {result.name: result.outcome for result in results}
    assert {n for n, outcome in outcomes.items() if outcome == "not applicable"} == {"precision", "leak", "benchmark"}
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[key]), "the checks put the weights back"
    assert not list(tmp_path.iterdir()), "and leave no file"


def test_a_taught_model_on_a_store_passes(taught, store):
    results = run_checks(on_store(taught, store), CHECKS)
    assert failed(results) == []
    assert {r.name for r in results if r.outcome == "not applicable"} == {"benchmark", "precision"}
    start = next(r for r in results if r.name == "start")
    assert start.figures["pretrained"] < start.figures["unigram"] < start.figures["num_rows"]


def test_every_result_says_what_it_means(fresh):
    for result in run_checks(fresh, CHECKS):
        assert result.name and result.measured and result.expected and result.meaning and result.seconds >= 0
        assert result.remedy or result.outcome == "not applicable"


# Planted faults


def test_a_mask_that_is_off_by_one(fresh, monkeypatch):
    plain = F.scaled_dot_product_attention

    def sees_the_next(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        length = query.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool).tril(1)
        return plain(query, key, value, attn_mask=mask, **kwargs)

    monkeypatch.setattr(attention, "HAS_KERNELS", False)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", sees_the_next)
    assert failed(run_checks(fresh, (model.causality,))) == ["causality"]


def test_a_mask_that_hides_the_token_itself(taught, monkeypatch):
    plain = F.scaled_dot_product_attention

    def sees_only_before(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        length = query.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool).tril(-1)
        mask[0, 0] = True
        return plain(query, key, value, attn_mask=mask, **kwargs)

    monkeypatch.setattr(attention, "HAS_KERNELS", False)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", sees_only_before)
    # No future is seen, so that only the peer can tell; its own attention runs through the same function, unpatched.
    monkeypatch.setattr(model, "_plain_nll", _with(monkeypatch, plain, model._plain_nll))
    assert failed(run_checks(taught, (model.causality, model.truth))) == ["truth"]


def _with(monkeypatch, plain, function):
    def call(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", plain)
            return function(*arguments)

    return call


def test_documents_that_see_each_other(fresh, monkeypatch):
    real = forward._segments

    def one_segment(the_model, batch, dtype, body):
        rows, length = batch.input_ids.shape
        return replace(real(the_model, batch, dtype, body), lengths=(length,) * rows)

    monkeypatch.setattr(forward, "_segments", one_segment)
    assert failed(run_checks(fresh, (model.causality, model.isolation))) == ["isolation"]


@pytest.fixture(params=["gemma2", "bloom", "mamba"])
def proven(request, tmp_path) -> Subject:
    """A model that is packed by proof, one whose documents have rows of their own, and one that carries a state."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 16, "intermediate_size": 48, "state_size": 4, "max_position_embeddings": 1024}  # fmt: skip
    tokenizer = load_tokenizer("random:tiny")
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, vocab_size=259, pad_token_id=258, initializer_range=0.2, **sizes)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return subject_of(prepare_model(made, request.param, CPU, tokenizer), tokenizer, tmp_path)


def test_documents_that_see_each_other_in_a_model_of_another_kind(proven, monkeypatch):
    checks = (model.causality, model.isolation, model.truth)
    assert failed(run_checks(proven, checks)) == []
    if runs_packed(proven.model):
        one = attention.KERNELS["segments"]
        monkeypatch.setattr(
            forward, "_segments", lambda m, batch, *rest: one.of((batch.input_ids.size,), batch.input_ids.size, CPU)
        )
    else:
        real = rows.row_groups
        monkeypatch.setattr(rows, "row_groups", lambda lengths, *rest: real(np.array([lengths.sum()]), *rest))
    found = failed(run_checks(replace(proven), (model.causality, model.isolation)))
    assert found == ["isolation"]


def test_positions_that_go_on_from_the_document_before(fresh, monkeypatch):
    real = PackedStream.block

    def counted_through(self, index):
        block = real(self, index)
        return replace(block, position_ids=np.arange(len(block.input_ids)))

    tokenizer = fresh.tokenizer
    learnt = replace(fresh, loaded=load_model("random:tiny-opt", CPU, tokenizer=tokenizer))  # learnt positions
    assert failed(run_checks(learnt, (model.isolation,))) == []
    monkeypatch.setattr(PackedStream, "block", counted_through)
    assert failed(run_checks(learnt, (model.isolation,))) == ["isolation"]


def test_labels_that_are_not_shifted_in_training(fresh, monkeypatch):
    real = PackedStream.block

    def unshifted(self, index):
        block = real(self, index)
        return replace(block, targets=np.where(block.targets >= 0, block.input_ids, block.targets))

    monkeypatch.setattr(PackedStream, "block", unshifted)
    assert failed(run_checks(fresh, (model.truth,))) == ["truth"]


def test_labels_that_are_not_shifted_in_evaluation(fresh, monkeypatch):
    real = nll_module._batch

    def unshifted(*arguments):
        batch = real(*arguments)
        return replace(batch, targets=np.where(batch.targets >= 0, batch.input_ids, batch.targets))

    monkeypatch.setattr(nll_module, "_batch", unshifted)
    assert failed(run_checks(fresh, (model.truth,))) == ["truth"]


def test_weights_left_random(taught, fresh):
    assert failed(run_checks(taught, (model.start,))) == []
    assert failed(run_checks(replace(fresh, is_random=False), (model.start,))) == ["start"]


def test_a_diverged_model_fails_and_breaks_nothing(fresh):
    """A loss of thousands of nats per token has an infinite perplexity, and every check still says what it measured."""
    with torch.no_grad():
        fresh.loaded.model.get_output_embeddings().weight.mul_(1e6)
    results = run_checks(replace(fresh, is_random=False), (*CHEAP_CHECKS, model.start, training.overfit))
    assert "start" in failed(results)
    start = next(result for result in results if result.name == "start")
    assert start.figures["pretrained"] == math.inf and "pretrained inf" in start.measured
    assert not any("Error" in result.measured for result in results)


def test_a_tokenizer_of_another_model(taught):
    """The same number of ids, other meanings: nothing but the start can tell."""
    settings = taught.tokenizer.backend.to_str()
    backend = Tokenizer.from_str(settings)
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(a, b)
            for a, b in zip("abcdefghijklmnopqrstuvwxyz ", "QWERTYUIOPLKJHGFDSAZXCVBNM_", strict=True)
        ]
    )
    other = replace(taught, tokenizer=replace(taught.tokenizer, backend=backend))
    assert failed(run_checks(other, (model.start,))) == ["start"]


def test_a_loss_of_the_wrong_size(fresh, monkeypatch):
    real = model.token_scores

    def larger(*arguments):
        scores = real(*arguments)
        return replace(scores, nll=scores.nll * 1.02)

    monkeypatch.setattr(model, "token_scores", larger)
    assert failed(run_checks(fresh, (model.start,))) == ["start"]


def test_a_store_of_another_tokenizer(fresh, tmp_path):
    backend = Tokenizer.from_str(fresh.tokenizer.backend.to_str())
    backend.normalizer = normalizers.Lowercase()
    other = replace(fresh.tokenizer, backend=backend)
    store = TokenStore(made_store(tmp_path / "other", list(read_primer())[:30], 0, other))
    results = run_checks(on_store(fresh, store), (text.round_trip, text.vocabulary))
    assert failed(results) == ["round trip", "vocabulary"]
    assert "another tokenizer" in results[1].measured


def test_ids_without_a_row(fresh, store, monkeypatch):
    tokens = store.tokens("train").copy()
    tokens[7] = 259
    monkeypatch.setattr(TokenStore, "tokens", lambda self, split: tokens)
    assert failed(run_checks(on_store(fresh, store), (text.vocabulary,))) == ["vocabulary"]


def test_tokens_that_say_something_else(fresh, store, monkeypatch):
    tokens = np.roll(store.tokens("train"), 1)
    monkeypatch.setattr(TokenStore, "tokens", lambda self, split: tokens)
    assert failed(run_checks(on_store(fresh, store), (text.round_trip,))) == ["round trip"]


def test_a_tokenizer_that_loses_text(fresh):
    backend = Tokenizer.from_str(fresh.tokenizer.backend.to_str())
    backend.normalizer = normalizers.StripAccents()
    lossy = replace(fresh, tokenizer=replace(fresh.tokenizer, backend=backend))
    backend.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    assert failed(run_checks(lossy, (text.round_trip,))) == ["round trip"]


def test_a_tokenizer_that_composes_and_text_that_is_decomposed(fresh):
    backend = Tokenizer.from_str(fresh.tokenizer.backend.to_str())
    backend.normalizer = normalizers.NFC()
    apart = [replace(document, text=unicodedata.normalize("NFD", document.text)) for document in fresh.held_out]
    subject = replace(fresh, tokenizer=replace(fresh.tokenizer, backend=backend), held_out=apart)
    (result,) = run_checks(subject, (text.round_trip,))
    assert result.outcome == "failed" and "--clean nfc" in result.remedy and "own tokenizer" not in result.remedy


def test_a_leak(fresh, tmp_path):
    store = TokenStore(made_store(tmp_path / "leaky", list(read_primer())[:30], leaked=1))
    (result,) = run_checks(on_store(fresh, store), (text.leak,))
    assert result.outcome == "failed" and "1 of 10" in result.measured


def test_questions_of_a_benchmark_in_the_training_text(fresh, tmp_path):
    documents = list(read_primer())[:30]
    subject = on_store(fresh, TokenStore(made_store(tmp_path / "known", documents, leaked=0)))
    texts = [next(subject.store.texts("train"))[:200], " ".join("abcdefghijklmn"), " ".join("opqrstuvwxyzab")]
    asked = [Question("prova", str(number), (words,)) for number, words in enumerate(texts)]
    results = [run_checks(replace(subject, questions=QuestionRuns.of(own)), (text.benchmark,))[0]
               for own in (asked, asked[1:])]  # fmt: skip
    assert [result.outcome for result in results] == ["failed", "passed"]
    assert results[0].measured == "prova: 1 of 3 (33.3%)" and "--decontaminate" in results[0].remedy


def test_near_duplicates(fresh, tmp_path, monkeypatch):
    pytest.importorskip("rensa", reason="needs rensa (extra `text`)")
    monkeypatch.setattr(text, "NEAR_SECONDS_QUICK", math.inf)
    documents = list(read_primer())[:30]
    copies = [replace(d, text=d.text.replace("que", "qual"), id=f"{d.id} again") for d in documents[:2]]
    store = TokenStore(made_store(tmp_path / "near", documents + copies, leaked=0))
    (result,) = run_checks(on_store(fresh, store), (text.leak,))
    assert result.outcome == "failed" and result.figures["num_exact"] == 0
    assert result.figures["near_duplicate_share"] == pytest.approx(0.2)


def test_broken_accumulation(fresh, monkeypatch):
    def mean_of_means(the_model, blocks, size, num_targets, dtype, scaler, body):
        loss = torch.zeros(())
        starts = range(0, len(blocks), size)
        for begin in starts:
            batch = stack(blocks[begin : begin + size])
            share = forward.batch_nll(the_model, batch, dtype) / batch.num_targets / len(starts)
            share.backward()
            loss += share.detach()
        return loss

    assert failed(run_checks(fresh, (training.accumulation,))) == []
    monkeypatch.setattr(loop, "_accumulate", mean_of_means)
    assert failed(run_checks(fresh, (training.accumulation,))) == ["accumulation"]


@pytest.mark.parametrize("fault", ["a gradient twice as large", "a chunk left out"])
def test_a_broken_loss(fresh, monkeypatch, fault):
    real = loss_module.chunk_kernel("cpu")

    def doubled(logits, index, scored):
        nll, gradient = real(logits, index, scored)
        return nll, gradient * 2

    def first_only(logits, index, scored):
        return real(logits, index, scored * (torch.arange(len(scored))[:, None] < 32))

    broken = doubled if fault.startswith("a gradient") else first_only
    monkeypatch.setattr(loss_module, "chunk_kernel", lambda device: broken)
    assert failed(run_checks(fresh, (training.loss,))) == ["loss"]


@pytest.mark.parametrize("fault", ["frozen", "infinite"])
def test_gradients_that_are_missing_or_not_finite(fresh, fault):
    parameter = next(iter(fresh.loaded.model.parameters()))
    if fault == "frozen":
        parameter.requires_grad_(False)
    else:
        parameter.register_hook(lambda gradient: gradient * float("inf"))
    (result,) = run_checks(fresh, (training.gradients,))
    assert result.outcome == "failed"
    assert "embed_tokens" in " ".join(result.figures["without" if fault == "frozen" else "infinite"])


def test_a_rate_that_teaches_nothing(fresh):
    (result,) = run_checks(replace(fresh, lr=1e-7), (training.overfit,))
    assert result.outcome == "failed" and len(result.figures["curve"]) == training.OVERFIT_PATIENCE + 1


def test_noise_between_passes_is_not_the_end_of_learning():
    """Perplexities of the last passes of a sound run in AVX2; it was given up before it came to 1.5."""
    late = [
        *(1.84, 1.837, 1.865, 1.906, 1.804, 1.835, 1.825, 1.812, 1.762, 1.79, 1.794, 1.719, 1.713, 1.679, 1.726, 1.615),
        *(1.597, 1.617, 1.639, 1.66, 1.628, 1.725, 1.572, 1.584, 1.512, 1.553, 1.545, 1.626, 1.577, 1.574, 1.597),
        *(1.535, 1.534, 1.541, 1.68, 1.634, 1.577, 1.515, 1.539, 1.529),
    ]
    losses = [math.log(perplexity) for perplexity in late]
    assert not training._has_stopped(losses)
    assert training._has_stopped([*losses, *losses[-training.OVERFIT_PATIENCE :] * 2])  # and that is one
    assert training._has_stopped([5.5] * (training.OVERFIT_PATIENCE + 1)) and training._has_stopped([math.nan])


def test_weights_that_do_not_move(fresh, monkeypatch):
    monkeypatch.setattr(loop, "step_unless", lambda skip, optimizer: None)
    assert failed(run_checks(fresh, (training.overfit,))) == ["overfit"]


def test_a_checkpoint_that_forgets_the_moments(fresh, monkeypatch):
    real = checkpoint_module.load_checkpoint

    def forgetful(path, state):
        real(path, state)
        state.optimizer.state.clear()

    assert failed(run_checks(fresh, (training.resume,))) == []
    monkeypatch.setattr(training, "load_checkpoint", forgetful)
    assert failed(run_checks(fresh, (training.resume,))) == ["resume"]


def test_half_precision_that_drifts(fresh, monkeypatch):
    half = fresh.in_dtype(torch.bfloat16)
    assert failed(run_checks(half, (model.precision,))) == []
    real = model.score_documents

    def drifting(scorer, documents):
        shift = 0.02 * documents.num_tokens if scorer.dtype == torch.bfloat16 else 0.0
        return DocumentScores(real(scorer, documents).nll + shift)

    monkeypatch.setattr(model, "score_documents", drifting)
    assert failed(run_checks(replace(half), (model.precision,))) == ["precision"]


def test_fp16_that_would_overflow(fresh, monkeypatch):
    no_nll = lambda scorer, documents: DocumentScores(np.zeros(len(documents.ids)))  # noqa: E731
    monkeypatch.setattr(model, "score_documents", no_nll)
    half = fresh.in_dtype(torch.float16)
    assert failed(run_checks(half, (model.precision,))) == []
    with torch.no_grad():
        fresh.loaded.model.model.layers[0].mlp.down_proj.weight.mul_(1e8)
    assert failed(run_checks(half, (model.precision,))) == ["precision"]


def test_too_little_memory_or_disk(fresh, monkeypatch):
    assert failed(run_checks(fresh, (machine.memory_and_disk,))) == []
    with monkeypatch.context() as patch:
        patch.setattr(machine, "available_memory_bytes", lambda device: 1 << 20)
        assert failed(run_checks(fresh, (machine.memory_and_disk,))) == ["memory and disk"]
        assert failed(run_checks(replace(fresh, planned_bytes=None), (machine.memory_and_disk,))) == []
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 10}))
    assert failed(run_checks(fresh, (machine.memory_and_disk,))) == ["memory and disk"]


def test_a_check_that_breaks_has_failed(fresh, monkeypatch):
    monkeypatch.setattr(model, "token_logits", lambda *arguments: 1 / 0)
    results = run_checks(fresh, CHEAP_CHECKS)
    assert failed(results) == ["causality", "isolation"]
    assert "ZeroDivisionError" in next(r.measured for r in results if r.name == "causality")


def test_a_sample_without_text(fresh):
    empty = replace(fresh, held_out=[Document("", "a", "a", "a"), Document("x", "b", "b", "b")])
    results = run_checks(empty, (model.causality, model.isolation))
    assert [result.outcome for result in results] == ["not applicable", "not applicable"]


@pytest.mark.parametrize("config", [CheckConfig(model="m"), TrainConfig(model="m", store="s", output="o", lora=16)])
def test_the_rate_is_that_of_the_training_to_come(config):
    size = StateSize.planned(model_config("random:smollm2-135m"))
    scorer = SimpleNamespace(
        loaded=SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu"))), tokenizer=None, protocol=None
    )
    plan = SimpleNamespace(size=size, micro_batch_size=1, memory_bytes=0)
    subject = check._subject(config, scorer, None, (None, None), plan)
    small_step, of_adapter = 1024, isinstance(config, TrainConfig)
    assert subject.lr == resolve_lr("auto", size.num_parameters, small_step, of_adapter=of_adapter)
    assert subject.lr != resolve_lr("auto", size.num_parameters)
    assert subject.optimizer == size.optimizer
