"""What a notebook shows of results: the report's own words and figures, in the reader's language, and drawings."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from test_report import evaluation, make_run

from cartilha import console
from cartilha.config import EvaluateConfig, ReportConfig
from cartilha.pipeline.compare import CompareResult
from cartilha.pipeline.evaluate import EvaluateResult, evaluate
from cartilha.pipeline.job import RunResult
from cartilha.pipeline.plan import PlanResult
from cartilha.pipeline.report import report
from cartilha.pipeline.train import TrainResult
from cartilha.reporting.chart import Axis, Figure, Series, run_class
from cartilha.reporting.grid import Grid
from cartilha.reporting.wording import Wording


@pytest.fixture(autouse=True)
def portuguese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.delenv("LC_MESSAGES", raising=False)
    monkeypatch.setenv("LANG", "pt_BR.UTF-8")


def text_of(shown: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", shown, flags=re.S))).split())


def test_a_training_shows_its_result_and_its_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    trained = TrainResult(str(run), {}, was_finished=False)
    shown = trained._repr_html_()
    assert "Perplexidade 89,02 → 32,51 −63,5%" in text_of(shown)
    drawings = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', shown)
    assert [title for title, _ in drawings][:2] == ["Perda por passo", "Perda por época"]
    for _, data in drawings:
        ElementTree.fromstring(b64decode(data))
    job = RunResult(None, trained, "report.html", "", ())  # type: ignore[arg-type]
    assert job._repr_html_() == shown


def test_a_run_that_is_gone_is_a_sentence_and_no_traceback(tmp_path: Path) -> None:
    gone = TrainResult(str(tmp_path / "<gone>"), {}, was_finished=False)._repr_html_()
    assert escape("There is no run directory ") in gone and "<gone>" not in gone


@dataclass
class Evaluated:
    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.values


def test_an_evaluation_has_a_row_for_each_model() -> None:
    models = (Evaluated(evaluation(0)), Evaluated(evaluation(0, 32.507, 1.7913, model="runs/<b>")))
    shown = EvaluateResult(models, 1.0)._repr_html_()  # type: ignore[arg-type]
    assert "random:tiny 89,02 2,310" in text_of(shown) and "runs/<b> 32,51 1,791" in text_of(shown)
    assert "<b>" not in shown


def test_a_comparison_says_the_difference_with_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = evaluation(0), evaluation(0, 32.507, 1.7913, model="b")
    changed = {"doc_id": "d1", "num_bytes": 900, "bits_per_byte_first": 2.0, "bits_per_byte_second": 1.5}
    values = {
        "bits_per_byte_difference": -0.519,
        "bits_per_byte_difference_interval": [-0.6, -0.4],
        "p_value": 0.0001,
        "share_improved": 1.0,
        "num_documents": 451,
        "gained_most": [changed],
        "lost_most": [],
        "evaluations": [first, second],
    }
    monkeypatch.setattr(CompareResult, "to_dict", lambda self: values)
    shown = text_of(CompareResult(first, second, None, 0)._repr_html_())  # type: ignore[arg-type]
    assert "−0,519 bits por byte (intervalo de 95%: −0,600 a −0,400)" in shown
    assert "d1 - 900 2,000 1,500 −25,0%" in shown and "Nenhum perdeu." in shown


def test_a_plan_has_a_row_for_each_device_and_says_what_does_not_fit() -> None:
    row = {
        "device": "t4",
        "block_size": 512,
        "micro_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "memory_bytes": 4_700_000_000,
        "fits": True,
        "estimated": True,
        "tokens_per_second": 28_133.4,
        "seconds_per_epoch": 71.2,
        "hours": 0.02,
        "price": None,
    }
    other = row | {"device": "l4", "fits": False, "micro_batch_size": 0}
    shown = text_of(PlanResult({"recommended": [row, other]})._repr_html_())
    assert "t4 512 16 4 4,7 GB ~28.133 1 min 11 s 0,02 - l4 512 não cabe: 4,7 GB ~: estimativa" in shown


def test_a_report_is_shown_whole_in_a_frame_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shown = report(ReportConfig(runs=(str(run),), output=str(tmp_path / "report.html")))._repr_html_()
    (inside,) = re.findall(r'<iframe srcdoc="([^"]*)"', shown)
    assert unescape(inside) == (tmp_path / "report.html").read_text(encoding="utf-8")


def test_real_records_have_what_the_tables_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Bom dia, menina.\nA fazenda é grande e tem café.\n", encoding="utf-8")
    result = evaluate(EvaluateConfig(model=("random:tiny",), input=(str(tmp_path / "a.txt"),), device="cpu"))
    perplexity = Wording("pt").perplexity(result.evaluations[0].perplexity)
    assert f"random:tiny {perplexity} " in text_of(result._repr_html_())


def test_drawings_are_shown_below_their_cells_in_colour() -> None:
    say = Wording("pt")
    figure = Figure("f", "Título", [Series(run_class(0), [0, 1], [1, 2])], Axis("x", say.number), Axis("y", say.number))
    grid = Grid("g", "Quem vê quem", [[0, -1], [1, 1]], "chave", "consulta", legend=[(run_class(1), "texto 2")])
    for drawing in (figure, grid):
        svg = drawing._repr_svg_()
        root = ElementTree.fromstring(svg)
        assert drawing.title in svg and "path.run1 { stroke:" in svg
        assert float(root.attrib["height"]) > drawing.size[1]
    # The row of two equal cells is one rectangle as wide as the drawing; the empty cell is none.
    rectangles = re.findall(r'<rect class="(run\d)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', grid.drawing)
    assert rectangles == [("run0", "0.0", "320.0"), ("run1", "0.0", "640.0")]


@pytest.mark.parametrize(("is_jupyter", "has_widgets", "live"), [(True, True, True), (True, False, False)])
def test_progress_is_a_bar_only_where_a_notebook_can_draw_one(
    is_jupyter: bool, has_widgets: bool, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "terminal", lambda: Console(force_jupyter=is_jupyter))
    monkeypatch.setattr(console, "find_spec", lambda name: SimpleNamespace() if has_widgets else None)
    assert console._has_live_bar() is live
