"""Which keys of a file's records name a domain: a key whose value differs in nearly every document names none.

The head of the file decides, so that the answer does not depend on how the file is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache

from cartilha.corpus.records import Numbered, ReadSettings, Record
from cartilha.errors import UserError

log = logging.getLogger("cartilha")

HEAD_RECORDS = 200
HEAD_CHARS = 1 << 20
MIN_RECORDS = 20  # with fewer, the values tell nothing
MAX_DISTINCT = 0.5  # different values, as a share of the records


def read_head(records: Numbered, text_column: str) -> tuple[list[Record], Numbered]:
    """The first records of a file, and then all of them; an error among the first is raised when it is reached."""
    head: list[tuple[int | str, Record]] = []
    num_chars = 0
    stopped_by: UserError | None = None

    def all_records() -> Numbered:
        yield from head
        if stopped_by:
            raise stopped_by
        yield from records

    try:
        for number, record in records:
            head.append((number, record))
            num_chars += len(str(record.get(text_column))) if isinstance(record, Mapping) else 0
            if len(head) == HEAD_RECORDS or num_chars > HEAD_CHARS:
                break
    except UserError as error:
        stopped_by = error
    return [record for _, record in head], all_records()


def keys_of_domains(records: Sequence[Record], settings: ReadSettings, path: str) -> tuple[str, ...]:
    """Those of the keys that may hold a domain which do."""
    if settings.domain_column is not None:
        return settings.domain_keys
    found = []
    for key in settings.domain_keys:
        labels = [record.get(key) for record in records if isinstance(record, Mapping)]
        values = [label for label in labels if isinstance(label, str) and label]
        if len(values) < MIN_RECORDS or len(set(values)) <= MAX_DISTINCT * len(values):
            found.append(key)
        else:
            _tell(path, key)
    return tuple(found)


@lru_cache(maxsize=1024)
def _tell(path: str, key: str) -> None:
    """Log it once for each file."""
    log.info("%s: nearly all values of %r differ, so it names no domain; --domain_column %s takes it.", path, key, key)
