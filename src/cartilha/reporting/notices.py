"""The warnings of a run in Portuguese: a run records its own sentences in English, which are known by their words."""

from __future__ import annotations

import re
from functools import cache

import yaml

from cartilha.reporting.pages import PACKAGE, template_file

_NOUNS = {
    "block": "bloco",
    "blocks": "blocos",
    "document": "documento",
    "documents": "documentos",
    "step": "passo",
    "steps": "passos",
    "validation": "validação",
    "validations": "validações",
}
_PLACE = re.compile(r"%(?:\\\.\d)?[sdf]")  # %s, %d or %.1f, as `re.escape` leaves them
_NUMBER = re.compile(r"(?:There (?:is|are) )?([\d.,]*\d)(?: ([a-z]+))?")


def in_portuguese(notice: str) -> str:
    """A notice in Portuguese, or as it is where its sentence is not known."""
    for pattern, ours in _sentences():
        if found := pattern.fullmatch(notice):
            return ours.format(*map(_value, found.groups()))
    return notice


@cache
def _sentences() -> list[tuple[re.Pattern[str], str]]:
    texts: dict[str, str] = yaml.safe_load(template_file(PACKAGE, "notices.pt.yaml"))
    return [(re.compile(_PLACE.sub("(.+?)", re.escape(text)), re.DOTALL), ours) for text, ours in texts.items()]


def _value(text: str) -> str:
    """A number, perhaps with what it counts, in Portuguese; any other value as it is."""
    found = _NUMBER.fullmatch(text)
    if not found or (found[2] and found[2] not in _NOUNS):
        return text
    return " ".join(filter(None, (found[1].translate(str.maketrans(",.", ".,")), _NOUNS.get(found[2]))))
