"""`prepare --decontaminate`: what holds a benchmark's questions is left out, counted, recorded and listed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cartilha.config import EvaluateConfig, PrepareConfig
from cartilha.corpus.primer import primer_texts
from cartilha.corpus.questions import Question
from cartilha.errors import UserError, install_command
from cartilha.evaluation import questions as questions_module
from cartilha.pipeline import prepare as module
from cartilha.pipeline.held_out import held_out
from cartilha.pipeline.prepare import prepare
from cartilha.preparation import decontamination, shard_work
from cartilha.terminal.measures import _task_questions
from cartilha.terminal.results import DISPLAYS
from cartilha.tokens.store import TokenStore

PRIMER = [text.text.replace("\n", " ") for text in primer_texts()]
HELD = [3, 40, 90]  # documents of which a question is asked
QUESTIONS = [" ".join(PRIMER[number].split()[5:25]) for number in HELD]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """The primer in several shards, and a benchmark that asks three of its texts, two other things and too little."""
    monkeypatch.setattr(module, "SHARD_BYTES", 15_000)
    monkeypatch.chdir(tmp_path)
    Path("textos.txt").write_text("\n".join(PRIMER), encoding="utf-8")
    others = [" ".join(f"{sign}{number}" for number in range(15)) for sign in "xy"]
    rows = [{"pergunta": text.upper(), "letra": "A"} for text in [*QUESTIONS, *others, "Quem?"]]
    Path("prova.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return PrepareConfig(
        input="textos.txt",
        model="random:tiny",
        output="store",
        decontaminate="prova.jsonl",
        rejects="fora.jsonl",
        workers=1,
    )


def texts(store: str) -> set[str]:
    opened = TokenStore(store)
    return {text for split in ("train", "validation") for text in opened.texts(split)}


def test_the_questions_are_not_written_over(config):
    before = Path("prova.jsonl").read_bytes()
    with pytest.raises(UserError, match="is a text that is read"):
        prepare(replace(config, rejects="prova.jsonl"))
    assert Path("prova.jsonl").read_bytes() == before


def test_documents_with_questions_are_left_out_counted_and_listed(config, caplog):
    caplog.set_level("INFO", "cartilha")
    result = prepare(config)
    assert texts("store") == set(PRIMER) - {PRIMER[number] for number in HELD}
    assert result.dropped["contaminated:prova.jsonl"] == len(HELD)
    rows = [json.loads(line) for line in Path("fora.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [PRIMER[number] for number in HELD]
    assert [row["questions"] for row in rows] == [[f"prova.jsonl:{number}"] for number in (1, 2, 3)]
    assert all(
        row["span"] in row["text"] and row["span"] in question for row, question in zip(rows, QUESTIONS, strict=True)
    )
    found = TokenStore("store").info["decontamination"]
    assert found["benchmarks"] == [
        {"name": "prova.jsonl", "num_questions": 6, "num_too_short": 1, "num_common_runs": 0, "num_found": 3}
    ]
    assert [row["id"] for row in found["documents"]] == [f"textos.txt:{number + 1}" for number in HELD]
    assert "1 question has no text of 8 words" in caplog.text
    shown = [part for part in DISPLAYS["prepare"](result.to_dict()) if isinstance(part, str)]
    assert "In the text, and left out of it: 3 of 6 questions of prova.jsonl (50.0%)" in shown
    assert "3 contaminated:prova.jsonl" in shown[0]
    ready = prepare(config)
    assert ready.was_ready and ready.decontamination == result.decontamination == found


def test_the_same_store_whoever_does_the_work(config, monkeypatch):
    def contents(store: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(store).glob("*.*") if path.name != ".verified.json"}

    prepare(config)
    rejects = Path("fora.jsonl").read_bytes()
    monkeypatch.setattr(module, "SHARD_BYTES", 1 << 20)
    prepare(replace(config, output="one-shard"))
    assert Path("fora.jsonl").read_bytes() == rejects
    monkeypatch.setattr(module, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(module, "INLINE_BYTES", 0)
    prepare(replace(config, output="processes", workers=2))
    assert contents("one-shard") == contents("processes") == contents("store")


def test_what_is_listed_is_bounded(config, monkeypatch):
    for listing in (shard_work, decontamination):
        monkeypatch.setattr(listing, "LISTED_CONTAMINATED", 2)
    monkeypatch.setattr(module, "SHARD_BYTES", 1 << 20)
    result = prepare(config)
    assert result.decontamination is not None
    assert len(result.decontamination["documents"]) == 2 and result.decontamination["benchmarks"][0]["num_found"] == 3


def test_a_store_made_with_other_questions_is_another(config):
    prepare(config)
    with pytest.raises(UserError, match="another decontaminate"):
        prepare(replace(config, decontaminate=(), rejects=None))
    Path("prova.jsonl").write_text(json.dumps({"pergunta": QUESTIONS[0]}), encoding="utf-8")
    with pytest.raises(UserError, match="another text of --decontaminate"):
        prepare(config)
    assert prepare(replace(config, overwrite=True)).dropped["contaminated:prova.jsonl"] == 1


def test_cleaning_comes_first_and_what_is_left_of_nothing_is_named(config):
    pytest.importorskip("ftfy", reason="the extra `text` is not installed")
    bad = [text.encode("utf-8").decode("latin-1") for text in PRIMER]
    Path("textos.txt").write_text("\n".join(bad), encoding="utf-8")
    assert prepare(replace(config, clean=("mojibake",))).dropped["contaminated:prova.jsonl"] == len(HELD)
    Path("textos.txt").write_text("\n".join(PRIMER[number] for number in HELD), encoding="utf-8")
    with pytest.raises(UserError, match=r"3 contaminated:prova\.jsonl.*others with --decontaminate"):
        prepare(replace(config, output="nothing"))


def test_mistakes_are_named(config, refused, monkeypatch):
    options = ["prepare", "--input", "textos.txt", "--model", "random:tiny", "--output", "store"]
    assert "which is also a text of --input" in refused(*options, "--decontaminate", "./textos.txt")
    assert "There is no file 'prova.json'" in refused(*options, "--decontaminate", "prova.json")
    assert "no task file nada.yaml" in refused(*options, "--decontaminate", "nada.yaml")
    Path("curto.txt").write_text("Quem?\nQuando?\n", encoding="utf-8")
    assert "--decontaminate names no text of 8 words" in refused(*options, "--decontaminate", "curto.txt")
    Path("quebrado.jsonl").write_text('{"pergunta": "Quem', encoding="utf-8")
    assert "quebrado.jsonl, line 1: not valid JSON" in refused(*options, "--decontaminate", "quebrado.jsonl")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    sentence = refused(*options, "--decontaminate", "lambada_openai")
    assert "'lambada_openai'" in sentence and install_command("eval") in sentence


def test_the_questions_of_a_task_of_the_harness(config, tmp_path, monkeypatch, refused):
    pytest.importorskip("lm_eval", reason="needs lm-eval (extra `eval`)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("perguntas.jsonl").write_text(
        "\n".join(json.dumps({"contexto": text, "opções": ["sim", "não"]}) for text in QUESTIONS), encoding="utf-8"
    )
    Path("leitura.yaml").write_text(
        f"""task: leitura
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "perguntas.jsonl"}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Leia: {{{{contexto}}}} Responda:"
doc_to_target: 0
doc_to_choice: "opções"
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    result = prepare(replace(config, decontaminate=("leitura.yaml",), rejects=None))
    assert result.dropped["contaminated:leitura"] == len(HELD) and result.decontamination is not None
    assert result.decontamination["tasks"] == ["leitura.yaml"]
    assert [row["questions"] for row in result.decontamination["documents"]] == [
        ["leitura:1"],
        ["leitura:2"],
        ["leitura:3"],
    ]
    Path("leitura.yaml").write_text("task: leitura\ndataset_path: nada/nada\ntest_split: test\n", encoding="utf-8")
    options = ["prepare", "--input", "textos.txt", "--model", "random:tiny", "--output", "other"]
    assert "could not run leitura.yaml" in refused(*options, "--decontaminate", "leitura.yaml")


