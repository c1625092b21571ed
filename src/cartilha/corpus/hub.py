"""Datasets of the Hugging Face hub, streamed: nothing is kept on the disk, and reading can stop at any record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cartilha.corpus.sources import HubSource
from cartilha.errors import HubUnreachableError, UserError


def read_hub(source: HubSource) -> Iterator[Mapping[str, Any]]:
    """Stream the records of a dataset's split, in the hub's order.

    Raises:
        UserError: The extra `hub` is not installed.
        HubUnreachableError: The dataset, configuration or split cannot be had, or the connection broke.
    """
    try:
        import datasets
    except ImportError:
        message = f'hf:{source.name} needs the extra `hub`, which is not installed: pip install "cartilha[hub]".'
        raise UserError(message) from None
    try:
        yield from datasets.load_dataset(source.name, source.config, split=source.split, streaming=True)
    # What `datasets` and the HTTP libraries below it raise shares no base class and changes between releases. Nothing
    # of ours runs inside the `try`: what a consumer raises does not pass through a generator.
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
        raise HubUnreachableError(
            f"The dataset hf:{source.label} (split {source.split}) cannot be read from the hub"
            f" ({type(error).__name__}: {reason}); check its name and the connection, or give a local file or primer."
        ) from error
