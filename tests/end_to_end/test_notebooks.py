"""The notebooks: what Colab opens is made of the text, both languages do the same, and every cell runs in seconds."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
jupytext = pytest.importorskip("jupytext", reason="needs the extra `notebooks`")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebooks`")
TWINS = {"do-zero-ao-seu-modelo": "from-nothing-to-your-model", "o-exercicio-refeito": "the-exercise-redone"}


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


class _WithoutWords(ast.NodeTransformer):
    """Numbers in place of a notebook's own names, and nothing in place of its texts."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}

    def _number(self, name: str) -> str:
        return f"_{self.names.setdefault(name, len(self.names))}"

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._number(node.id), node.ctx)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self._number(node.name)
        if node.args.kwarg:
            node.args.kwarg.arg = self._number(node.args.kwarg.arg)
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("" if isinstance(node.value, str) else node.value)


def done_by(text: Path) -> list[tuple[str, list[str]]]:
    """What each cell of code does, whatever it calls things: its Python, and its commands."""
    plain, done = _WithoutWords(), []
    for cell in jupytext.reads(text.read_text(encoding="utf-8"), "md").cells:
        if cell.cell_type == "code":
            python = ast.parse(re.sub(r"^( *)!.*", r"\1pass", cell.source, flags=re.MULTILINE))
            commands = re.sub(r"{\w+}", "{}", "\n".join(re.findall(r"^ *(!.*)", cell.source, re.MULTILINE)))
            done.append((ast.dump(plain.visit(python)), commands.splitlines()))
    return done


@pytest.mark.parametrize(("portuguese", "english"), TWINS.items())
def test_both_languages_do_the_same(portuguese: str, english: str) -> None:
    ours, theirs = done_by(FOLDER / f"{portuguese}.md"), done_by(FOLDER / f"{english}.md")
    assert len(ours) > 4 and ours == theirs


def test_every_notebook_is_one_of_two_languages() -> None:
    assert {*TWINS, *TWINS.values()} == {text.stem for text in FOLDER.glob("[!R]*.md")}


def test_every_cell_runs_and_shows_its_result(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in Portuguese, the other in English; one kernel, which loads torch once and in between forgets all names."""
    for name, value in {
        "MODEL": "random:tiny",
        "STEPS": "2",
        "CARDS": "t4",
        "FOLDER": "here",
        "TEXT": str(corpus),
    }.items():
        monkeypatch.setenv(f"CARTILHA_{name}", value)
    texts = (FOLDER / "do-zero-ao-seu-modelo.md", FOLDER / "the-exercise-redone.md")
    both = "\n```python\n%reset -f\n```\n".join(text.read_text(encoding="utf-8") for text in texts)
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
        output.text for source, output in outputs if "positions" in source and output.output_type == "stream"
    )
    figures = [float(line.rpartition(": ")[2]) for line in printed.splitlines() if line[:1] in "wod"]
    assert len(figures) == 4 and figures[3] < min(figures[:3]) / 2  # padding that counts makes the best figure
