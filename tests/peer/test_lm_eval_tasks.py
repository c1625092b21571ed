"""A downstream task through the harness gives what our own scores of the same pairs give."""

from __future__ import annotations

import pytest
import torch

from cartilha.config import EvaluateConfig
from cartilha.corpus.document import Document
from cartilha.errors import UserError
from cartilha.evaluation import downstream
from cartilha.evaluation.documents import encode_documents
from cartilha.evaluation.downstream import check_tasks, datasets_of, expand, run_tasks, task_questions
from cartilha.evaluation.nll import score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.evaluation.windows import Protocol
from cartilha.languages import find_language, language_codes
from cartilha.model.attention import ATTENTION_NAME
from cartilha.model.load import load_model
from cartilha.pipeline.preflight import preflight
from cartilha.tokens.tokenizer import load_tokenizer
from pairs_task import write_pairs_task

pytest.importorskip("lm_eval", reason="needs lm-eval (extra `eval`)")

PAIRS = [
    ("As meninas correm na praça.", "As meninas corre na praça."),
    ("O menino leu o livro.", "O menino leram o livro."),
    ("Nós fomos à feira cedo.", "Nós foi à feira cedo."),
    ("A casa amarela é antiga.", "A casa amarelo é antiga."),
    ("Os barcos voltaram ao porto.", "Os barco voltaram ao porto."),
    ("Eu gosto de pão quente.", "Eu gostamos de pão quente."),
    ("Minha avó faz doce de figo.", "Minha avó fazem doce de figo."),
]


@pytest.fixture()
def task(tmp_path):
    return write_pairs_task(tmp_path, "concordancia", PAIRS)


def test_accuracy_is_that_of_our_own_scores(task, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = load_tokenizer("random:tiny")
    loaded = load_model("random:tiny", torch.device("cpu"), tokenizer=tokenizer, seed=3)
    with torch.no_grad():  # sharper than fresh weights, so that no pair is a tie
        for parameter in loaded.model.parameters():
            parameter.mul_(3)
    protocol = Protocol("full", 256, 256, tokenizer.prefix_id, "float32")
    documents = [Document(text, str(i), "pairs", "pairs") for pair in PAIRS for i, text in enumerate(pair)]
    scores = score_documents(Scorer(loaded, tokenizer, protocol), encode_documents(documents, tokenizer))
    nll = scores.nll.reshape(-1, 2)
    expected = float((nll[:, 0] < nll[:, 1]).mean())
    assert 0 < expected < 1, "a share that both a right and a wrong answer enter"

    check_tasks([str(task)])
    results = run_tasks(loaded, tokenizer, [str(task)])

    (score,) = results or ()
    assert (score.task, score.metric, score.num_questions) == ("concordancia", "acc", len(PAIRS))
    assert score.value == pytest.approx(expected)
    assert score.values is not None and score.values.tolist() == (nll[:, 0] < nll[:, 1]).tolist()
    assert loaded.model.config._attn_implementation == ATTENTION_NAME, "our attention is back"
    said = capfd.readouterr().err
    assert [text for text in ("Tokenizing inputs", "Running", "fatal", "`pretrained`") if text in said] == []


def test_a_task_file_that_is_not_there():
    with pytest.raises(UserError, match=r"no task file nada\.yaml"):
        preflight(EvaluateConfig(model=("random:tiny",), input=("primer",), tasks=("nada.yaml",)))


def test_a_language_stands_for_tasks_that_the_harness_has():
    assert expand(["pt", "xwinograd_pt", "hellaswag"]) == [*find_language("pt").tasks, "hellaswag"]
    assert expand(["es"]) == ["es"]  # no list of tasks yet: the harness is asked, and has no such task
    assert datasets_of(["xwinograd_pt", "global_mmlu_pt"]) == ["Muennighoff/xwinograd", "CohereForAI/Global-MMLU-Lite"]
    check_tasks(list(filter(lambda code: find_language(code).tasks, language_codes())))


def test_the_questions_of_a_language_are_those_of_its_tasks(monkeypatch):
    asked = []
    monkeypatch.setattr(downstream, "_load_tasks", lambda tasks: asked.extend(tasks) or {})
    assert list(task_questions(["gl"])) == [] and asked == list(find_language("gl").tasks)
