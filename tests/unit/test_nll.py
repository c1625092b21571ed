"""Nll of documents: packed windows give what one window at a time gives, whatever the lengths, order and batch size."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cartilha.blocks.packing import IGNORE_INDEX, Batch
from cartilha.corpus.document import Document
from cartilha.errors import UserError
from cartilha.evaluation import nll as nll_module
from cartilha.evaluation.documents import ScoredDocuments, encode_documents
from cartilha.evaluation.measures import make_evaluation
from cartilha.evaluation.nll import score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.evaluation.windows import Protocol
from cartilha.model.head import head_of
from cartilha.model.load import LoadedModel, load_model
from cartilha.model.loss import TokenScores
from cartilha.tokens.tokenizer import load_tokenizer

CPU = torch.device("cpu")
TOKENIZER = load_tokenizer("random:tiny")
PREFIX, END, PAD = 256, 257, 258
L = 16
PROTOCOL = Protocol("full", L, L // 2, PREFIX, "float32")


@pytest.fixture(scope="module", params=["random:tiny", "random:tiny-opt"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    found = load_model(request.param, CPU, tokenizer=TOKENIZER)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return found


def document_nll(
    loaded: LoadedModel, documents: ScoredDocuments, protocol: Protocol = PROTOCOL, **options: Any
) -> np.ndarray:
    return score_documents(Scorer(loaded, TOKENIZER, protocol), documents, **options).nll


def documents_of(ids: list[np.ndarray]) -> ScoredDocuments:
    ones = np.ones(len(ids), np.int64)
    names = [f"documento-{i}" for i in range(len(ids))]
    lengths = np.array([len(own) for own in ids])
    return ScoredDocuments(ids, lengths, ones, ones, ones, ones.astype(bool), names, names, names)


def random_documents(*lengths: int) -> list[np.ndarray]:
    """Any id may occur in a text, the special ones too: nothing may be held apart by its id."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 259, length).astype(np.uint32) for length in lengths]
    for document in ids:
        document[-1:] = generator.choice([END, PAD, PREFIX])
    return ids


@torch.no_grad()
def naive_nll(loaded: LoadedModel, ids: np.ndarray, protocol: Protocol) -> float:
    """One token at a time: transformers' own attention over just the inputs that its window has, summed in float64."""
    model = copy.deepcopy(loaded.model)
    model.set_attn_implementation("eager")
    stream = torch.tensor([protocol.prefix_id, *ids.tolist()])
    total, done = 0.0, 0
    while done < len(ids):
        past = min(len(ids), protocol.window if done == 0 else done + protocol.stride)
        first = max(0, past - protocol.window)
        log_probs = model(input_ids=stream[None, first:past], use_cache=False).logits[0].double().log_softmax(-1)
        for token in range(done, past):
            total -= log_probs[token - first, stream[token + 1]].item()
        done = past
    return total


LENGTHS = [0, 1, L - 1, L, L + 1, 10 * L, 2, 3 * L + 5, 1, 5]


