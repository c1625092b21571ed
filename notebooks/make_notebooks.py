"""`make notebooks`: each text NAME.md as NAME.ipynb, which Colab opens; without outputs, always the same bytes."""

from pathlib import Path

import jupytext
import nbformat

HERE = Path(__file__).parent


def notebook(text: Path) -> str:
    """The notebook of a text, as JSON."""
    made = jupytext.reads(text.read_text(encoding="utf-8"), "md")
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # jupytext draws ids at random
    return nbformat.writes(made, version=4) + "\n"


if __name__ == "__main__":
    for text in sorted(HERE.glob("[!R]*.md")):
        text.with_suffix(".ipynb").write_text(notebook(text), encoding="utf-8")
