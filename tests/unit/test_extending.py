"""The page on extending: its code runs as it stands, in both languages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = ("docs/extending.md", "docs/pt/estender.md")


def code_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (CHECKOUT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_pages_code_adds_one_of_each(tmp_path: Path) -> None:
    used = """
from cartilha.corpus.formats import is_readable
assert is_readable("a.srt.gz")
assert long_enough.__doc__


from cartilha import EvaluateConfig, evaluate
(result,) = evaluate(EvaluateConfig(model=("random:tiny",), input=("film.srt",))).to_dict()["models"]
assert result["nats_per_word"] > 0
"""
    script = tmp_path / "page.py"
    script.write_text("\n".join([*code_of(PAGES[0]), used]), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert run.returncode == 0, run.stderr


def test_both_languages_have_the_same_code() -> None:
    assert code_of(PAGES[0]) == code_of(PAGES[1])
