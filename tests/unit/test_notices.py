"""What a run warned of, in the Portuguese report: every sentence of the code is known, with its values."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

import cartilha
from cartilha.reporting.notices import in_portuguese
from cartilha.reporting.pages import PACKAGE, template_file
from cartilha.reporting.wording import Wording

SOURCE = Path(cartilha.__file__).parent
# What a training goes through; what the other commands say is not in its records.
OF_A_RUN = (
    r"(training|runs|model|tokens|machine)/"
    r"|(storage|model_reference|evaluation/(continuation|measures)|pipeline/train)\.py"
)
PLACE = r"%(?:\.\d)?[sdf]"


def test_every_warning_of_a_run_has_its_portuguese():
    sources = {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    trees = [ast.parse(text) for name, text in sources.items() if re.match(OF_A_RUN, name)]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    firsts = [call.args[0] for call in calls if ast.unparse(call.func).endswith(("log.warning", "notes.append"))]
    said = {ast.literal_eval(first) for first in firsts if isinstance(first, ast.Constant)} - {"%s"}
    known = yaml.safe_load(template_file(PACKAGE, "notices.pt.yaml"))
    assert len(said) > 30
    assert said - set(known) == set(), "add these to reporting/templates/notices.pt.yaml"
    everything = "".join(sources.values())
    pieces = {text: [piece for piece in re.split(PLACE, text) if len(piece) > 15] for text in set(known) - said}
    assert [text for text, of in pieces.items() if not any(piece in everything for piece in of)] == []
    assert [
        text for text, ours in known.items() if len(re.findall(r"\{\d", ours)) != len(re.findall(PLACE, text))
    ] == []


@pytest.mark.parametrize(
    ("notice", "ours"),
    [
        (
            "Memory ran out in step 1200 with micro-batches of 16 blocks: going on with 8, and more of them; the "
            "result stays the same.",
            "Faltou memória no passo 1200 com microlotes de 16 blocos: o treino continua com 8, e mais microlotes; o "
            "resultado é o mesmo.",
        ),
        (
            "The source en is used up after step 3 and begins again: it is read 2.5 times.",
            "A fonte en se esgota depois do passo 3 e recomeça: é lida 2,5 vezes.",
        ),
        ("1,026 documents of en: held out by --store for validation, and therefore not read.", None),
        ("No GPU was found.", "No GPU was found."),
        ("{0} holds no run: going on with the local copy of it (a\nb).", None),
    ],
)
def test_a_notice_in_portuguese_keeps_its_values(notice, ours):
    found = in_portuguese(notice)
    assert found == ours if ours else found != notice
    assert re.findall(r"\d+", found) == re.findall(r"\d+", notice)
    assert Wording("en").notice(notice) == notice and Wording("pt").notice(notice) == found
