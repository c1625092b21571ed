"""The formats that are read; a compression (`files.COMPRESSIONS`) may follow any suffix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cartilha.corpus.csv_records import read_csv
from cartilha.corpus.files import COMPRESSED_EXPANSION, COMPRESSIONS, READ_ERRORS, SourceFile, split_name
from cartilha.corpus.json_records import read_json, read_jsonl
from cartilha.corpus.lines import Span, damaged
from cartilha.corpus.plain_text import cut_lines, read_txt
from cartilha.corpus.records import FilePart, Numbered, ReadSettings
from cartilha.corpus.tables import cut_row_groups, read_table
from cartilha.errors import UserError


@dataclass(frozen=True)
class Format:
    """All that differs between formats: `suffixes` are in lower case, `unit` is what messages count by.

    `cut` gives parts of about so many bytes; None if a file is read as a whole. `expansion` says how many bytes of text
    a byte of a file holds, for estimates only.
    """

    suffixes: tuple[str, ...]
    read: Callable[[FilePart], Numbered]
    unit: str
    cut: Callable[[SourceFile, ReadSettings, int], Iterator[Span]] | None = None
    expansion: float = 1.0


FORMATS = (
    Format((".txt",), read_txt, "line", cut_lines),
    Format((".jsonl", ".ndjson", ".jsonlines"), read_jsonl, "line", cut_lines),
    Format((".json",), read_json, "record"),
    Format((".csv", ".tsv"), read_csv, "row"),
    Format((".parquet",), read_table, "row", cut_row_groups, expansion=3.0),
    Format((".arrow", ".feather"), read_table, "row"),
)
BY_SUFFIX = {suffix: found for found in FORMATS for suffix in found.suffixes}
READABLE = f"{', '.join(BY_SUFFIX)}, and {' or '.join(COMPRESSIONS)} of them"


def is_readable(path: str) -> bool:
    """Whether a file's name ends like one of the formats."""
    return split_name(os.path.basename(path))[1] in BY_SUFFIX


def expansion(source: SourceFile) -> float:
    """About how many bytes of text a byte of the file stands for."""
    return COMPRESSED_EXPANSION if source.compression else BY_SUFFIX[source.format].expansion


def file_part(source: SourceFile, settings: ReadSettings, span: Span | None = None) -> FilePart:
    """A part of a file, by default the whole, to be read by these settings."""
    return FilePart(source, span or Span(), BY_SUFFIX[source.format].unit, settings)


def spans(source: SourceFile, settings: ReadSettings, target_bytes: int) -> Iterator[Span]:
    """Parts of about `target_bytes` that can be read alone; the whole if it is smaller or cannot be cut."""
    cut = BY_SUFFIX[source.format].cut
    if cut is None or source.compression or source.size_bytes <= target_bytes:
        return iter([Span(num_bytes=source.size_bytes)])
    return cut(source, settings, target_bytes)


def read_records(part: FilePart) -> Numbered:
    """The records of a part of a file, the last perhaps a fault for its rest; a UserError if it cannot be opened."""
    number: int | str = 0
    try:
        for number, record in BY_SUFFIX[part.source.format].read(part):
            yield number, record
    except READ_ERRORS as error:
        place = f"{part.source.path} cannot be read" + (f" after {part.unit} {number}" if number else "")
        system = error.strerror if isinstance(error, OSError) else None  # decompressors set none
        if system:
            remedy = "change its permissions" if isinstance(error, PermissionError) else "check the file and the disk"
            raise UserError(f"{place} ({system}); {remedy}.") from error
        if "too much memory" in str(error):  # the words of zstd for what its option --long requires of a reader
            raise UserError(
                f"{place}: zstd --long gave it a window above 128 MiB; unpack it by `zstd -d --long=31`."
            ) from error
        yield number, damaged(f"{place} ({error}); it is damaged or cut off: copy or download it again")
