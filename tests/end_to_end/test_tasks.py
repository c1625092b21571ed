"""`evaluate --tasks`: without a text, and kept in a run's record, report and card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Left

from conftest import Command
from pairs_task import write_pairs_task

pytest.importorskip("lm_eval", reason="needs lm-eval (extra `eval`)")

PAIRS = [("As meninas correm.", "As meninas corre."), ("O menino leu.", "O menino leram."), ("Eu gosto.", "Eu gostam.")]


@pytest.fixture()
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return write_pairs_task(tmp_path, "pares", PAIRS)


def test_scores_are_kept_in_a_runs_record_report_and_card(
    task: Path, unbroken: Left, cartilha: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken.path, run)
    done = cartilha("evaluate", "--tasks", task, "--record", run, "--json")
    assert done.code == 0, done.err
    before, after = json.loads(done.out)["models"]
    assert before["model"] == "random:tiny" and after["model"] == str(run / "model")
    (row,) = json.loads((run / "results.json").read_text(encoding="utf-8"))["tasks"]["scores"]
    assert (row["task"], row["num_questions"]) == ("pares", 3)
    assert [before["tasks"][0]["value"], after["tasks"][0]["value"]] == [row["before"], row["after"]]
    low, high = row["after_interval"]
    assert low < row["after"] < high or row["after"] in (low, high)

    assert cartilha("report", run, "--output", tmp_path / "report.html", "--language", "pt").code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    for text in (page, card):
        assert "pares: acc" in text
        assert f"{row['after']:.3f}" in text and f"{low:.3f}" in text  # as English writes them
    assert "Tarefas" in page


def test_tasks_need_no_text_and_their_scores_are_shown(task: Path, cartilha: Command) -> None:
    done = cartilha("evaluate", "--model", "random:tiny", "--tasks", task)
    assert done.code == 0, done.err
    assert "pares: acc 0." in done.out or "pares: acc 1." in done.out
    assert "95 % interval [" in done.out and "(3 questions)" in done.out


def test_what_does_not_go_with_tasks_alone(task: Path, unbroken: Left, refused: Callable[..., str], tmp_path: Path):
    assert "needs a text to score" in refused("evaluate", "--tasks", task, "--save", tmp_path / "x.parquet")
    assert "name them with --tasks" in refused("evaluate", "--record", unbroken.path)
    assert "leave --model out" in refused("evaluate", "--tasks", task, "--record", unbroken.path, "--model", "random:a")
    assert "not a finished run" in refused("evaluate", "--tasks", task, "--record", tmp_path)
