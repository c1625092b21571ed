"""Sources cut into shards of about equal size, so that several processes can read them, even a single large file.

Any process that sees the same files reads the same documents from a shard, with the same ids and messages as from the
whole. What cannot be cut (a compressed file, CSV, encodings such as UTF-16) is one part; small files share a shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random

from cartilha.corpus.files import SourceFile
from cartilha.corpus.formats import spans
from cartilha.corpus.hub import num_data_files
from cartilha.corpus.lines import Span
from cartilha.corpus.readers import SourcePart
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.sources import HubSource, Source

HUB_FILE_BYTES = 1 << 40  # not known; enough to be a shard alone


@dataclass(frozen=True)
class Shard:
    """A part of the input; `number` counts from 0 in the order of the input."""

    number: int
    parts: tuple[SourcePart, ...]

    @property
    def num_bytes(self) -> int:
        """Its size on the disk, 0 if not known."""
        size = sum(part.span.num_bytes for part in self.parts)
        return size if size < HUB_FILE_BYTES else 0


def shards(sources: Iterable[Source], settings: ReadSettings, target_bytes: int = 32 << 20) -> list[Shard]:
    """Cut sources into shards of about `target_bytes` on the disk."""
    groups: list[list[SourcePart]] = []
    held = 0
    for source in sources:
        for span in _spans(source, settings, target_bytes):
            if not groups or held + span.num_bytes > target_bytes:
                groups.append([])
                held = 0
            groups[-1].append(SourcePart(source, span))
            held += span.num_bytes
    return [Shard(number, tuple(parts)) for number, parts in enumerate(groups)]


def _spans(source: Source, settings: ReadSettings, target_bytes: int) -> Iterable[Span]:
    if isinstance(source, HubSource):
        return (Span(number, 1, num_bytes=HUB_FILE_BYTES) for number in range(num_data_files(source)))
    return spans(source, settings, target_bytes) if isinstance(source, SourceFile) else [Span()]


def shuffled(found: list[Shard], seed: int) -> list[Shard]:
    """The shards in an order drawn from the seed, so that a limit takes documents from everywhere."""
    return [replace(shard, number=number) for number, shard in enumerate(Random(seed).sample(found, len(found)))]
