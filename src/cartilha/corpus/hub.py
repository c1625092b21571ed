"""Datasets of the Hugging Face hub, streamed: nothing is kept on the disk, and reading can stop at any record."""

from __future__ import annotations

import difflib
import os
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cartilha.corpus.lines import Span
from cartilha.corpus.records import Numbered
from cartilha.corpus.sources import HubSource, OpenedDataset, Source
from cartilha.errors import HubUnreachableError, UserError, first_line, import_extra, log
from cartilha.hub import WAITS_S, ask, fault, is_passing
from cartilha.storage import read_json, write_json

NAMED_CHOICES = 40


def opened(sources: Iterable[Source], kept: Path | None = None) -> list[Source]:
    """The sources, with each dataset of the hub opened once for all that read it; raises like `read_hub`.

    The file `kept` has the commits at which an interrupted command began; new ones are written there.
    """
    commits: dict[str, str] = read_json(kept) if kept is not None and kept.is_file() else {}
    found = [
        replace(source, opened=_open(source, commits.get(source.ref))) if isinstance(source, HubSource) else source
        for source in sources
    ]
    commits |= {
        source.ref: source.opened.commit
        for source in found
        if isinstance(source, HubSource) and source.opened and source.opened.commit
    }
    if kept is not None and commits:
        write_json(kept, commits)
    return found


def num_data_files(source: HubSource) -> int:
    """The number of data files in a dataset's split, each of which can be streamed alone; raises like `read_hub`."""
    return (source.opened or _open(source)).num_files


def read_hub(source: HubSource, span: Span) -> Numbered:
    """Stream the records of some data files of a dataset's split, in the hub's order.

    Records are numbered from 1; if there are several data files, within each of them, as `FILE:ROW`, both from 1. Where
    the connection breaks, the data file is opened again and reading goes on at the next row. A UserError says that the
    extra `hub` is missing or that there is no such configuration, a HubUnreachableError that the split cannot be read.
    """
    found = source.opened or _open(source)
    for file in range(found.num_files)[span.begin :][: span.length]:
        if found.num_files > 1:
            yield from _records(source, found.dataset.shard(num_shards=found.num_files, index=file), f"{file + 1}:")
        else:
            yield from _records(source, found.dataset, "")


def _records(source: HubSource, part: Any, prefix: str) -> Numbered:
    """The records of a data file, with `prefix` before their rows."""
    row = failures = 0
    while True:
        try:
            for place, record in enumerate(part, 1):
                if place > row:
                    row, failures = place, 0
                    yield f"{prefix}{row}" if prefix else row, record
            return
        # The exceptions of `datasets` and its HTTP libraries share no base class and change between releases. An
        # exception of the consumer does not pass through the generator, so only theirs are caught here.
        except Exception as error:
            if failures == len(WAITS_S) or not is_passing(error):
                raise _unreadable(source, error, f" after row {prefix}{row}" if row else "") from error
            log.info("The connection to the hub broke after row %s%d of %s; going on there.", prefix, row, source.ref)
            time.sleep(WAITS_S[failures])
            failures += 1


def _open(source: HubSource, commit: str | None = None) -> OpenedDataset:
    """Open the dataset at a commit, or as it was asked for."""
    datasets = import_extra("datasets", f"hf:{source.name}", "hub")

    def load() -> OpenedDataset:
        builder = datasets.load_dataset_builder(source.name, source.config, revision=commit or source.revision)
        dataset = builder.as_streaming_dataset(split=source.split)
        found = None if os.path.isdir(source.name) else builder.hash
        return OpenedDataset(found, int(dataset.num_shards), dataset)

    try:
        return ask(load)
    except Exception as error:  # as above
        raise _not_there(source, error) or _unreadable(source, _connection_fault(source, error), "") from error


def _connection_fault(source: HubSource, error: Exception) -> Exception:
    """Why the hub cannot be reached, which `datasets` leaves out: its client is asked the same once more."""
    from huggingface_hub import HfApi

    if isinstance(error, ConnectionError) and fault(error) is None:
        try:
            HfApi().dataset_info(source.name)
        except Exception as reason:
            return reason if fault(reason) else error
    return error


def _not_there(source: HubSource, error: Exception) -> UserError | None:
    """The error for a dataset, revision, configuration or split that is not there, with those that are."""
    if type(error).__name__ == "DatasetNotFoundError":
        return UserError(f"{first_line(error)}; check the name, or run `hf auth login` if it is private or gated.")
    listed = re.search(r"available[^\[]*\[(.*?)\]", str(error), re.IGNORECASE | re.DOTALL)
    if not isinstance(error, ValueError) or listed is None:
        return None
    names = re.findall(r"'([^']*)'", listed[1])
    kind, asked = ("split", source.split) if "split" in str(error) else ("configuration", source.config)
    near = difflib.get_close_matches(asked or "", names, n=3)
    first = [*near, *(name for name in names if name not in near)][:NAMED_CHOICES]
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    name = source.ref.removesuffix(source.label.removeprefix(source.name))
    what = f"has no {kind} {asked!r}" if asked else f"has several {kind}s"
    form = f"{name}:{source.config or ''}:SPLIT" if kind == "split" else f"{name}:CONFIG"
    return UserError(f"The dataset {name} {what}; choose from {', '.join(first)}{more} ({form}).")


def _unreadable(source: HubSource, error: Exception, place: str) -> HubUnreachableError:
    what = f"The dataset {source.ref} (split {source.split}) cannot be read from the hub{place}"
    if (reason := fault(error)) is not None:
        return HubUnreachableError(f"{what}: {reason}; what is done is kept.")
    return HubUnreachableError(
        f"{what} ({type(error).__name__}: {first_line(error)}); check its name and the connection and run the same"
        " command again, or give a local file or primer."
    )
