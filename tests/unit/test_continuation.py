"""Continuations: what is chosen, what can never be, and prompts whose last space is healed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from cartilha.blocks.packing import Batch
from cartilha.config import GenerateConfig
from cartilha.errors import UserError
from cartilha.evaluation import continuation as continuation_module
from cartilha.evaluation.continuation import Continuation, continue_prompts, describe_mode
from cartilha.model.attention import ATTENTION_NAME
from cartilha.model.forward import batch_nll
from cartilha.model.head import head_of
from cartilha.model.load import LoadedModel, load_model, prepare_model
from cartilha.reporting.wording import Wording
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer

CPU = torch.device("cpu")
BYTES = load_tokenizer("random:tiny")
PREFIX, END, PAD = 256, 257, 258
SPACE = ord(" ")


def word_tokenizer() -> TextTokenizer:
    """The byte tokenizer with some words, of which some begin with a space, as real tokenizers have them."""
    merges = [("i", "r"), ("Ġ", "ir"), ("m", "Ã"), ("mÃ", "£"), ("Ġir", "mÃ£")]
    vocabulary = {token: i for token, i in BYTES.backend.get_vocab().items() if i < 256}
    for number, (left, right) in enumerate(merges):
        vocabulary[left + right] = 259 + number
    backend = Tokenizer.from_str(BYTES.backend.to_str())
    backend.model = models.BPE(vocab=vocabulary, merges=merges)
    backend.encode_special_tokens = True
    return replace(BYTES, backend=backend)


WORDS = word_tokenizer()
IRMA = WORDS.backend.token_to_id("ĠirmÃ£")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """A model that chooses by its context: its likeliest tokens differ from place to place."""
    found = load_model("random:tiny", CPU, tokenizer=BYTES)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return found


def stubborn_model(logits: Iterable[tuple[int, float]], num_rows: int = 280) -> LoadedModel:
    """A model that gives these logits everywhere, and 0 to every other id: its last norm ends in a constant."""
    config = LlamaConfig(
        vocab_size=num_rows,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            for parameter in layer.parameters():
                parameter.zero_()
        model.model.norm.weight.zero_()[0] = 1.0
        model.lm_head.weight.zero_()
        for token, logit in logits:
            model.lm_head.weight[token, 0] = logit
    return prepare_model(model, "stubborn", CPU)


def write(loaded: LoadedModel, prompt: str, tokenizer: TextTokenizer = BYTES, **settings) -> Continuation:
    [found] = continue_prompts(loaded, tokenizer, GenerateConfig(prompt=(prompt,), **{"max_new_tokens": 8, **settings}))
    assert found.prompt == prompt and found.text.startswith(prompt)
    return found


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The new ids of each continuation, as `generate` returned them."""
    seen: list[list[int]] = []
    generate = LlamaForCausalLM.generate

    def spy(self, inputs, **settings):
        output = generate(self, inputs, **settings)
        seen.append(output[0, inputs.shape[1] :].tolist())
        return output

    monkeypatch.setattr(LlamaForCausalLM, "generate", spy)
    return seen


@torch.no_grad()
def log_probs(loaded: LoadedModel, rows: torch.Tensor) -> torch.Tensor:
    """Log probabilities of the token after each row, by transformers' own attention."""
    model = copy.deepcopy(loaded.model)
    model.set_attn_implementation("eager")
    return model(input_ids=rows, use_cache=False).logits[:, -1].double().log_softmax(-1)


# Greedy and sampled


def test_greedy_takes_the_likeliest_token_each_time(loaded, generated):
    found = write(loaded, "Era uma vez")
    ids = [PREFIX, *b"Era uma vez"]
    for _ in range(8):
        ids.append(int(log_probs(loaded, torch.tensor([ids])).argmax()))
    assert generated == [ids[-8:]]
    assert len(set(ids[-8:])) > 2, "a model that repeats one token would prove little"
    assert found.num_new_tokens == 8 and found.mode == "greedy"
    assert found.text == "Era uma vez" + BYTES.decode(ids[12:])


def test_greedy_is_deterministic_and_needs_no_seed(loaded):
    assert write(loaded, "Era uma vez", seed=1) == write(loaded, "Era uma vez", seed=2)


def test_sampling_follows_its_seed(loaded):
    one, same, other = (write(loaded, "Era", do_sample=True, seed=seed, top_k=200).text for seed in (1, 1, 2))
    assert one == same != other
    assert one != write(loaded, "Era").text


def test_sampling_at_top_k_1_is_greedy(loaded):
    sampled = write(loaded, "Era", do_sample=True, top_k=1)
    assert sampled.text == write(loaded, "Era").text
    assert sampled.mode == "sampled (temperature 0.8, top_k 1, top_p 0.95)"


