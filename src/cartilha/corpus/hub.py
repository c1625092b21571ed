"""Datasets of the Hugging Face hub, streamed: nothing is kept on the disk, and reading can stop at any record."""

from __future__ import annotations

from typing import Any

from cartilha.corpus.lines import Span
from cartilha.corpus.records import Numbered
from cartilha.corpus.sources import HubSource
from cartilha.errors import HubUnreachableError, first_line, import_extra


def num_data_files(source: HubSource) -> int:
    """The number of data files in a dataset's split, each of which can be streamed alone; raises like `read_hub`."""
    return _load(source)[1]


def read_hub(source: HubSource, span: Span) -> Numbered:
    """Stream the records of some data files of a dataset's split, in the hub's order.

    Records are numbered from 1; if there are several data files, within each of them, as `FILE:ROW`, both from 1. A
    UserError says that the extra `hub` is missing, a HubUnreachableError that the split cannot be loaded or the
    connection broke.
    """
    dataset, num_files = _load(source)
    number: int | str = 0
    try:
        for file in range(num_files)[span.begin :][: span.length]:
            part = dataset.shard(num_shards=num_files, index=file) if num_files > 1 else dataset
            for row, record in enumerate(part, 1):
                number = f"{file + 1}:{row}" if num_files > 1 else row
                yield number, record
    # The exceptions of `datasets` and its HTTP libraries share no base class and change between releases. An exception
    # of the consumer does not pass through the generator, so only theirs are caught here.
    except Exception as error:
        raise _unreachable(source, error, f" after row {number}" if number else "") from error


def _load(source: HubSource) -> tuple[Any, int]:
    """The dataset, and how many data files it has."""
    datasets = import_extra("datasets", f"hf:{source.name}", "hub")
    try:
        dataset = datasets.load_dataset(source.name, source.config, split=source.split, streaming=True)
    except Exception as error:  # as above
        raise _unreachable(source, error, "") from error
    return dataset, int(getattr(dataset, "num_shards", 1))


def _unreachable(source: HubSource, error: Exception, place: str) -> HubUnreachableError:
    return HubUnreachableError(
        f"The dataset hf:{source.label} (split {source.split}) cannot be read from the hub{place}"
        f" ({type(error).__name__}: {first_line(error)}); check its name and the connection and run the same command"
        " again, or give a local file or primer."
    )
