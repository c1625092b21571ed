"""What a team picks up: the picture of the architecture, the citation, the forms, the image."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "cartilha"
MODULE = re.compile(r"(?<![\w/])(\w+)\.py\b")


def project() -> dict[str, Any]:
    """What pyproject.toml says of the package."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def layers() -> list[str]:
    """The modules of the package, from the last to the first, as import-linter holds them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[str] = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return found


def picture() -> tuple[dict[str, set[str]], str]:
    """The stages of the picture in its order, each with the modules that it names; and the text around the picture."""
    _, drawn, after = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```", 2)
    stages: dict[str, set[str]] = {}
    for line in drawn.split("\n"):
        if found := re.match(r"    ([a-z]\w+) ", line):
            stages[found[1]] = set()
        if stages:
            stages[list(stages)[-1]] |= set(MODULE.findall(line))
    return stages, after.split("\n## ")[0]


def modules_of(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


def test_the_picture_has_every_module_in_its_stage_and_no_other():
    stages, beside = picture()
    for stage, named in stages.items():
        if stage == "cli":
            continue
        found = modules_of(SOURCE / stage)
        assert named == found, f"docs/architecture.md, {stage}: lacks {found - named}, has {named - found}"
    of_the_package = modules_of(SOURCE) | modules_of(SOURCE / "machine")
    named = set(re.findall(r"`(\w+)\.py`", beside)) | stages["cli"] | {"cli"}
    assert named == of_the_package, f"lacks {of_the_package - named}, has {named - of_the_package}"


def test_the_picture_has_the_order_of_the_imports():
    stages, beside = picture()
    order = [name for name in reversed(layers()) if name in stages]
    assert [name for name in stages if name in order] == order
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages <= set(stages) | set(re.findall(r"`(\w+)/`", beside)), "a package that the page does not name"
    assert set(layers()) == packages | modules_of(SOURCE)


def test_the_pages_name_modules_that_are_there():
    named = MODULE.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert len(named) > 150
    assert set(named) <= {path.stem for path in SOURCE.rglob("*.py")}


def test_the_citation_is_one():
    """What version 1.2.0 of the Citation File Format requires, by its schema, of the entries that are used."""
    values = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(values)
    assert values["cff-version"] == "1.2.0" and values["type"] in ("software", "dataset")
    assert all(set(author) <= {"name", "given-names", "family-names", "orcid"} for author in values["authors"])
    assert values["version"] == project()["version"]


def test_the_forms_are_forms():
    """The required entries of GitHub's form schema, and ids and labels that occur once."""
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[0-9]*.yml"))
    assert len(forms) == 3
    for path in forms:
        form: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form) and len(form["description"]) <= 200, path.name
        asked = [item for item in form["body"] if item["type"] != "markdown"]
        assert {item["type"] for item in asked} <= {"textarea", "input", "dropdown", "checkboxes"}
        ids, labels = [[item["id"] for item in asked], [item["attributes"]["label"] for item in asked]]
        assert len(set(ids)) == len(ids) and all(" / " in label for label in labels), path.name


def test_the_image_takes_what_the_repository_has():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").split("\n")
    given = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    assert given and all((ROOT / name).exists() and f"!{name}\n" in allowed for name in given)
    (named,) = (line.partition("=")[2].split(",") for line in lines if line.startswith("ARG EXTRAS"))
    assert set(named) <= set(project()["optional-dependencies"])
    assert [line.partition("=")[0] for line in lines if line.startswith("ARG")] == [
        "ARG BASE",
        "ARG TORCH",
        "ARG EXTRAS",
    ]
