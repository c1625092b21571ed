"""Which keys of a file's records name a domain: a key whose value differs in nearly every document names none.

The head of the file decides, so that the answer does not depend on how the file is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from cartilha.corpus.records import Numbered, ReadSettings, Record
from cartilha.errors import UserError, log

HEAD_RECORDS = 200
HEAD_CHARS = 1 << 20
MIN_RECORDS = 20  # with fewer, the values tell nothing
MAX_DISTINCT = 0.5  # different values, as a share of the records

_tell = lru_cache(maxsize=1024)(log.info)  # once for each file and key


def domain_keys(records: Numbered, settings: ReadSettings, path: str) -> tuple[tuple[str, ...], Numbered]:
    """Those of the keys that may hold a domain which do; and all records, of which the head was read to tell."""
    if settings.domain_column is not None:
        return settings.domain_keys, records
    head: list[tuple[int | str, Record]] = []
    num_chars = 0
    stopped_by: UserError | None = None
    try:
        for number, record in records:
            head.append((number, record))
            num_chars += len(str(record.get(settings.text_column))) if isinstance(record, Mapping) else 0
            if len(head) == HEAD_RECORDS or num_chars > HEAD_CHARS:
                break
    except UserError as error:  # raised when it is reached
        stopped_by = error

    def all_records() -> Numbered:
        yield from head
        if stopped_by:
            raise stopped_by
        yield from records

    found = []
    for key in settings.domain_keys:
        labels = [record.get(key) for _, record in head if isinstance(record, Mapping)]
        values = [label for label in labels if isinstance(label, str) and label]
        if len(values) < MIN_RECORDS or len(set(values)) <= MAX_DISTINCT * len(values):
            found.append(key)
        else:
            _tell("%s: nearly all values of %r differ: no domains, unless by --domain_column %s.", path, key, key)
    return tuple(found), all_records()
