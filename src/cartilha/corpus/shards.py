"""Sources cut into shards of about equal size, so that several processes read them, one big file included.

A shard is a pure description: any process that sees the same files reads the same documents from it, with the ids and
messages that reading the whole gives, whatever the number of shards. Where a file can be cut is its format's to say;
the hub's datasets are cut at their data files. What cannot be cut (a compressed file, CSV, encodings such as UTF-16) is
one piece; small files share a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from cartilha.corpus.document import Document
from cartilha.corpus.files import SourceFile
from cartilha.corpus.formats import spans
from cartilha.corpus.hub import num_data_files
from cartilha.corpus.readers import Piece, ReadCounts, read_piece
from cartilha.corpus.records import ReadSettings
from cartilha.corpus.sources import HubSource, Source

HUB_FILE_BYTES = 1 << 40  # unknown, and enough to be a shard by itself


@dataclass(frozen=True)
class Shard:
    """A part of the input, in the input's order.

    Attributes:
        number: From 0, in order.
        pieces: What to read.
        num_bytes: Its size on the disk, 0 where that is not known.
    """

    number: int
    pieces: tuple[Piece, ...]
    num_bytes: int


def shards(sources: Iterable[Source], settings: ReadSettings, target_bytes: int = 32 << 20) -> list[Shard]:
    """Cut sources into shards of about `target_bytes`; text files that are cut are read once to count their lines.

    Args:
        sources: As `resolve_inputs` gives them.
        settings: How they will be read, which decides where they can be cut.
        target_bytes: Size of a shard on the disk.
    """
    found: list[Shard] = []
    pieces: list[Piece] = []
    held = 0
    for piece, num_bytes in _pieces(sources, settings, target_bytes):
        if pieces and held + num_bytes > target_bytes:
            found.append(Shard(len(found), tuple(pieces), held if held < HUB_FILE_BYTES else 0))
            pieces, held = [], 0
        pieces.append(piece)
        held += num_bytes
    if pieces:
        found.append(Shard(len(found), tuple(pieces), held if held < HUB_FILE_BYTES else 0))
    return found


def read_shard(shard: Shard, settings: ReadSettings, counts: ReadCounts | None = None) -> Iterator[Document]:
    """Stream the documents of a shard, in order.

    Args:
        shard: What to read.
        settings: How.
        counts: Filled as documents are read.

    Raises:
        UserError: It cannot be read, or changed since its source was found.
    """
    found = ReadCounts() if counts is None else counts
    for piece in shard.pieces:
        yield from read_piece(piece, settings, found)


def shuffled(found: list[Shard], seed: int) -> list[Shard]:
    """The shards in an order drawn from the seed, so that a limit takes documents from everywhere, not from the head.

    Documents of one shard stay together and in order.
    """
    order = Random(seed).sample(found, len(found))
    return [Shard(number, shard.pieces, shard.num_bytes) for number, shard in enumerate(order)]


def _pieces(sources: Iterable[Source], settings: ReadSettings, target_bytes: int) -> Iterator[tuple[Piece, int]]:
    for source in sources:
        if isinstance(source, HubSource):
            yield from ((Piece(source, number, number + 1), HUB_FILE_BYTES) for number in range(num_data_files(source)))
        elif not isinstance(source, SourceFile):
            yield Piece(source), 0
        else:
            yield from ((Piece(source, *span[:3]), span.num_bytes) for span in spans(source, settings, target_bytes))
