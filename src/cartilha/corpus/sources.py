"""What a REF names: files, globs, folders, the primer and hub datasets; found in a fixed order before any is read."""

from __future__ import annotations

import difflib
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

from cartilha.corpus.files import SourceFile, split_name
from cartilha.corpus.formats import READABLE, is_readable
from cartilha.corpus.primer import primer_languages, primer_sha256
from cartilha.errors import UserError, counted, log
from cartilha.languages import DEFAULT
from cartilha.settings import Settings, options
from cartilha.storage import as_on_disk, listed, read_json

LeftOut = dict[str, list[str]]  # files in folders that are not read, as paths below the folder, by reason

OTHER_KIND = "of a kind that is not read"
NAMED_FILES = 5
# Files that `datasets` writes beside the data.
DATASET_RECORDS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
# Datasets that had a name of one word on the hub, and where they are now.
OLD_NAMES = {
    **dict.fromkeys(("c4", "mc4"), "allenai/c4"),
    **{"bookcorpus": "bookcorpus/bookcorpus", "cc100": "statmt/cc100", "culturax": "uonlp/CulturaX"},
    **{"fineweb": "HuggingFaceFW/fineweb", "fineweb-2": "HuggingFaceFW/fineweb-2", "oscar": "oscar-corpus/oscar"},
    **{"wikipedia": "wikimedia/wikipedia", "wikitext": "Salesforce/wikitext"},
}
STORE_FILES = ("store.json", "train.tokens")  # by which a token store is recognised


@dataclass(frozen=True)
class OpenedDataset:
    """A dataset as it was found: its commit (None for a local one), and its data files for any process to stream."""

    commit: str | None
    num_files: int
    dataset: Any  # an IterableDataset, which can be sent to other processes


