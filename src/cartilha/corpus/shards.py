"""Sources cut into shards of about equal size, so that several processes read them, one big file included.

A shard is a pure description: any process that sees the same files reads the same documents from it, with the ids and
messages that reading the whole gives, whatever the number of shards. Text files are cut at line feeds, Parquet at row
groups, the hub's datasets at their data files. What cannot be cut (a compressed file, CSV, encodings such as UTF-16) is
one piece; small files share a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from cartilha.corpus.document import Document
from cartilha.corpus.formats import row_group_sizes
from cartilha.corpus.hub import num_data_files
from cartilha.corpus.lines import can_be_cut
from cartilha.corpus.readers import Piece, ReadCounts, ReadSettings, read_piece
from cartilha.corpus.sources import HubSource, Source, SourceFile

COUNT_BYTES = 4 << 20
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
        elif source.compression or source.size_bytes <= target_bytes:
            yield Piece(source), source.size_bytes
        elif source.format == ".parquet":
            yield from _row_groups(source, target_bytes)
        elif source.format in (".jsonl", ".ndjson") or (source.format == ".txt" and settings.text_unit == "line"):
            yield from _line_ranges(source, settings, target_bytes)
        else:
            yield Piece(source), source.size_bytes


def _row_groups(source: SourceFile, target_bytes: int) -> Iterator[tuple[Piece, int]]:
    begin, first, rows, held = 0, 1, 0, 0
    groups = row_group_sizes(source)
    for number, (num_rows, num_bytes) in enumerate(groups):
        if number > begin and held + num_bytes > target_bytes:
            yield Piece(source, begin, number, first), held
            begin, first, rows, held = number, first + rows, 0, 0
        rows += num_rows
        held += num_bytes
    # A file that cannot be read says so when it is reached.
    yield Piece(source, begin, len(groups) or None, first), held or source.size_bytes


def _line_ranges(source: SourceFile, settings: ReadSettings, target_bytes: int) -> Iterator[tuple[Piece, int]]:
    if not can_be_cut(settings.encoding):
        yield Piece(source), source.size_bytes
        return
    begin, first, position, num_lines = 0, 1, 0, 0  # `num_lines` from `begin` up to `position`
    with source.path.open("rb") as stream:
        while block := stream.read(COUNT_BYTES):
            offset = 0
            while True:
                # The first line feed at or beyond the target ends the piece.
                start = max(offset, begin + target_bytes - 1 - position)
                cut = block.find(b"\n", start) + 1 if start < len(block) else 0
                if not cut or position + cut >= source.size_bytes:
                    break
                num_lines += block.count(b"\n", offset, cut)
                yield Piece(source, begin, position + cut, first), position + cut - begin
                begin, first, num_lines, offset = position + cut, first + num_lines, 0, cut
            num_lines += block.count(b"\n", offset)
            position += len(block)
    yield Piece(source, begin, None if begin == 0 else source.size_bytes, first), source.size_bytes - begin
