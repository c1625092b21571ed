"""Total nats of real documents, longer than the window, beside those of lm-eval's `loglikelihood_rolling`."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedTokenizerFast

from cartilha.corpus.document import Document
from cartilha.corpus.primer import primer_texts
from cartilha.evaluation import nll as nll_module
from cartilha.evaluation.documents import ScoredDocuments, encode_documents
from cartilha.evaluation.nll import score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.evaluation.windows import Protocol, Window, document_windows
from cartilha.model.load import LoadedModel, load_model, prepare_model
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval as the peer (extra `eval`)"
)

CPU = torch.device("cpu")
NUM_DOCUMENTS = 200


@pytest.fixture(scope="module")
def texts(request: pytest.FixtureRequest) -> list[str]:
    """Paragraphs of a handbook, else those of the primer: neither titles nor pages, to keep this short."""
    try:
        source = (request.getfixturevalue("shared") / "text" / "handbook.txt").read_text(encoding="utf-8")
    except (pytest.skip.Exception, OSError):
        source = "\n".join(text.text for text in primer_texts())
    lines = [line for line in source.split("\n") if 60 <= len(line) <= 250]
    assert len(lines) >= NUM_DOCUMENTS
    return lines[:NUM_DOCUMENTS]


@dataclass(frozen=True)
class Subject:
    """A model, its tokenizer, the documents, and a window that most of them do not fit."""

    loaded: LoadedModel
    tokenizer: TextTokenizer
    texts: list[str]
    documents: ScoredDocuments
    window: int

    def protocol(self, stride: int) -> Protocol:
        return Protocol("full", self.window, stride, self.tokenizer.prefix_id, "float32")

    def ours(self, stride: int) -> np.ndarray:
        """Nats of each document."""
        return score_documents(Scorer(self.loaded, self.tokenizer, self.protocol(stride)), self.documents).nll

    def theirs(self, stride: int) -> np.ndarray:
        """Nats of each document, from lm-eval's own windows and transformers' own attention.

        lm-eval always takes strides of a window; its function for windows takes others.
        """
        from lm_eval.api.instance import Instance
        from lm_eval.models import huggingface

        names = {"bos_token": self.tokenizer.bos_id, "eos_token": self.tokenizer.eos_id}
        special = {name: self.tokenizer.backend.id_to_token(i) for name, i in names.items() if i is not None}
        model = copy.deepcopy(self.loaded.model)
        model.set_attn_implementation("sdpa")
        peer = huggingface.HFLM(
            pretrained=model,
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=self.tokenizer.backend, pad_token="<pad>", **special),
            max_length=self.window,
            add_bos_token=False,
            prefix_token_id=self.tokenizer.prefix_id,
            batch_size=4,
        )
        requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(self.texts)]
        rolling = huggingface.utils.get_rolling_token_windows
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                huggingface.utils,
                "get_rolling_token_windows",
                lambda **settings: rolling(**{**settings, "context_len": self.window - stride + 1}),
            )
            return -np.array(peer.loglikelihood_rolling(requests, disable_tqdm=True))


def shaken(loaded: LoadedModel, noise: float) -> LoadedModel:
    """Fresh weights say nearly the same of every token and context, which would hide every mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return loaded


@pytest.fixture(scope="module", params=["random:tiny", "a small OPT with OPT's tokenizer"])
def subject(request: pytest.FixtureRequest, texts: list[str]) -> Subject:
    if request.param == "random:tiny":
        tokenizer = load_tokenizer("random:tiny")
        loaded, window = load_model("random:tiny", CPU, tokenizer=tokenizer), 64
    else:
        tokenizer = load_tokenizer(str(request.getfixturevalue("opt_tokenizer")))
        config = OPTConfig(
            vocab_size=50272, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        loaded, window = prepare_model(model, "a small OPT", CPU, tokenizer), 24
    documents = encode_documents([Document(text, f"d{i}", "t", "t") for i, text in enumerate(texts)], tokenizer)
    assert len(documents.ids) == NUM_DOCUMENTS
    return Subject(shaken(loaded, 0.2), tokenizer, texts, documents, window)


@pytest.fixture(scope="module")
def rolling(subject: Subject) -> np.ndarray:
    """What lm-eval says of the documents as it always does it: stride = window."""
    return subject.theirs(subject.window)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return abs(found.sum() / expected.sum() - 1)


def test_totals_are_those_of_lm_eval(subject, rolling):
    lengths = subject.documents.num_tokens
    assert (lengths > 2 * subject.window).sum() > NUM_DOCUMENTS / 4 and (lengths <= subject.window).any()
    found = subject.ours(subject.window)
    assert relative_error(found, rolling) <= 1e-5
    np.testing.assert_allclose(found, rolling, rtol=1e-4, atol=0)


def test_totals_are_those_of_lm_evals_windows_at_half_the_stride(subject, rolling):
    stride = subject.window // 2
    found, expected = subject.ours(stride), subject.theirs(stride)
    assert relative_error(found, expected) <= 1e-5
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=0)
    assert relative_error(found, rolling) > 5e-5, "the stride makes no difference here, so nothing is proved"


def one_position_less(*sizes: int) -> Iterator[Window]:
    """Later windows lack the oldest token of their context."""
    for placed in document_windows(*sizes):
        has_room = placed.first_input >= 0 and placed.first_input + 1 < placed.first_target
        yield replace(placed, first_input=placed.first_input + 1) if has_room else placed


def one_window_of_another_size(change: int) -> Callable[..., Iterator[Window]]:
    return lambda num_tokens, window, stride, document: document_windows(
        num_tokens, window + change, stride + change, document
    )


FAULTS = {
    "a window one shorter": one_window_of_another_size(-1),
    "a window one longer": one_window_of_another_size(1),
    "a context one shorter": one_position_less,
}


# Once is enough: these say something of the test, not of a model.
on_tiny = pytest.mark.parametrize("subject", ["random:tiny"], indirect=True)


@on_tiny
@pytest.mark.parametrize("fault", FAULTS)
def test_a_window_that_is_off_by_one_is_seen(subject, rolling, fault, monkeypatch):
    monkeypatch.setattr(nll_module, "document_windows", FAULTS[fault])
    found = subject.ours(subject.window)
    assert len(found) == NUM_DOCUMENTS and np.isfinite(found).all()
    assert relative_error(found, rolling) > 1e-5 or (np.abs(found / rolling - 1) > 1e-4).any()
    if fault != "a context one shorter":  # it differs in the last window of each document alone
        assert relative_error(found, rolling) > 1e-5


@on_tiny
def test_another_prefix_is_seen(subject, rolling):
    other = replace(subject.protocol(subject.window), prefix_id=subject.tokenizer.prefix_id - 1)
    found = score_documents(Scorer(subject.loaded, subject.tokenizer, other), subject.documents).nll
    assert relative_error(found, rolling) > 1e-5