@pytest.mark.parametrize("stride", [1, L // 2, L])
def test_equals_one_document_at_a_time(loaded, stride):
    protocol = Protocol("full", L, stride, PREFIX, "float32")
    documents = documents_of(random_documents(*LENGTHS))
    expected = [naive_nll(loaded, ids, protocol) for ids in documents.ids]
    found = document_nll(loaded, documents, protocol)
    assert found.dtype == np.float64 and found[0] == 0
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)
    # Far from what no model at all would give: the comparison sees the context.
    assert abs(found.sum() / sum(LENGTHS) - math.log(259)) > 0.1


def test_the_stride_matters_for_long_documents_only(loaded):
    documents = documents_of(random_documents(*LENGTHS))
    short, long = (document_nll(loaded, documents, replace(PROTOCOL, stride=stride)) for stride in (1, L))
    is_long = np.array(LENGTHS) > L
    np.testing.assert_allclose(short[~is_long], long[~is_long], rtol=1e-6)
    # A document of L + 1 has one later window of one token under any stride.
    is_long[LENGTHS.index(L + 1)] = False
    assert (np.abs(short - long)[is_long] > 1e-3).all()


@pytest.mark.parametrize("tokens_per_forward", [1, L, 3 * L + 1, 100_000])
def test_neither_order_nor_batch_size_matters(loaded, tokens_per_forward, monkeypatch):
    ids = random_documents(*LENGTHS)
    expected = document_nll(loaded, documents_of(ids))
    monkeypatch.setitem(nll_module.TOKENS_PER_FORWARD, "cpu", tokens_per_forward)
    shapes = spy_on_batches(monkeypatch)
    order = np.random.default_rng(tokens_per_forward).permutation(len(ids))
    found = document_nll(loaded, documents_of([ids[i] for i in order]))
    np.testing.assert_allclose(found, expected[order], rtol=1e-6, atol=0)
    assert all(rows * length <= max(tokens_per_forward, length) for rows, length in shapes)
    assert (len(shapes) == 1) == (tokens_per_forward == 100_000)


def spy_on_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the batches that the model is given."""
    shapes: list[tuple[int, int]] = []
    scored_tokens = nll_module.scored_tokens

    def spy(model: torch.nn.Module, batch: Batch, dtype: torch.dtype, **options: object) -> TokenScores:
        shapes.append(batch.input_ids.shape)
        assert batch.segment_lengths.sum() == batch.input_ids.size
        return scored_tokens(model, batch, dtype, **options)

    monkeypatch.setattr(nll_module, "scored_tokens", spy)
    return shapes


def test_short_documents_share_rows_and_padding_is_not_scored(loaded, monkeypatch):
    batches: list[Batch] = []
    scored_tokens = nll_module.scored_tokens
    monkeypatch.setattr(
        nll_module,
        "scored_tokens",
        lambda model, batch, dtype, **o: batches.append(batch) or scored_tokens(model, batch, dtype, **o),
    )
    lengths = [L, 3, 4, 5, 2, 1, 7]
    document_nll(loaded, documents_of(random_documents(*lengths)))
    assert sum(batch.num_targets for batch in batches) == sum(lengths)
    assert sum(batch.input_ids.size for batch in batches) < 1.3 * sum(lengths) < len(lengths) * L
    assert any((batch.targets == IGNORE_INDEX).any() for batch in batches), "no padding to be left out"


def test_documents_do_not_influence_each_other(loaded):
    ids = random_documents(5, 7, 3)
    before = document_nll(loaded, documents_of(ids))
    ids[1] = (ids[1] + 1) % 256
    after = document_nll(loaded, documents_of(ids))
    np.testing.assert_allclose(after[[0, 2]], before[[0, 2]], rtol=1e-6)
    assert abs(after[1] - before[1]) > 1e-2


def test_the_prefix_is_context_and_never_scored(loaded):
    documents = documents_of(random_documents(5))
    other = Protocol("full", L, L // 2, PAD, "float32")
    found, changed = (document_nll(loaded, documents, p)[0] for p in (PROTOCOL, other))
    assert changed == pytest.approx(naive_nll(loaded, documents.ids[0], other), rel=1e-6)
    assert abs(found - changed) > 1e-3


def test_the_sum_is_float64(loaded, monkeypatch):
    # A float32 sum of these would not notice the small ones.
    def given(model: torch.nn.Module, batch: Batch, dtype: torch.dtype, **options: object) -> TokenScores:
        nll = torch.tensor([2.0**25] + [1.0] * (batch.num_targets - 1))
        return TokenScores(nll, torch.zeros_like(nll))

    monkeypatch.setattr(nll_module, "scored_tokens", given)
    nll = document_nll(loaded, documents_of(random_documents(L)))
    assert nll.tolist() == [2.0**25 + L - 1]
    assert np.float32(2.0**25) + np.float32(1) == np.float32(2.0**25)


def test_progress_is_told_every_token_once(loaded):
    told: list[float] = []
    document_nll(loaded, documents_of(random_documents(*LENGTHS)), advance=told.append)
    assert sum(told) == sum(LENGTHS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("culprit", [0, 2, 4])
def test_a_nll_that_is_not_finite_names_its_document(loaded, bad, culprit, monkeypatch):
    ids = random_documents(3, 2 * L, 4, 1, L)
    ids = [document % 256 for document in ids]
    ids[culprit][-1] = END  # the one token by which the fault is placed
    scored_tokens = nll_module.scored_tokens

    def faulty(model: torch.nn.Module, batch: Batch, dtype: torch.dtype, **options: object) -> TokenScores:
        scores = scored_tokens(model, batch, dtype, **options)
        scores.nll[torch.from_numpy(batch.targets[batch.targets != IGNORE_INDEX]) == END] = bad
        return scores

    monkeypatch.setattr(nll_module, "scored_tokens", faulty)
    with pytest.raises(UserError, match=rf"documento-{culprit}\b"):
        document_nll(loaded, documents_of(ids))


def test_weights_that_are_not_numbers_are_found_out(loaded):
    broken = copy.deepcopy(loaded.model)
    with torch.no_grad():
        head_of(broken).weight[5] = math.nan
    with pytest.raises(UserError, match="documento-0"):
        document_nll(replace(loaded, model=broken), documents_of(random_documents(3)))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_scoring_and_back_afterwards(training):
    loaded = load_model("random:tiny-opt", CPU, tokenizer=TOKENIZER)
    assert loaded.model.config.dropout > 0, "a model without dropout would prove nothing"
    documents = documents_of(random_documents(10))
    expected = document_nll(loaded, documents)
    loaded.model.train(training)
    assert document_nll(loaded, documents) == expected
    assert loaded.model.training == training


def test_no_gradients_are_kept(loaded):
    document_nll(loaded, documents_of(random_documents(10)))
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


TEXTS = ["Era uma vez na fazenda.", "Fim</s> da <s>história</s><pad>", "</s>", "Água mole em pedra dura " * 4]


def scored_texts() -> ScoredDocuments:
    return encode_documents([Document(text, f"t{i}", "here", "test") for i, text in enumerate(TEXTS)], TOKENIZER)


def test_a_uniform_model_scores_the_vocabulary_size():
    loaded = load_model("random:tiny", CPU, tokenizer=TOKENIZER)
    with torch.no_grad():
        head_of(loaded.model).weight.zero_()
    documents = scored_texts()
    scorer = Scorer(loaded, TOKENIZER, PROTOCOL)
    result = make_evaluation(scorer, documents, score_documents(scorer, documents), seconds=1.0)
    assert result.perplexity == pytest.approx(259, rel=1e-5)
    record = result.to_dict()
    assert record["bits_per_byte"] == pytest.approx(math.log2(259), rel=1e-6)  # a token a byte
    assert record["baselines"]["uniform"] == pytest.approx({"perplexity": 259.0, "bits_per_byte": math.log2(259)})
    assert not any("twice the vocabulary" in note for note in record["notes"])


def test_special_tokens_written_out_in_the_text_are_scored_as_text(loaded):
    documents = scored_texts()
    assert [ids.tolist() for ids in documents.ids] == [list(text.encode()) for text in TEXTS]
    nll = document_nll(loaded, documents)
    np.testing.assert_allclose(nll, [naive_nll(loaded, ids, PROTOCOL) for ids in documents.ids], rtol=1e-6)


def test_real_end_and_padding_tokens_in_the_text_count_like_any_other(loaded):
    # As with pad = eos = bos = 2: whatever is told apart by id would lose these tokens.
    ids = [np.array([END, 65, END, END], np.uint32), np.array([PAD] * 5, np.uint32), np.array([PREFIX], np.uint32)]
    for prefix in (PREFIX, END, PAD):
        protocol = Protocol("full", L, L // 2, prefix, "float32")
        nll = document_nll(loaded, documents_of(ids), protocol)
        np.testing.assert_allclose(nll, [naive_nll(loaded, document, protocol) for document in ids], rtol=1e-6)
        assert (nll / [4, 5, 1] > 0.1).all()