def test_top_k_and_temperature_are_honoured(generated):
    model = stubborn_model([(ord("a"), 5.0), (ord("b"), 5.0), (ord("c"), 4.9)])
    write(model, "x", do_sample=True, top_k=2, top_p=1.0, max_new_tokens=60)
    assert set(generated[-1]) == {ord("a"), ord("b")}
    write(model, "x", do_sample=True, top_k=3, top_p=1.0, max_new_tokens=60)
    assert set(generated[-1]) == {ord("a"), ord("b"), ord("c")}
    write(model, "x", do_sample=True, top_k=3, top_p=1.0, max_new_tokens=60, temperature=0.001)
    assert ord("c") not in generated[-1]


def test_a_repetition_penalty_changes_what_is_repeated(generated):
    model = stubborn_model([(ord("a"), 5.0), (ord("b"), 4.0)])
    write(model, "x")
    write(model, "x", repetition_penalty=2.0)
    assert generated[0] == [ord("a")] * 8 and generated[1][:2] == [ord("a"), ord("b")]


# Beams


def test_beams_find_the_likeliest_sequence(loaded, generated):
    found = write(loaded, "ab", num_beams=259, max_new_tokens=2)
    first = log_probs(loaded, torch.tensor([[PREFIX, *b"ab"]]))[0]
    second = log_probs(loaded, torch.tensor([[PREFIX, *b"ab", token] for token in range(259)]))
    pairs = (first[:, None] + second) / 2
    pairs[END] = -torch.inf
    best = divmod(int(pairs.argmax()), 259)
    assert first[END] < pairs.max(), "an end at once would be the best"
    assert generated == [list(best)]
    greedy = int(first.argmax()), int(second[first.argmax()].argmax())
    assert best != greedy, "greedy would have found it"
    assert found.mode == "beam search (259)"


def test_beams_are_deterministic(loaded):
    assert write(loaded, "Era", num_beams=3, seed=1) == write(loaded, "Era", num_beams=3, seed=2)


# What is never written


def test_rows_without_a_token_are_never_written(generated):
    unused = [(row, 9.0) for row in range(264, 280)]
    model = stubborn_model([*unused, (ord("a"), 5.0)])
    assert int(log_probs(model, torch.tensor([[PREFIX]])).argmax()) >= 264
    for settings in ({}, {"num_beams": 3}, {"do_sample": True}):
        write(model, "x", WORDS, **settings)
        assert generated[-1] and max(generated[-1]) < 264


def test_the_end_ends_the_text(loaded):
    model = stubborn_model([(END, 9.0)])
    for settings in ({}, {"num_beams": 3}):
        found = write(model, "Fim", **settings)
        assert found.text == "Fim" and found.num_new_tokens == 0


def test_a_prompt_with_special_tokens_written_out_is_text(loaded, monkeypatch):
    given: list[list[int]] = []
    generate = LlamaForCausalLM.generate
    monkeypatch.setattr(
        LlamaForCausalLM,
        "generate",
        lambda self, inputs, **settings: given.append(inputs[0].tolist()) or generate(self, inputs, **settings),
    )
    write(loaded, "</s>")
    assert given == [[PREFIX, *b"</s>"]]


def test_half_a_character_does_not_spoil_the_text():
    found = write(stubborn_model([(0xC3, 9.0)]), "São", max_new_tokens=1)
    assert found.text == "São\ufffd"


# Healing


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}])
def test_a_trailing_space_is_healed_by_a_word_that_begins_with_it(settings, generated):
    # Without its space "irmã" is likelier; after "fazenda " as it stands it would even be right.
    model = stubborn_model([(WORDS.backend.token_to_id("ir"), 9.0), (IRMA, 5.0)])
    assert write(model, "fazenda", WORDS, max_new_tokens=1, **settings).text == "fazendair"
    found = write(model, "fazenda ", WORDS, max_new_tokens=1, **settings)
    assert generated[-1] == [IRMA]
    assert found.text == "fazenda irmã" and found.num_new_tokens == 1


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}])
def test_only_the_first_new_token_must_begin_with_a_space(settings, generated):
    model = stubborn_model([(ord("a"), 9.0), (IRMA, 5.0)])
    assert write(model, "fazenda ", WORDS, **settings).text == "fazenda irmã" + "a" * 7
    assert generated[-1] == [IRMA] + [ord("a")] * 7


def test_a_space_of_its_own_is_healed_without_doubling(loaded, generated):
    found = write(loaded, "fazenda ", max_new_tokens=4)
    assert generated[-1][0] == SPACE
    assert found.text == "fazenda" + BYTES.decode(generated[-1])
    healed = stubborn_model([(ord("z"), 9.0), (SPACE, 5.0)])
    assert write(healed, "fazenda ", max_new_tokens=3).text == "fazenda zz"


