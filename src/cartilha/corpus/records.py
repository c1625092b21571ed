"""What the readers of all formats share: how to read, what part of a file, and what they yield."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from cartilha.corpus.files import SourceFile
from cartilha.corpus.lines import Fault, Span, read_lines
from cartilha.errors import UserError
from cartilha.option_groups import ReadingOptions

DOMAIN_KEYS = ("domain", "genre", "source")

# A text that is known to be valid; columns and their values, in which the marks of `lines` stand for invalid bytes; or
# what is wrong with a record that cannot be read.
Record = str | Mapping[str, Any] | Fault
Numbered = Iterator[tuple[int | str, Record]]  # the hub's rows are numbered within data files: "2:15"


class JoinedLines(dict[str, Any]):
    """A record that quotes joined out of several lines."""


@dataclass(frozen=True, kw_only=True)
class ReadSettings(ReadingOptions):
    """How records become documents; a UserError says which setting makes no sense."""

    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            "\n".encode(self.encoding)  # a codec that is no text encoding (rot13, hex) fails here
            encoding = codecs.lookup(self.encoding).name.removesuffix("-sig")  # a byte-order mark is always dropped
        except (LookupError, ValueError):
            raise UserError(f"{self.encoding!r} is no text encoding; try utf-8, latin-1 or utf-16.") from None
        object.__setattr__(self, "encoding", encoding)
        delimiter = {"tab": "\t", r"\t": "\t"}.get(self.csv_delimiter, self.csv_delimiter)
        if delimiter != "auto" and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise UserError(f"--csv_delimiter is {delimiter!r}; give one character such as ';', or tab, or auto.")
        object.__setattr__(self, "csv_delimiter", delimiter)

    @property
    def domain_keys(self) -> tuple[str, ...]:
        """Keys or columns that may hold the domain, in order of preference; never the text's own."""
        keys = DOMAIN_KEYS if self.domain_column is None else (self.domain_column,)
        return tuple(key for key in keys if key != self.text_column)

    @classmethod
    def of(cls, config: object) -> Self:
        """The settings that a command's configuration has fields for; the others keep their defaults."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in vars(config).items() if name in names})


@dataclass(frozen=True)
class FilePart:
    """What to read of a file, and how; `unit` is what messages count by."""

    source: SourceFile
    span: Span
    unit: str
    settings: ReadSettings

    @property
    def marks(self) -> bool:
        """Whether invalid bytes are kept as marks."""
        return self.settings.invalid_bytes == "replace"

    def at(self, number: int) -> str:
        """A place for messages."""
        return f"{self.source.path}, {self.unit} {number}"

    def lines(self, marks: bool | None = None) -> Iterator[tuple[int, str | Fault]]:
        """Its lines, numbered (`read_lines`)."""
        return read_lines(self.source, self.span, self.settings.encoding, self.marks if marks is None else marks)


def missing_column(place: str, column: str, names: Sequence[str], holds: str = "text") -> Fault | None:
    """The fault of a record or file that does not have the column of the text, or domain, exactly once."""
    if names.count(column) == 1:
        return None
    if column in names:
        message = f"{place} has more than one {column!r}; rename all but the one that holds the {holds}."
    else:
        there = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        message = f"{place} has no {column!r}, only: {there or 'nothing'}; name the {holds} by --{holds}_column."
    return Fault(f"no_{holds}_column", message)
