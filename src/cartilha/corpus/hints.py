"""Hints about how files are read: if their heads suggest another setting, or a setting was told from them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import groupby, pairwise
from statistics import quantiles

from cartilha.corpus.csv_records import quotes_are_plain
from cartilha.corpus.files import READ_ERRORS, SourceFile
from cartilha.corpus.formats import file_part
from cartilha.corpus.lines import Fault
from cartilha.corpus.records import FilePart, ReadSettings
from cartilha.corpus.sources import Source
from cartilha.errors import UserError, log

MAX_FILES = 20
HEAD_CHARS = 256 << 10
MIN_LINES = 8  # with fewer, nothing is told from a file alone
MIN_SMALL_FILES = 5
SMALL_BYTES = 64 << 10
SENTENCE_ENDS = (".", "!", "?", "…", ":", ";", '"', "”", "»", ")")


def log_hints(sources: Sequence[Source], settings: ReadSettings) -> None:
    """Log at most one hint about the documents of `.txt` files, and one about the quotes of `.tsv` files."""
    files = [source for source in sources if isinstance(source, SourceFile)][:MAX_FILES]
    texts, tables = ([file_part(file, settings) for file in files if file.format == kind] for kind in (".txt", ".tsv"))
    for hint in filter(None, (_text_unit(texts) if settings.text_unit == "line" else None, _quoting(tables))):
        log.warning("%s", hint)


def _quoting(parts: Sequence[FilePart]) -> str | None:
    for part in parts:
        with contextlib.suppress(UserError, *READ_ERRORS):  # the reader reports it
            if part.settings.csv_quoting == "auto" and quotes_are_plain(part):
                return (
                    f"{part.source.path}: quotes are taken as characters like others, because they do not enclose"
                    " whole fields; say --csv_quoting minimal if they do."
                )
    return None


def _text_unit(parts: Sequence[FilePart]) -> str | None:
    num_small = 0
    for part in parts:
        lines = _head(part)
        blocks = [list(block) for is_text, block in groupby(lines, bool) if is_text]
        but = f"{part.source.path}: each line becomes a document, but"
        if _are_wrapped(blocks):
            return f"{but} they look like wrapped text; perhaps --text_unit paragraph or --text_unit file is meant."
        if len(lines) >= MIN_LINES and len(blocks) > 2 and sum(len(block) > 1 for block in blocks) > len(blocks) / 2:
            return f"{but} they form blocks separated by empty lines; perhaps --text_unit paragraph is meant."
        num_small += part.source.size_bytes <= SMALL_BYTES and sum(map(len, blocks)) > 1
    if num_small >= MIN_SMALL_FILES and num_small > 0.8 * len(parts):
        return "Each line becomes a document, but the .txt files have few lines; perhaps --text_unit file is meant."
    return None


def _head(part: FilePart) -> list[str]:
    """The first lines without white space around them; none if the file cannot be read."""
    lines: list[str] = []
    num_chars = 0
    with contextlib.suppress(UserError, *READ_ERRORS):
        for _, line in part.lines():
            if isinstance(line, Fault) or num_chars > HEAD_CHARS:
                break
            lines.append(line.strip())
            num_chars += len(line)
    return lines


def _are_wrapped(blocks: Sequence[Sequence[str]]) -> bool:
    """Whether sentences continue from line to line, on lines that are about as long as the longest."""
    pairs = [pair for block in blocks for pair in pairwise(block)]
    continued = [len(a) for a, b in pairs if not a.endswith(SENTENCE_ENDS) and b[0].islower()]
    if len(pairs) < MIN_LINES or len(continued) < 0.4 * len(pairs):
        return False
    width = quantiles([len(line) for block in blocks for line in block], n=20)[-1]
    return 30 <= width <= 120 and sum(length > 0.7 * width for length in continued) > 0.8 * len(continued)