def test_ray_finds_the_same(config):
    pytest.importorskip("ray", reason="needs the extra scale")
    here, there = prepare(config), prepare(replace(config, output="ray", executor="ray", workers=2))
    assert there.decontamination == here.decontamination and texts("ray") == texts("store")


def test_evaluation_says_how_many_questions_are_in_the_training_text(config, monkeypatch):
    prepare(replace(config, decontaminate=(), rejects=None, validation_first=1))
    questions = [Question("prova", str(i), (text,)) for i, text in enumerate([*QUESTIONS, " ".join("abcdefghijklmn")])]
    text = held_out(EvaluateConfig(store="store"))
    found = text.questions_in_training(questions)
    assert found == {
        "benchmarks": [{"name": "prova", "num_questions": 4, "num_too_short": 0, "num_common_runs": 0, "num_found": 3}],
        "num_searched": len(PRIMER) - 1,
        "num_documents": len(PRIMER) - 1,
    }
    shown = [*_task_questions(found)]
    assert shown == ["prova: 3 of 4 questions (75.0%) are in the store's training side"]
    monkeypatch.setattr(questions_module, "SEARCH_SECONDS", 0)
    monkeypatch.setattr(questions_module, "SEARCHED_CHARS", 1)
    cut = text.questions_in_training(questions)
    assert cut is not None and cut["num_searched"] < len(PRIMER) - 1
    assert "(in its first " in next(_task_questions(cut))
    assert held_out(EvaluateConfig(input="textos.txt")).questions_in_training(questions) is None
