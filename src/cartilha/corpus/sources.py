"""What a REF names: files, globs, folders, the primer and hub datasets, found in a fixed order before any is read."""

from __future__ import annotations

import difflib
import glob
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cartilha.corpus.files import SourceFile
from cartilha.corpus.formats import READABLE, is_readable
from cartilha.corpus.primer import primer_sha256
from cartilha.errors import UserError

log = logging.getLogger("cartilha")


@dataclass(frozen=True)
class HubSource:
    """A split of a hub dataset: `hf:NAME[:CONFIG[:SPLIT]]`."""

    name: str
    config: str | None = None
    split: str = "train"

    @property
    def label(self) -> str:
        """How its documents name their source: `NAME[:CONFIG]`, and the split where it is not the usual one."""
        parts = (self.name, self.config, self.split if self.split != "train" else None)
        return ":".join(part for part in parts if part)


@dataclass(frozen=True)
class PrimerSource:
    """The texts that ship with the package; the hash changes where a new version of the package changes them."""

    sha256: str


Source = SourceFile | HubSource | PrimerSource


def resolve_inputs(refs: Sequence[str | Source]) -> list[Source]:
    """Expand REFs in the order given; what a glob or folder holds is sorted by path.

    A path that exists wins over other readings of the same string. A folder stands for the files in it that can be
    read by their suffix, subfolders included; hidden files and links to folders are left out. A glob stands for the
    files that match, and each must be readable. What is named twice is read once, which is logged.

    Args:
        refs: REFs as the command line has them; sources that were resolved before pass through.

    Raises:
        UserError: A REF names nothing, or something that is not read.
    """
    found: dict[Path | Source, Source] = {}
    repeated: list[str] = []
    for ref in refs:
        for source in _resolve(ref) if isinstance(ref, str) else [ref]:
            key = source.path.resolve() if isinstance(source, SourceFile) else source
            if key in found:
                repeated.append(str(source.path if isinstance(source, SourceFile) else ref))
            else:
                found[key] = source
    if repeated:
        more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        log.warning("The input names %s%s more than once: read once.", repeated[0], more)
    return list(found.values())


def _resolve(ref: str) -> list[Source]:
    status = _status(ref)
    if status is not None:
        if ref == "primer" or ref.startswith("hf:"):
            log.warning("%s is read from the path of that name, which exists here.", ref)
        return _folder(ref) if stat.S_ISDIR(status.st_mode) else [_file(ref)]
    if ref == "primer":
        return [PrimerSource(primer_sha256())]
    if ref.startswith("hf:"):
        name, config, split = (*ref.removeprefix("hf:").split(":", 2), "", "")[:3]
        if not name:
            raise UserError(f"{ref} names no dataset; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT.")
        return [HubSource(name, config or None, split or "train")]
    if any(sign in ref for sign in "*?["):
        files = sorted((path for path in glob.glob(ref, recursive=True) if os.path.isfile(path)), key=_in_order)
        if files:
            return [_file(path) for path in files]
        raise UserError(f"No file matches {ref}; {_remedy(ref)}.")
    raise UserError(f"There is no file {ref!r}; {_remedy(ref)}.")


def _status(ref: str) -> os.stat_result | None:
    try:
        return os.stat(ref)
    except PermissionError:
        raise UserError(
            f"{ref} cannot be looked at: permission denied; change the permissions of its folder."
        ) from None
    except (OSError, ValueError):  # not there, or no possible name (too long, a NUL in it)
        return None


def _file(path: str) -> SourceFile:
    if not is_readable(path):
        raise UserError(f"{path} is of a kind that is not read; rename or convert it to one of {READABLE}.")
    status = _status(path)
    if status is None:
        raise UserError(f"{path} is a link that leads nowhere; remove it or put its file back.")
    return SourceFile(Path(path), status.st_size, status.st_mtime_ns)


def _folder(folder: str) -> list[Source]:
    files = sorted((path for path in _walk(folder) if is_readable(path)), key=_in_order)
    if not files:
        raise UserError(f"The folder {folder} holds no file that can be read; give one with {READABLE}.")
    return [_file(path) for path in files]


def _walk(folder: str) -> Iterator[str]:
    """Paths of all files below a folder that are not hidden."""

    def stop(error: OSError) -> None:
        raise UserError(f"The folder {error.filename} cannot be listed ({error.strerror}); change its permissions.")

    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _in_order(path: str) -> tuple[str, ...]:
    """Sorts alike on every system, and a folder's files together."""
    return Path(path).parts


def _remedy(ref: str) -> str:
    """What to write instead of a path that is not there."""
    parent, name = os.path.split(ref)
    try:
        near = difflib.get_close_matches(name, sorted(os.listdir(parent or ".")), n=1)
    except (OSError, ValueError):
        near = []
    if near:
        return f"perhaps {os.path.join(parent, near[0])} is meant"
    return "give a file, a glob in quotes, a folder, hf:NAME for a dataset of the hub, or primer"
