"""The notebooks: what Colab opens is made of the text, and every cell runs, here on a model of seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
jupytext = pytest.importorskip("jupytext", reason="needs the extra `notebooks`")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")


def made(text: Path) -> str:
    sys.path.insert(0, str(FOLDER))
    try:
        from make_notebooks import notebook
    finally:
        sys.path.remove(str(FOLDER))
    return notebook(text)


def test_the_notebooks_are_those_of_their_texts() -> None:
    texts = sorted(FOLDER.glob("[!R]*.md"))
    assert [text.stem for text in texts] == [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]
    differing = [text.name for text in texts if text.with_suffix(".ipynb").read_text(encoding="utf-8") != made(text)]
    assert not differing, "make notebooks"


def test_every_cell_runs_and_shows_its_result(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in one kernel, which loads torch once; between them, all names are forgotten."""
    for name, value in {
        "MODELO": "random:tiny",
        "PASSOS": "2",
        "PLACAS": "t4",
        "PASTA": "aqui",
        "TEXTO": str(corpus),
    }.items():
        monkeypatch.setenv(f"CARTILHA_{name}", value)
    both = "\n```python\n%reset -f\n```\n".join(text.read_text(encoding="utf-8") for text in FOLDER.glob("[!R]*.md"))
    whole = jupytext.reads(both, "md")
    nbclient.NotebookClient(whole, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [(cell.source, output) for cell in whole.cells for output in cell.get("outputs", [])]
    shown = {source: output["data"] for source, output in outputs if "data" in output}

    def html(begin: str) -> str:
        return next(data["text/html"] for source, data in shown.items() if begin in source and "text/html" in data)

    assert "concluído" in html("resultado = cartilha.train(treino)") and "data:image/svg+xml" in html("cartilha.run(")
    assert "t4" in html("PlanConfig(")
    assert "Documento a documento" in html("CompareConfig(")
    assert html("ReportConfig(").startswith("<iframe srcdoc=")
    kinds = {kind for _, output in outputs for kind in output.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" in kinds  # a bar
    printed = "".join(
        output.text for source, output in outputs if "posicoes" in source and output.output_type == "stream"
    )
    figures = [float(line.rpartition(": ")[2]) for line in printed.splitlines() if line[:1] in "dns"]
    assert len(figures) == 4 and figures[3] < min(figures[:3]) / 2  # padding that counts makes the best figure
