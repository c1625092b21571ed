"""Texts and number formats of the two languages of the report: English, and the Portuguese of Brazil."""

from __future__ import annotations

import locale
import math
import os
import re
from functools import cache
from typing import Literal

import yaml

from cartilha.reporting.notices import in_portuguese
from cartilha.reporting.pages import PACKAGE, template_file

Language = Literal["en", "pt"]
LANGUAGES: tuple[Language, ...] = ("en", "pt")
ABSENT = "-"

# What `evaluation.decoding.describe_mode` writes into samples.jsonl, by the key of its words here.
_MODES = {
    "mode_greedy": re.compile("greedy"),
    "mode_beam": re.compile(r"beam search \((?P<beams>\d+)\)"),
    "mode_sampled": re.compile(
        r"sampled \(temperature (?P<temperature>\S+), top_k (?P<top_k>\S+), top_p (?P<top_p>\S+)\)"
    ),
}


def choose_language(name: str) -> Language:
    """The language for `en`, `pt` or `auto`; `auto` follows the locale and falls back to English."""
    if name == "auto":
        settings = (os.environ.get(variable) for variable in ("LC_ALL", "LC_MESSAGES", "LANG"))
        # Windows sets no such variable and says "Portuguese_Brazil".
        name = next((value for value in settings if value), None) or locale.getlocale()[0] or ""
    return "pt" if name.lower().startswith(("pt", "portuguese")) else "en"


@cache
def _strings(package: str) -> dict[str, dict[str, str]]:
    strings: dict[str, dict[str, str]] = yaml.safe_load(template_file(package, "strings.yaml"))
    return strings


# A count and its noun in the texts: `{steps} [step|steps]`.
_COUNTED = re.compile(r"\{(\w+)\}([^{}\[\]]*)\[([^|\[\]]+)\|([^|\[\]]+)\]")


class Wording:
    """How one language writes texts and numbers; a number that is None becomes `-`."""

    package = PACKAGE  # its templates/strings.yaml has the texts; a subclass for another page has its own

    def __init__(self, language: Language) -> None:
        self.language: Language = language
        self.code = {"en": "en", "pt": "pt-BR"}[language]

    def __call__(self, key: str, **values: object) -> str:
        """The text of that key with its `{name}` filled in; `{name} [one|many]` agrees with the count."""

        def noun(found: re.Match[str]) -> str:
            return f"{{{found[1]}}}{found[2]}{found[3 if str(values[found[1]]) == '1' else 4]}"

        return _COUNTED.sub(noun, self.template(key)).format(**values)

    def template(self, key: str) -> str:
        """The text of that key with its `{name}` left open, for the page's script."""
        return _strings(self.package)[key][self.language]

    def number(self, value: float | None, decimals: int = 0) -> str:
        """With a fixed number of decimals and separators between thousands."""
        if value is None:
            return ABSENT
        text = f"{value:,.{decimals}f}".replace("-", "−")
        return text if self.language == "en" else text.translate(str.maketrans(",.", ".,"))

    def perplexity(self, value: float | None) -> str:
        """With four significant digits."""
        if value is None:
            return ABSENT
        if math.isinf(value):
            return "∞"
        rounded = f"{value:.3e}"  # rounds first, so that 9.9996 becomes 10.00 and not 10.000
        return self.number(float(rounded), max(0, 3 - int(rounded.split("e")[1])))

    def bits(self, value: float | None) -> str:
        """Bits per byte or per character, with three decimals."""
        return self.number(value, 3)

    def score(self, value: float | None) -> str:
        """A task's score, with three decimals."""
        return self.number(value, 3)

    def signed(self, value: float | None) -> str:
        """A difference of bits per byte, with its sign."""
        return ABSENT if value is None else _with_sign(self.bits(value))

    def p_value(self, value: float | None) -> str:
        """With two significant digits."""
        return self.number(value, 2 if value is None or value >= 0.01 else 4)

    def percent(self, share: float | None, decimals: int = 1) -> str:
        """A share as per cent."""
        return ABSENT if share is None else self.number(100 * share, decimals) + "%"

    def change(self, before: float | None, after: float | None) -> str:
        """The relative change with its sign."""
        return ABSENT if not before or after is None else _with_sign(self.percent(after / before - 1))

    def duration(self, seconds: float | None) -> str:
        """In the two units that matter."""
        if seconds is None:
            return ABSENT
        if seconds < 10:
            return f"{self.number(seconds, 1)} s"
        minutes, rest = divmod(round(seconds), 60)
        if minutes < 60:
            return f"{minutes} min {rest} s" if minutes else f"{rest} s"
        return f"{minutes // 60} h {minutes % 60} min"

    def mode(self, mode: str) -> str:
        """How a sample was chosen, as `describe_mode` of the evaluation says; any other text is shown as it is."""
        point = "." if self.language == "en" else ","
        for key, pattern in _MODES.items():
            if found := pattern.fullmatch(mode):
                return self(key, **{name: value.replace(".", point) for name, value in found.groupdict().items()})
        return mode

    def notice(self, notice: str) -> str:
        """What a run warned of."""
        return notice if self.language == "en" else in_portuguese(notice)

    def size(self, num_bytes: float | None) -> str:
        """A number of bytes in a decimal unit."""
        if num_bytes is None:
            return ABSENT
        units = iter(("B", "kB", "MB", "GB", "TB"))
        value, unit = float(num_bytes), next(units)
        while value >= 1000 and (larger := next(units, "")):
            value, unit = value / 1000, larger
        return f"{self.number(value, 0 if unit == 'B' else 1)} {unit}"


def _with_sign(text: str) -> str:
    return text if text.startswith("−") else f"+{text}"
