"""Tables of Arrow's kinds: Parquet, and Arrow files and streams as `datasets` and Feather write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast

from cartilha.corpus.files import SourceFile, open_seekable
from cartilha.corpus.lines import MARK_INVALID, Span, damaged
from cartilha.corpus.records import FilePart, Numbered, ReadSettings, missing_column
from cartilha.errors import first_line

PARQUET_BATCH_ROWS = 256
PARQUET_BATCH_BYTES = 8 << 20  # of the text column; at least one row is read at a time
PARQUET_BUFFER_BYTES = 2**20

# Columns that are wanted -> record batches with these and perhaps others.
Batches = Callable[[list[str]], Iterator[Any]]


def read_table(part: FilePart) -> Numbered:
    """The rows of a Parquet file, or of an Arrow file or stream."""
    import pyarrow as pa

    number = part.span.first - 1
    path, settings = str(part.source.path), part.settings
    kind, opened = ("Parquet", _parquet) if part.source.format == ".parquet" else ("Arrow", _arrow)
    try:
        with open_seekable(part.source) as stream:
            names, batches = opened(part, stream)
            fault = missing_column(path, settings.text_column, names)
            if settings.domain_column is not None:
                fault = fault or missing_column(path, settings.domain_column, names, "domain")
            if fault:
                yield 0, fault
                return
            columns = [name for name in names if name in {settings.text_column, "id", *settings.domain_keys}]
            for batch in batches(columns):
                values = [_column_values(batch.column(name)) for name in columns]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, dict(zip(columns, row, strict=True))
    except pa.ArrowException as error:
        place = f"{path} cannot be read as {kind}" + (f" after row {number}" if number else "")
        yield number, damaged(f"{place} ({first_line(error)}); copy it again, rename it if it is of another kind")


def _parquet(part: FilePart, stream: Any) -> tuple[list[str], Batches]:
    import pyarrow.parquet as pq

    # With Arrow's defaults a whole column chunk, often hundreds of megabytes, is in memory.
    file = pq.ParquetFile(stream, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
    groups = list(range(file.num_row_groups)[part.span.begin :][: part.span.length])
    sizes = [_batch_rows(file.metadata.row_group(n), part.settings.text_column) for n in groups]
    rows = min([PARQUET_BATCH_ROWS, *sizes])
    return file.schema_arrow.names, lambda columns: file.iter_batches(
        batch_size=rows, row_groups=groups, columns=columns
    )


def _arrow(part: FilePart, stream: Any) -> tuple[list[str], Batches]:
    import pyarrow as pa

    try:
        file = pa.ipc.open_file(stream)
    except pa.ArrowInvalid:  # not a file with a directory at its end; perhaps a stream
        stream.seek(0)
        reader = pa.ipc.open_stream(stream)
        return reader.schema.names, lambda columns: iter(reader)
    return file.schema.names, lambda columns: map(file.get_batch, range(file.num_record_batches))


def _batch_rows(group: Any, text_column: str) -> int:
    """The number of rows of a row group whose texts take about `PARQUET_BATCH_BYTES`, if all rows are equally long."""
    columns = [group.column(number) for number in range(group.num_columns)]
    num_bytes = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)
    return max(1, int(group.num_rows * PARQUET_BATCH_BYTES // max(1, num_bytes)))


def cut_row_groups(source: SourceFile, settings: ReadSettings, target_bytes: int) -> Iterator[Span]:
    """Cut a Parquet file between its row groups; a file that cannot be read is reported when it is reached."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups = []
    with suppress(pa.ArrowException, OSError), source.path.open("rb") as stream:
        metadata = pq.read_metadata(stream)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    begin, first, rows, held = 0, 1, 0, 0
    for number, group in enumerate(groups):
        # The text is not the only column, but usually most of the file.
        num_bytes = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        if number > begin and held + num_bytes > target_bytes:
            yield Span(begin, number - begin, first, held)
            begin, first, rows, held = number, first + rows, 0, 0
        rows += group.num_rows
        held += num_bytes
    yield Span(begin, None, first, held or source.size_bytes)


def _column_values(column: Any) -> list[Any]:
    """A column's values; strings are decoded here, because Arrow stops at invalid bytes."""
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return cast(list[Any], column.to_pylist())
    values = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", MARK_INVALID) for value in values]