@dataclass(frozen=True)
class HubSource:
    """A split of a hub dataset: `hf:NAME[@REVISION][:CONFIG[:SPLIT]]`; `corpus.hub.opened` opens it."""

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    opened: OpenedDataset | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        """How its documents name their source: `NAME[:CONFIG]`, and the split where it is not the usual one."""
        parts = (self.name, self.config, self.split if self.split != "train" else None)
        return ":".join(filter(None, parts))

    @property
    def ref(self) -> str:
        """The label with the revision that was asked for, as records and messages have it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.name}{revision}{self.label.removeprefix(self.name)}"


@dataclass(frozen=True)
class PrimerSource:
    """The texts that ship with the package; the hash changes where a new version of the package changes them."""

    sha256: str
    language: str = DEFAULT

    @property
    def name(self) -> str:
        """How it is asked for."""
        return "primer" if self.language == DEFAULT else f"primer:{self.language}"


Source = SourceFile | HubSource | PrimerSource


def resolve_inputs(refs: Sequence[str | Source], left_out: LeftOut | None = None) -> list[Source]:
    """Expand REFs in the order given; files of a glob or folder are sorted by path. Resolved sources pass through.

    A path that exists wins over other meanings of the same string. A folder stands for all files below it with a
    readable suffix; a dataset written by `save_to_disk` for the files that it lists. Its other files are logged and put
    into `left_out`, except a dataset's records and what is hidden. A file named twice is read once, which is logged. A
    UserError says that a REF names nothing, or something of which all or the larger part is not read.
    """
    found: dict[Path | Source, Source] = {}
    repeated: list[str] = []
    for ref in refs:
        for source in _resolve(ref, {} if left_out is None else left_out) if isinstance(ref, str) else [ref]:
            path = source.path if isinstance(source, SourceFile) else None
            key = path.resolve() if path else source
            if key in found:
                repeated.append(str(path or ref))
            found.setdefault(key, source)
    if repeated:
        more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        log.warning("The input names %s%s more than once: read once.", repeated[0], more)
    return _with_distinct_names(list(found.values()))


def refuse_to_write_over(sources: Sequence[Source], config: Settings) -> None:
    """Refuse, with a UserError, an option of a file to write that names one of these texts, or the file of another."""
    files = [source.path.resolve() for source in sources if isinstance(source, SourceFile)]
    taken = dict.fromkeys(files, "is a text that is read")
    for item in options(type(config)):
        value = getattr(config, item.name)
        if "writes" in item.metadata and value:
            if what := taken.get(path := Path(value).resolve()):
                raise UserError(f"--{item.name} {value} {what}; choose another name.")
            taken[path] = f"is the file of --{item.name} too"


def _with_distinct_names(sources: list[Source]) -> list[Source]:
    """Add parent folders to the names of files until all names differ, and set the domain of each file."""
    names = {source: source.name for source in sources if isinstance(source, SourceFile)}
    while len(set(names.values())) < len(names):
        parts = {file: Path(os.path.abspath(file.path)).parts for file in names}
        names = {file: "/".join(parts[file][-2 - name.count("/") :]) for file, name in names.items()}
    domains = {file: file.domain or os.path.dirname(name) or file.stem for file, name in names.items()}
    return [
        replace(source, name=names[source], domain=domains[source]) if isinstance(source, SourceFile) else source
        for source in sources
    ]


def _resolve(ref: str, left_out: LeftOut) -> list[Source]:
    on_disk = as_on_disk(ref)
    ref = on_disk if glob.has_magic(ref) or os.path.lexists(on_disk) else ref
    status = _status(ref)
    if status is not None:
        if ref == "primer" or ref.startswith("hf:"):
            log.warning("%s is read from the path of that name, which exists here.", ref)
        return _folder(ref, left_out) if stat.S_ISDIR(status.st_mode) else [_file(ref)]
    if ref == "primer" or ref.startswith("primer:"):
        return [_primer_source(ref)]
    if ref.startswith("hf:"):
        return [_hub_source(ref)]
    is_glob = glob.has_magic(ref)
    if is_glob and (files := _matching(ref)):
        return list(files)
    what = f"No file matches {ref}" if is_glob else f"There is no file {ref!r}"
    raise UserError(f"{what}; {_remedy(ref)}.")


def _primer_source(ref: str) -> PrimerSource:
    language = ref.removeprefix("primer").removeprefix(":") or DEFAULT
    if language not in primer_languages():
        raise UserError(f"There is no {ref}; the primers that ship are in {', '.join(primer_languages())}.")
    return PrimerSource(primer_sha256(language), language)


def _hub_source(ref: str) -> HubSource:
    named, config, split = (*ref.removeprefix("hf:").split(":", 2), "", "")[:3]
    name, _, revision = (named, "", "") if os.path.isdir(named) else named.partition("@")
    if not name:
        raise UserError(
            f"{ref} names no dataset; write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or hf:OWNER/NAME:CONFIG:SPLIT."
        )
    if "/" not in name and not os.path.isdir(name):
        new = OLD_NAMES.get(name.lower())
        meant = f"perhaps hf:{':'.join([new, *ref.split(':')[2:]])} is meant" if new else f"look {name} up on the hub"
        raise UserError(f"The name of a dataset on the hub has two parts, OWNER/NAME, and {name} has one; {meant}.")
    return HubSource(name, config or None, split or "train", revision or None)


def _matching(pattern: str) -> list[SourceFile]:
    """The files that a glob matches, however its accents are written."""
    parts = Path(pattern).parts
    num_plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root, below = os.path.join("", *parts[:num_plain]), os.path.join(*parts[num_plain:])
    forms = {below, normalize("NFC", below), normalize("NFD", below)}
    paths = {path for form in forms for path in glob.glob(os.path.join(root, form), recursive=True)}
    return [_file(path, root) for path in sorted(filter(os.path.isfile, paths), key=_in_order)]


def _status(ref: str) -> os.stat_result | None:
    try:
        return os.stat(ref)
    except PermissionError:
        raise UserError(f"{ref} cannot be read: permission denied; change the permissions of its folder.") from None
    except (OSError, ValueError):  # not there, or no possible name (too long, a NUL in it)
        return None


def _file(path: str, root: str | None = None) -> SourceFile:
    """The file; `root` is the folder that the input stands for, None if the input is the file itself."""
    if not is_readable(path):
        raise UserError(f"{path} is of a kind that is not read; rename or convert it to one of {READABLE}.")
    status = _status(path)
    if status is None:
        raise UserError(f"{path} is a link that leads nowhere; remove it or put its file back.")
    name = os.path.basename(path) if root is None else Path(os.path.relpath(path, root or ".")).as_posix()
    parts = split_name(os.path.basename(path))
    return SourceFile(Path(path), status.st_size, status.st_mtime_ns, *parts, name, os.path.dirname(name))


def _folder(folder: str, left_out: LeftOut) -> list[Source]:
    if all(os.path.isfile(os.path.join(folder, name)) for name in STORE_FILES):
        raise UserError(
            f"The folder {folder} is a token store, not text; name the text that it was made from (cartilha inspect"
            " says which), or give the store to a command that takes it as --store."
        )
    by_reason: LeftOut = {}
    for path, reason in sorted(_walk(folder), key=lambda found: _in_order(found[0])):
        by_reason.setdefault(reason, []).append(path)
    files = [_file(path, folder) for path in by_reason.pop("", [])]
    others = by_reason.get(OTHER_KIND, [])
    if not files:
        there = f", only {_named(others)}" if others else ""
        raise UserError(f"The folder {folder} holds no file that can be read{there}; give one with {READABLE}.")
    num_bytes, num_others = sum(file.size_bytes for file in files), sum(os.lstat(path).st_size for path in others)
    if num_others > num_bytes:
        pattern = os.path.join(folder, "**", f"*{files[0].format}{files[0].compression}")
        raise UserError(
            f"The larger part of the folder {folder} cannot be read: {num_others:,} bytes are {OTHER_KIND}"
            f" ({_named(others)}), {num_bytes:,} bytes can be; unpack or convert the others, or name what is to be read"
            f" by a glob in quotes, such as {pattern!r}."
        )
    for reason, paths in by_reason.items():
        log.warning("Left out of the folder %s, %s: %s.", folder, reason, _named(paths))
        left_out.setdefault(reason, []).extend(os.path.relpath(path, folder) for path in paths)
    return list(files)


def _in_order(path: str) -> tuple[str, ...]:
    """A sort key that is the same on every system and keeps the files of a folder together."""
    return Path(path).parts


def _named(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - NAMED_FILES:,} more" if len(paths) > NAMED_FILES else ""
    return f"{counted(len(paths), 'file')} ({', '.join(paths[:NAMED_FILES])}{more})"


def _walk(folder: str) -> Iterator[tuple[str, str]]:
    """Paths below a folder, each with the reason why it is not read, or an empty one."""

    def stop(error: OSError) -> None:
        raise UserError(f"The folder {error.filename} cannot be listed ({error.strerror}); change its permissions.")

    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = [os.path.join(parent, name) for name in folders]
        yield from ((path, "links to folders") for path in filter(os.path.islink, below))
        listed = _dataset_files(parent) if "state.json" in names else None
        for name in names:
            reason = _why_left_out(name, listed)
            if reason is not None:
                yield os.path.join(parent, name), reason


def _why_left_out(name: str, listed: set[str] | None) -> str | None:
    """The reason, empty if the file is read; None if nobody would take it for text."""
    is_hidden = name.startswith(".")
    if name in DATASET_RECORDS or (is_hidden and not is_readable(name)):
        return None
    if not is_readable(name):
        return OTHER_KIND
    if is_hidden:
        return "hidden"
    return "" if listed is None or name in listed else "not listed in state.json as part of the dataset"


def _dataset_files(folder: str) -> set[str] | None:
    """The files of a dataset written by `save_to_disk`; None if state.json is of another kind."""
    try:
        return {str(entry["filename"]) for entry in read_json(Path(folder, "state.json"))["_data_files"]}
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _remedy(ref: str) -> str:
    """What to write instead of a path that does not exist."""
    parent, name = os.path.split(ref)
    if near := difflib.get_close_matches(name, listed(parent), n=1):
        return f"perhaps {os.path.join(parent, near[0])} is meant"
    return "give a file, a glob in quotes, a folder, hf:NAME for a dataset of the hub, or primer"
