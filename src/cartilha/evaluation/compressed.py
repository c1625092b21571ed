"""What general compressors make of a text, found on other cores while a model scores it, and kept from run to run."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
from collections.abc import Callable
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path

import pyarrow as pa

from cartilha.machine.devices import usable_cores
from cartilha.model_reference import cache_directory
from cartilha.storage import read_json, write_json

# Primed figures cost two compressions of the prime more, at about 1 s/MB, and the repetitions that help most are in any
# few MB: 4 MiB is a million tokens.
MAX_PRIME_BYTES = 4 << 20
# xz needs about 11.5 times its dictionary in memory: 740 MB at this one (its own preset 9).
MAX_XZ_DICTIONARY_BYTES = 64 << 20
MIN_XZ_DICTIONARY_BYTES = 8 << 20  # preset 6
# Its window is 128 MiB; at level 19, the highest without `--ultra`, it is 8 MiB, which a prime and a text soon fill.
# The window, and the memory with it, is cut to the input.
ZSTD_LEVEL = 22
MAX_KEPT = 1000  # sizes in the user's cache: six for each text


def _xz_size(data: bytes) -> int:
    """LZMA2 as `xz -6` does it, without the container's some 70 bytes.

    The dictionary grows with the input up to 64 MiB; text further back is forgotten.
    """
    dictionary = min(MAX_XZ_DICTIONARY_BYTES, max(MIN_XZ_DICTIONARY_BYTES, 1 << (len(data) - 1).bit_length()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


def _zstd_size(data: bytes) -> int:
    """Level 22; text further back than its window of 128 MiB is forgotten."""
    return int(pa.Codec("zstd", compression_level=ZSTD_LEVEL).compress(data).size)


# Bytes of the compressed form. Each takes about 1 s/MB, and releases Python's lock meanwhile.
COMPRESSED_SIZE: dict[str, Callable[[bytes], int]] = {"xz": _xz_size, "zstd": _zstd_size}


class CompressedText:
    """What xz and zstd make of a text: alone, and behind a prime that was read before and costs nothing.

    The primed figure is that of size(prime + text) - size(prime), for the last `MAX_PRIME_BYTES` of the prime. The work
    begins in the background at once, on half of the cores: the other half is the model's. Sizes are kept in the user's
    cache under hashes of what was compressed, since a store may be read-only, or come from somebody else.

    An empty text has no figures. `prime_key` identifies the prime (None: there is none), and `prime` gives it; that is
    called only where a size is not known.
    """

    def __init__(self, text: bytes, prime_key: str | None, prime: Callable[[], bytes]) -> None:
        self._text, self._has_prime = text, prime_key is not None
        text_key = hashlib.sha256(text).hexdigest()
        keys = {"text": text_key}
        if self._has_prime:  # in the order of compression, the longest first
            keys = {"both": f"{prime_key} {text_key}", "prime": prime_key or "", "text": text_key}
        self._keys = {(name, part): _key(name, key) for part, key in keys.items() for name in COMPRESSED_SIZE if text}
        self._known = _read_kept()
        missing = [place for place, key in self._keys.items() if key not in self._known]
        self._found: dict[tuple[str, str], AsyncResult[int]] = {}
        if missing:
            # The pool's threads end with the process, so that an interrupted evaluation does not wait for them.
            pool = ThreadPool(min(len(missing), max(1, usable_cores() // 2)))
            self._prime = pool.apply_async(prime) if any(part != "text" for _, part in missing) else None
            self._found = {place: pool.apply_async(self._size, place) for place in missing}
            pool.close()

    def figures(self) -> dict[str, dict[str, float | None]]:
        """Bits per byte and bytes by name: `xz` and `zstd`, and both `_primed`. Waits for the compressors."""
        size = {place: self._known[key] for place, key in self._keys.items() if place not in self._found}
        size |= {place: result.get() for place, result in self._found.items()}
        with contextlib.suppress(OSError):  # without a cache the next evaluation compresses again
            ours = {key: size[place] for place, key in self._keys.items()}
            kept = {key: size for key, size in _read_kept().items() if key not in ours}
            write_json(_kept_path(), dict([*kept.items(), *ours.items()][-MAX_KEPT:]))
        found: dict[str, dict[str, float | None]] = {}
        for name in COMPRESSED_SIZE if self._text else ():
            sizes = {name: size[name, "text"]}
            if self._has_prime:
                sizes[f"{name}_primed"] = size[name, "both"] - size[name, "prime"]
            for title, num_bytes in sizes.items():
                found[title] = {"bits_per_byte": 8 * num_bytes / len(self._text), "num_bytes": len(self._text)}
        return found

    def _size(self, name: str, part: str) -> int:
        prime = b"" if part == "text" or self._prime is None else self._prime.get()[-MAX_PRIME_BYTES:]
        return COMPRESSED_SIZE[name](prime if part == "prime" else prime + self._text)


def _key(name: str, key: str) -> str:
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