def test_the_model_sees_the_prompt_without_its_space(loaded):
    # What follows is what follows the space that the model itself wrote.
    healed, plain = write(loaded, "fazenda ", max_new_tokens=6).text, write(loaded, "fazenda", max_new_tokens=5).text
    ids = [PREFIX, *b"fazenda "]
    for _ in range(5):
        ids.append(int(log_probs(loaded, torch.tensor([ids])).argmax()))
    assert healed == "fazenda " + BYTES.decode(ids[9:]) != plain


@pytest.mark.parametrize("prompt", ["fazenda  ", " ", "   ", "linha\n ", "a\u00a0 "])
def test_any_number_of_trailing_spaces_stays_in_the_text(prompt, generated):
    model = stubborn_model([(ord("z"), 9.0), (SPACE, 5.0)])
    assert write(model, prompt, max_new_tokens=3).text == prompt + "zz"
    assert generated[-1] == [SPACE, ord("z"), ord("z")]


@pytest.mark.parametrize("prompt", ["fazenda", "fazenda\n", "fazenda\t", "fazenda\u00a0", ""])
def test_prompts_without_a_trailing_space_are_left_alone(prompt, generated):
    model = stubborn_model([(ord("z"), 9.0), (SPACE, 5.0)])
    assert write(model, prompt, max_new_tokens=2).text == prompt + "zz"
    assert generated[-1] == [ord("z")] * 2


# Limits and refusals


def test_what_does_not_fit_the_context_is_refused():
    model = stubborn_model([(ord("a"), 9.0)])
    assert model.context_length == 128
    assert write(model, "x" * 117, max_new_tokens=10).num_new_tokens == 10  # with the prefix, just the context
    with pytest.raises(UserError, match=r"119 tokens and 10 new .* 128; shorten the prompt") as caught:
        write(model, "x" * 118, max_new_tokens=10)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "num_beams": 2},
        {"max_new_tokens": 0},
        {"num_beams": 0},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "top_p": 0.0},
        {"do_sample": True, "top_p": 1.1},
        {"do_sample": True, "top_k": 0},
    ],
)
def test_contradictory_choices_are_refused(loaded, settings):
    with pytest.raises(UserError):
        write(loaded, "Era", **settings)


def test_the_models_attention_is_the_documents_again_afterwards(loaded, monkeypatch):
    during: list[str] = []
    inner = continuation_module._continue
    monkeypatch.setattr(
        continuation_module,
        "_continue",
        lambda loaded, *rest: during.append(loaded.model.config._attn_implementation) or inner(loaded, *rest),
    )
    write(loaded, "Era")
    assert during == ["sdpa"]
    assert loaded.model.config._attn_implementation == ATTENTION_NAME
    with pytest.raises(UserError, match="context"):
        write(loaded, "x" * 2000)
    assert loaded.model.config._attn_implementation == ATTENTION_NAME
    assert not loaded.model.training


def test_a_model_that_has_written_can_be_trained(loaded):
    before = head_of(loaded.model).weight.clone()
    write(loaded, "Era")
    assert torch.equal(head_of(loaded.model).weight, before)
    # No inference tensor stays behind in the model, on which the backward pass would fail.
    ids = np.array([[PREFIX, *b"Era uma vez", END]])
    row = Batch(ids[:, :-1], ids[:, 1:], np.arange(12)[None], np.array([12]))
    batch_nll(loaded.model, row, torch.float32).backward()
    assert all(parameter.grad is not None for parameter in loaded.model.parameters())
    loaded.model.zero_grad(set_to_none=True)


def test_each_prompt_is_continued_as_if_it_were_alone(loaded):
    prompts = ("Era uma vez", "O rato ", "x")
    together = continue_prompts(loaded, BYTES, GenerateConfig(prompt=prompts, max_new_tokens=5))
    assert together == [write(loaded, prompt, max_new_tokens=5) for prompt in prompts]
    assert len({found.text for found in together}) == 3


def test_modes_are_told_apart():
    settings = [GenerateConfig(), GenerateConfig(num_beams=4), GenerateConfig(do_sample=True)]
    modes = [describe_mode(config) for config in settings]
    assert modes[:2] == ["greedy", "beam search (4)"] and "temperature 0.8" in modes[2]
    assert all(one != other for one, other in itertools.combinations(modes, 2))
    portuguese = Wording("pt")
    assert [portuguese.mode(mode) for mode in modes] == [
        "guloso",
        "busca em feixe (4)",
        "sorteado (temperatura 0,8, top-k 50, top-p 0,95)",
    ]
    assert portuguese.mode("of another tool") == "of another tool"
