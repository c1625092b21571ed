"""What general compressors make of a text, found on other cores while a model scores it, and kept from run to run."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from cartilha.evaluation.baselines import COMPRESSED_SIZE, MAX_PRIME_BYTES
from cartilha.machine.devices import usable_cores
from cartilha.model_reference import cache_directory
from cartilha.storage import read_json, write_json

MAX_KEPT = 1000  # sizes in the user's cache: six for each text


class CompressedText:
    """The sizes of a text under xz and zstd, alone and behind a prime: see `baselines.xz_bits_per_byte`.

    The work begins in the background at once, for compressors need no lock of Python's. Sizes are kept in the user's
    cache under hashes of what was compressed: a store may be read-only, or come from somebody else.

    Args:
        text: UTF-8; of an empty one there are no figures.
        prime_key: What identifies the text that was read before; None where there is none.
        prime: Gives that text; called only where a size is not known.
    """

    def __init__(self, text: bytes, prime_key: str | None, prime: Callable[[], bytes]) -> None:
        self._text, self._prime, self._has_prime = text, prime, prime_key is not None
        text_key = hashlib.sha256(text).hexdigest()
        keys = {"text": text_key, "prime": prime_key, "both": f"{prime_key} {text_key}"}
        parts = ("text", "prime", "both") if self._has_prime else ("text",)
        self._keys = {(name, part): _key(name, keys[part]) for name in COMPRESSED_SIZE for part in parts if text}
        self._known = _read_kept()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._begin, daemon=True)]
        self._threads[0].start()

    def figures(self) -> dict[str, dict[str, float | None]]:
        """Bits per byte and bytes by name: `xz` and `zstd`, and both `_primed`. Waits for the compressors."""
        for thread in self._threads:  # the first one adds the others
            thread.join()
        if self._error is not None:
            raise self._error
        with contextlib.suppress(OSError):  # without a cache the next evaluation compresses again
            ours = {key: self._known[key] for key in self._keys.values()}
            kept = {key: size for key, size in _read_kept().items() if key not in ours}
            write_json(_kept_path(), dict([*kept.items(), *ours.items()][-MAX_KEPT:]))
        size = {place: self._known[key] for place, key in self._keys.items()}
        found: dict[str, dict[str, float | None]] = {}
        for name in COMPRESSED_SIZE if self._text else ():
            sizes = {name: size[name, "text"]}
            if self._has_prime:
                sizes[f"{name}_primed"] = size[name, "both"] - size[name, "prime"]
            for title, num_bytes in sizes.items():
                found[title] = {"bits_per_byte": 8 * num_bytes / len(self._text), "num_bytes": len(self._text)}
        return found

    def _begin(self) -> None:
        """Compress what is not known yet, on half of the cores: the other half is the model's."""
        try:
            missing = [place for place, key in self._keys.items() if key not in self._known]
            parts = {"text": self._text}
            if any(part != "text" for _, part in missing):
                prime = self._prime()[-MAX_PRIME_BYTES:]
                parts |= {"prime": prime, "both": prime + self._text}
            jobs: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
            for place in sorted(missing, key=lambda place: -len(parts[place[1]])):
                jobs.put(place)
            others = max(1, usable_cores() // 2) - 1
            for _ in range(min(others, len(missing) - 1)):
                self._threads.append(threading.Thread(target=self._work, args=(jobs, parts), daemon=True))
                self._threads[-1].start()
            self._work(jobs, parts)
        except BaseException as error:  # raised where the figures are asked for
            self._error = error

    def _work(self, jobs: queue.SimpleQueue[tuple[str, str]], parts: dict[str, bytes]) -> None:
        try:
            while not jobs.empty():
                name, part = jobs.get_nowait()
                self._known[self._keys[name, part]] = COMPRESSED_SIZE[name](parts[part])
        except queue.Empty:  # another thread was faster
            pass
        except BaseException as error:
            self._error = error


def _key(name: str, key: str | None) -> str:
    """The same for the same bytes under the same compressor."""
    parts = [name, key, MAX_PRIME_BYTES, pa.__version__]
    return hashlib.sha256(" ".join(map(str, parts)).encode("ascii")).hexdigest()


def _kept_path() -> Path:
    return cache_directory() / "compressed.json"


def _read_kept() -> dict[str, int]:
    try:
        kept = read_json(_kept_path())
    except (OSError, ValueError):
        return {}
    return {key: size for key, size in kept.items() if isinstance(size, int)} if isinstance(kept, dict) else {}
