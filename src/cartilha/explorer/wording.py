"""Texts of the explorer's page in the two languages; numbers are written as the report writes them."""

from __future__ import annotations

import math

from cartilha.errors import UserError
from cartilha.reporting.wording import Language, Wording


class PageWording(Wording):
    """How one language says what stands on the page."""

    package = "cartilha.explorer"

    def probability(self, value: float) -> str:
        """A probability as per cent; small ones keep two significant digits."""
        if value <= 0:
            return self.percent(0, 0)
        if value < 1e-9:
            return f"< {self.percent(1e-9, 7)}"
        decimals = 1 if value >= 0.1 else max(2, -math.floor(math.log10(100 * value)) + 1)
        return self.percent(value, decimals)


class Refusal(UserError):
    """What the page cannot do with what it was given: the text of `key`, said in the language of the page."""

    def __init__(self, key: str, **values: object) -> None:
        super().__init__(PageWording("en")(key, **values))
        self.key = key
        self.values = values


def preferred_language(accept_language: str, default: Language) -> Language:
    """The language that a browser's Accept-Language header asks for: the first of ours by weight, else the default."""
    weighted: list[tuple[float, str]] = []
    for part in accept_language.split(","):
        name, _, weight = part.strip().partition(";q=")
        try:
            weighted.append((float(weight) if weight else 1.0, name.strip().lower()))
        except ValueError:
            continue
    for share, name in sorted(weighted, key=lambda item: -item[0]):
        if share > 0 and name.split("-")[0] in ("en", "pt"):
            return "pt" if name.startswith("pt") else "en"
    return default
