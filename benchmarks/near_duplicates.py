"""Planted near-duplicates found, false ones, and the speed: `python benchmarks/near_duplicates.py [--input FILE...]`.

Documents are the primer's texts and the texts of at least MIN_WORDS words of the files given, or of `shared/text`
beside the checkout. Each gets a copy with 5, 10 or 15 % of its words replaced by words of the corpus. A copy is found
where it is in its original's cluster. A document is falsely clustered where none of its cluster, its copy included,
shares `FALSE_BELOW` of its word trigrams (exactly counted).
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import time
from pathlib import Path
from unicodedata import normalize

import numpy as np

from cartilha.corpus.near_duplicates import MIN_SIMILARITY, cluster
from cartilha.corpus.readers import read_documents
from cartilha.corpus.signatures import save_signatures, signatures

SHARES = (0.05, 0.10, 0.15)
MIN_WORDS = 50
FALSE_BELOW = MIN_SIMILARITY
BATCH = 256


def with_changes(text: str, share: float, words: list[str], generator: random.Random) -> str:
    changed = text.split()
    for place in generator.sample(range(len(changed)), round(share * len(changed))):
        changed[place] = generator.choice(words)
    return " ".join(changed)


def corpus(refs: list[str]) -> list[str]:
    found = dict.fromkeys(document.text for document in read_documents(["primer"]))
    found |= dict.fromkeys(d.text for d in read_documents(refs) if len(d.text.split()) >= MIN_WORDS)
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="*", default=None)
    parser.add_argument("--repeat", type=int, default=1, help="plant so many copies of each document, for the speed")
    arguments = parser.parse_args()
    shared = Path(__file__).resolve().parents[2] / "shared" / "text"
    refs = arguments.input if arguments.input is not None else [str(path) for path in sorted(shared.glob("*.txt"))]
    texts = corpus(refs)
    generator = random.Random(0)
    words = [word for text in texts for word in text.split()]
    copies = [
        with_changes(text, SHARES[(i + round_) % len(SHARES)], words, generator)
        for round_ in range(arguments.repeat)
        for i, text in enumerate(texts)
    ]
    both = texts + copies
    num_bytes = sum(len(text.encode("utf-8")) for text in both)
    print(f"{len(texts):,} documents and {len(copies):,} copies, {num_bytes / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter(), time.process_time()
        files = []
        for begin in range(0, len(both), 64 * BATCH):
            values = [signatures(both[i : i + BATCH]) for i in range(begin, min(begin + 64 * BATCH, len(both)), BATCH)]
            files.append(Path(folder) / f"{begin}.npy")
            save_signatures(files[-1], np.concatenate(values))
        signed = time.perf_counter(), time.process_time()
        found = cluster(files)
        ended = time.perf_counter()
        disk = sum(file.stat().st_size for file in files)
    rate = num_bytes / 1e6 / (signed[1] - began[1])
    print(f"signatures {rate:.0f} MB/s a core, {disk / len(both):.0f} bytes a document")
    print(f"clusters   {ended - signed[0]:.1f} s, {len(both) / (ended - signed[0]):,.0f} documents/s")
    number = np.arange(len(copies))
    together = found[len(texts) :] == found[number % len(texts)]
    for k, share in enumerate(SHARES):
        chosen = (number + number // len(texts)) % len(SHARES) == k
        print(f"found with {share:.0%} of the words changed: {together[chosen].mean():.2%} of {chosen.sum():,}")
    report_false(both, found)


def report_false(texts: list[str], found: np.ndarray) -> None:
    order = np.argsort(found, kind="stable")
    groups = [group for group in np.split(order, np.flatnonzero(np.diff(found[order])) + 1) if len(group) > 1]
    false = 0
    for group in groups:
        words = [re.findall(r"\w+", normalize("NFC", texts[i]).lower()) for i in group]
        parts = [set(zip(own, own[1:], own[2:], strict=False)) for own in words]
        for i, own in enumerate(parts):
            best = max(len(own & other) / len(own | other) for j, other in enumerate(parts) if j != i)
            false += best < FALSE_BELOW
    largest = max(map(len, groups))
    print(f"falsely clustered: {false:,} of {len(texts):,} ({false / len(texts):.3%}); largest cluster {largest}")


if __name__ == "__main__":
    main()
