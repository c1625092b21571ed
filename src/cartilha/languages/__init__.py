"""What differs from one language of text to another: a YAML file for each, here or written by the user.

code            ISO 639: `pt`. The file of a built-in language is named after it
names           in the languages of our pages: {en: Portuguese, pt: português}
identified_as   the label of py3langid, for the cleaning step `language`; default: the code
prompts         beginnings of texts, which a model continues before and after its training
tasks           tasks of lm-evaluation-harness, for `evaluate --tasks CODE`; `tasks_list` is the edition of the list
boilerplate     phrases of sites about themselves: an anchor that each contains (lower case), and regular expressions
fineweb_2       the thresholds of FineWeb-2 for the language, as its repository has them (configs/por_Latn.yml)
"""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from cartilha.errors import UserError

DEFAULT = "pt"


@dataclass(frozen=True)
class Thresholds:
    """What good text of a language does not exceed; shares of characters, lines or words."""

    stop_words: tuple[str, ...]
    repeated_lines: float
    ending_lines: float  # at least, that end with a sign of punctuation
    lines_per_word: float
    letter_words: float  # at least, with a letter
    word_chars: tuple[float, float]
    top_ngrams: dict[int, float]  # of the most frequent n-gram
    repeated_ngrams: dict[int, float]
    # The same for all languages.
    num_words: tuple[int, int] = (50, 100_000)
    num_stop_words: int = 2
    repeated_line_chars: float = 0.1
    bullet_lines: float = 0.9
    ellipsis_lines: float = 0.3
    symbols_per_word: float = 0.1  # number signs, ellipses

    @classmethod
    def of_fineweb_2(cls, values: Mapping[str, Any]) -> Thresholds:
        """From the names that FineWeb-2 gives them; what else its files hold is not used."""
        if not all(isinstance(word, str) for word in values["stopwords"]):  # `no` is false in YAML
            raise TypeError("quote the stopwords")
        return cls(
            stop_words=tuple(values["stopwords"]),
            repeated_lines=float(values["dup_line_frac"]),
            ending_lines=float(values["line_punct_thr"]),
            lines_per_word=float(values["new_line_ratio"]),
            letter_words=float(values["max_non_alpha_words_ratio"]),
            word_chars=(float(values["min_avg_word_length"]), float(values["max_avg_word_length"])),
            top_ngrams={int(n): float(share) for n, share in values["top_n_grams"]},
            repeated_ngrams={int(n): float(share) for n, share in values["dup_n_grams"]},
        )


@dataclass(frozen=True)
class Language:
    """A language of text; what is not known of it is empty or None."""

    code: str
    names: dict[str, str] = field(default_factory=dict)
    identified_as: str = ""
    prompts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    tasks_list: int = 0
    boilerplate: dict[str, tuple[str, ...]] = field(default_factory=dict)
    thresholds: Thresholds | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the record of a store keeps of it; the hash tells two editions of a user's file apart."""
        digest = hashlib.sha256(repr(self).encode("utf-8")).hexdigest()
        return {"code": self.code, "names": self.names, "prompts": list(self.prompts), "sha256": digest}


@cache
def language_codes() -> tuple[str, ...]:
    """The codes of the built-in languages."""
    names = sorted(item.name for item in _folder().iterdir())
    return tuple(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def find_language(name: str) -> Language:
    """The language of a code, or of a user's YAML file; of a code without a file nothing more is known.

    A UserError says that the name is neither a code nor a file, or what is wrong with the file.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return _read(name, lambda: Path(name).read_text(encoding="utf-8"))
    if name in language_codes():
        return _built_in(name)
    if re.fullmatch("[a-z]{2,3}", name):
        return Language(name, identified_as=name)
    raise UserError(
        f"There is no language {name!r}; give an ISO 639 code such as {', '.join(language_codes())}, or a YAML file"
        " that describes one."
    )


def _folder() -> Traversable:
    return importlib.resources.files(__name__)


@cache
def _built_in(code: str) -> Language:
    return _read(f"{code}.yaml", lambda: (_folder() / f"{code}.yaml").read_text(encoding="utf-8"))


def _read(file: str, text: Callable[[], str]) -> Language:
    try:
        values = yaml.safe_load(text())
        return _language(values)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The language file {file} cannot be read ({error}).") from error
    except KeyError as error:
        raise UserError(f"The language file {file} lacks {error}; docs/extending.md shows a whole one.") from error
    except (yaml.YAMLError, re.error, TypeError, ValueError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"The language file {file} is not as it should be ({said}); docs/extending.md shows one."
        ) from error


def _language(values: dict[str, Any]) -> Language:
    """The language that a file describes; a KeyError, TypeError or ValueError says what is wrong."""
    if not isinstance(values, dict):
        raise TypeError("entries such as `code: gl` were expected")
    code, names = values["code"], values.get("names") or {}
    if not (isinstance(code, str) and re.fullmatch("[a-z]{2,3}", code)):
        raise ValueError(f"code must be two or three small letters, in quotes where YAML needs them, not {code!r}")
    boilerplate = {anchor: tuple(phrases) for anchor, phrases in (values.get("boilerplate") or {}).items()}
    for phrases in boilerplate.values():
        re.compile("|".join(phrases))
    thresholds = values.get("fineweb_2")
    known = ("code", "names", "identified_as", "prompts", "tasks", "tasks_list", "boilerplate", "fineweb_2")
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"there is no entry {unknown[0]!r}; choose from {', '.join(known)}")
    return Language(
        code=code,
        names={page: str(name) for page, name in names.items()},
        identified_as=values.get("identified_as", code),
        prompts=tuple(map(str, values.get("prompts") or ())),
        tasks=tuple(map(str, values.get("tasks") or ())),
        tasks_list=int(values.get("tasks_list", 1)),
        boilerplate=boilerplate,
        thresholds=Thresholds.of_fineweb_2(thresholds) if thresholds else None,
    )
