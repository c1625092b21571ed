"""Values that users write with a unit: a duration (`1h30m`), a share (`5%`), an amount of tokens (`5m`)."""

from __future__ import annotations

import math
import re

from cartilha.errors import UserError

_DURATION = re.compile("".join(rf"(?:(\d+\.?\d*|\.\d+){unit})?" for unit in "hms"), re.ASCII)


def parse_duration(text: str | None) -> float | None:
    """Seconds in `50m`, `1h30m`, `90s` or `2.5h`, None for None; a UserError if that is no time above 0."""
    if text is None:
        return None
    found = _DURATION.fullmatch(text.strip().lower())
    parts = map(float, found.groups("0") if found else ())
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not 0 < seconds < math.inf:
        raise UserError(f"A time is written like 50m, 1h30m or 90s, not {text!r}.")
    return seconds


def show_duration(seconds: float) -> str:
    """A time in the two units that matter, such as `3 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def parse_share(text: str, name: str) -> float:
    """A share between 0 and 1 from `5%` or `0.05`; a UserError that begins with `name` if it is neither."""
    number = text.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise UserError(f"{name} is a share such as 5% or 0.05, between 0 and 1, not {text!r}.")
    return share


def parse_amount(text: str, name: str) -> int | float:
    """An amount of tokens: a whole number (`2000000`, `2m`), or a float for a share (`20%`, `0.2`).

    Raises:
        UserError: It is neither, or nothing.
    """
    found = re.fullmatch(r"([\d_]+(?:\.\d+)?|\.\d+)([kmb%]?)", text.strip().lower(), re.ASCII)
    number, unit = (float(found[1]), found[2]) if found else (0.0, "")
    if unit == "%" or "." in (found[1] if found and not unit else ""):
        number /= 100 if unit == "%" else 1
        if 0 < number <= 1:
            return number
    elif number * _THOUSANDS[unit] >= 1:
        return round(number * _THOUSANDS[unit])
    raise UserError(f"{name} is a number of tokens such as 2000000 or 2m, or a share such as 20%, not {text!r}.")


_THOUSANDS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
