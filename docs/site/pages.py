"""The pages of the documentation as the repository has them: languages, twins, headings, links, blocks of code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXTS = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
LANGUAGES = ("pt", "en")
_AT_THE_ROOT = ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")
# The line below a title that leads to the page in the other language.
_SWITCH = re.compile(
    r"^\*(?:Em português: |Leia em |In English: |Read it in )\[[^\]]*\]\(([^)]+)\)\.?\*\n", re.MULTILINE
)
_FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]*?) -->\n)?^(?P<indent> *)```(?P<kind>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)?)\)")


@dataclass(frozen=True)
class Fence:
    """A block of code: `sh`, `python`, or nothing for an output; the mark is a comment on the line above it."""

    kind: str
    text: str
    mark: str
    start: int  # where it begins in the page


@dataclass(frozen=True)
class Page:
    """A Markdown file of the documentation."""

    path: str  # from the repository's root

    @cached_property
    def text(self) -> str:
        """The file as it is."""
        return (ROOT / self.path).read_text(encoding="utf-8")

    @property
    def language(self) -> str:
        """`pt` below docs/pt and for names in .pt-BR.md, else `en`."""
        return "pt" if self.path.startswith("docs/pt/") or self.path.endswith(".pt-BR.md") else "en"

    @property
    def slug(self) -> str:
        """Its path in the site of its language, without suffix."""
        name = self.path.removeprefix("docs/").removeprefix("pt/").removesuffix(".md").removesuffix(".pt-BR")
        return "index" if name == "README" else name.lower() if name in _AT_THE_ROOT else name

    @property
    def twin(self) -> str | None:
        """The path of the page in the other language, which stands below the title."""
        found = _SWITCH.search(self.text)
        return self.resolve(found[1]) if found else None

    @property
    def title(self) -> str:
        """The first heading, without code marks."""
        return self.headings[0][1].replace("`", "")

    @property
    def prose(self) -> str:
        """The text without its blocks of code and without the link to the other language."""
        return _FENCE.sub("", _SWITCH.sub("", self.text))

    @property
    def headings(self) -> list[tuple[int, str]]:
        """Level and text of each heading."""
        found = re.findall(r"^(#+) (.+)$", _FENCE.sub("", self.text), re.MULTILINE)
        return [(len(marks), text.strip()) for marks, text in found]

    @property
    def fences(self) -> list[Fence]:
        """The blocks of code, in order."""
        return [
            Fence(found["kind"].strip(), found["text"], found["mark"] or "", found.start())
            for found in _FENCE.finditer(self.text)
        ]

    @property
    def tables(self) -> list[tuple[int, int]]:
        """Rows and columns of each table, but for those below a comment `in English alone`."""
        compared = re.sub(r"^<!-- in English alone -->\n(\|.*\n?)+", "", self.prose, flags=re.MULTILINE)
        found = re.findall(r"(?:^\|.*\n?)+", compared, re.MULTILINE)
        return [(len(table.splitlines()), len(re.findall(r"(?<!\\)\|", table.splitlines()[0]))) for table in found]

    @property
    def anchors(self) -> set[str]:
        """What links to parts of the page can name, as the repository's web page and ours make it."""
        made: dict[str, int] = {}
        for _, heading in self.headings:
            made[anchor(heading)] = made.get(anchor(heading), 0) + 1
        return {name if number == 0 else f"{name}-{number}" for name, times in made.items() for number in range(times)}

    @property
    def links(self) -> list[str]:
        """The targets of its links and pictures, as written."""
        return LINK.findall(self.prose)

    def resolve(self, target: str) -> str:
        """The path that a relative link means, from the repository's root."""
        return os.path.normpath(os.path.join(os.path.dirname(self.path), target.partition("#")[0])).replace(os.sep, "/")

    def without_switch(self) -> str:
        """The text without the link to the other language, which the site has in its head."""
        return _SWITCH.sub("", self.text)


def pages() -> list[Page]:
    """All pages, in both languages."""
    return [Page(path) for path in sorted(_paths())]


def _paths() -> Iterator[str]:
    for name in _AT_THE_ROOT:
        yield from (path.name for path in ROOT.glob(f"{name}*.md"))
    for path in (ROOT / "docs").rglob("*.md"):
        yield path.relative_to(ROOT).as_posix()


def anchor(heading: str) -> str:
    """A heading as the target of a link: lower case, spaces to hyphens, without punctuation."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
