"""The memory of a whole `prepare` against the size of the text, and what 100 GB of it would take.

    python benchmarks/prepare_memory.py --text TEXT... --tokenizer DIR --documents 1_000_000 3_000_000 10_000_000

Each size is one run of the command with selection by a target, near-duplicates and decontamination. What counts is
memory that the system cannot drop (anonymous pages), of all processes together, sampled; pages of mapped files, which
it can drop, are given beside it. Documents of `--document_bytes` are drawn from pieces of TEXT with words of their own:
few are near-duplicates. Documents of 60 bytes show what grows with the number of documents, documents of 3,000 bytes
what grows with the text. A straight line through the sizes says what `TARGET_DOCUMENTS` would take; the script fails
if that is more than `LIMIT_MB`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

TARGET_DOCUMENTS, LIMIT_MB = 33_000_000, 1000  # 100 GB of mC4, whose documents have 3 kB on average
BATCH = 100_000
NUM_TARGETS, NUM_QUESTIONS = 500, 3000
ALIKE_EVERY, AGAIN_EVERY, ASKED_EVERY = 50, 100, 10_000  # near-duplicates, duplicates, benchmark questions
WORDS_OF_PIECE, WORDS_PER_NEW_ONE = 12, 75  # a gigabyte of English from the web has a new word in some 100
QUIET_SAMPLES = 4  # without a shard at work: all are done
INTERVAL_S = 0.5
PHASES = ("reading", "deciding", "writing")


def pieces_of(sources: list[Path], words_each: int) -> list[str]:
    """Runs of so many words of the texts, each once."""
    words = [word for source in sources for word in source.read_text(encoding="utf-8").split()]
    runs = [" ".join(words[i : i + words_each]) for i in range(0, len(words), words_each)]
    return list(dict.fromkeys(runs))


def invented(numbers: np.ndarray) -> list[str]:
    """A word of its own for each number: the vocabulary of real text grows without end."""
    syllables = [a + b for a in "bcdfglmnprstvz" for b in "aeiou"]
    return ["".join(syllables[int(n) // 70**place % 70] for place in range(4)) for n in numbers]


def documents(pieces: list[str], number: int, mean_bytes: int, seed: int) -> itertools.chain[str]:
    """Texts of pieces drawn at random, about so long; some are duplicates or near-duplicates of others."""
    generator = np.random.default_rng(seed)
    mean_piece = sum(map(len, pieces)) / len(pieces) + 1

    def batch(size: int) -> list[str]:
        lengths = 1 + generator.poisson(mean_bytes / mean_piece - 1, size)
        chosen = iter([pieces[i] for i in generator.integers(len(pieces), size=lengths.sum()).tolist()])
        num_new = generator.poisson(lengths * (1 + pieces[0].count(" ")) / WORDS_PER_NEW_ONE)
        own = iter(invented(generator.integers(70**4, size=num_new.sum())))
        texts: list[str] = []
        for place, (length, new) in enumerate(zip(lengths.tolist(), num_new.tolist(), strict=True)):
            text = " ".join([*itertools.islice(chosen, length), *itertools.islice(own, new)])
            if place % ALIKE_EVERY == 1:
                text = f"{texts[-1]} {place}"
            texts.append(texts[-1] if place % AGAIN_EVERY == 3 else text)
        return texts

    sizes = [min(BATCH, number - begin) for begin in range(0, number, BATCH)]
    return itertools.chain.from_iterable(map(batch, sizes))


def write_lines(path: Path, texts: itertools.chain[str], every: int = 0, others: list[str] | None = None) -> None:
    """Write JSON lines; every so many documents, one holds one of the other texts."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(texts):
            if others and number % every == every - 1:
                text += " " + others[number // every % len(others)]
            file.write(json.dumps({"text": text, "url": f"https://{number % 997}.example/{number}"}) + "\n")


def memory_of(process: psutil.Process) -> dict[int, tuple[float, float]]:
    """MB of each process of a tree: pages that must be kept, and pages of files; shared ones are counted in shares."""
    found = {}
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
        except (OSError, psutil.Error):
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) / 1000 for line in lines}
        found[one.pid] = sizes["Pss_Anon"], sizes["Pss_File"] + sizes["Pss_Shmem"]
    return found


class Phases:
    """What a run is doing, by its files."""

    def __init__(self, store: Path) -> None:
        self._store, self._work = store, store.with_name(f".{store.name}.work")
        self._quiet = 0

    def now(self) -> int:
        """The number of the phase."""
        if self._store.exists() or any(self._store.parent.glob(f".{self._store.name}.*.tmp")):
            return 2
        is_quiet = any(self._work.glob("shard-*")) and not any(self._work.glob("shard-*.tmp"))
        self._quiet = self._quiet + 1 if is_quiet else 0
        return int(self._quiet >= QUIET_SAMPLES)


def measure(command: list[str], store: Path, log: Path | None) -> dict[str, object]:
    """Run a command; its seconds, processor seconds, and the highest memory in each phase."""
    began = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = [(0.0, 0.0, 0.0, [0.0])] * len(PHASES)
    phases, cpu = Phases(store), 0.0
    rows = None if log is None else log.open("a", encoding="ascii")
    while process.poll() is None:
        held = memory_of(process)
        now = phases.now()
        main = held.get(process.pid, (0.0, 0.0))[0]
        workers = sorted((anonymous for pid, (anonymous, _) in held.items() if pid != process.pid), reverse=True)
        total = main + sum(workers)
        peaks[now] = max(peaks[now], (total, sum(pages for _, pages in held.values()), main, workers))
        if rows is not None:
            rows.write(f"{time.perf_counter() - began:.1f} {now} {total:.0f} {main:.0f} {workers}\n")
        with contextlib.suppress(psutil.Error):  # one that ends meanwhile
            times = [one.cpu_times() for one in [process, *process.children(recursive=True)]]
            cpu = max(cpu, sum(one.user + one.system for one in times))
        time.sleep(INTERVAL_S)
    assert process.returncode == 0, process.stderr.read().decode()
    return {"seconds": time.perf_counter() - began, "peaks": peaks, "cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="a directory in Hugging Face format")
    parser.add_argument("--documents", nargs="+", type=int, default=[1_000_000, 3_000_000, 10_000_000])
    parser.add_argument("--document_bytes", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="where text and stores are written for the time of a run")
    parser.add_argument("--log", type=Path, help="write every sample to this file")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more options for prepare, at the end")
    arguments = parser.parse_args()
    pieces = pieces_of(arguments.text, WORDS_OF_PIECE if arguments.document_bytes > 500 else 1)
    sizes, peaks = [], []
    for number in arguments.documents:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            text, like, questions, store = (Path(folder) / name for name in ("text.jsonl", "l.txt", "q.jsonl", "store"))
            asked = list(documents(pieces_of(arguments.text, 1), NUM_QUESTIONS, 150, 2))
            write_lines(questions, itertools.chain(asked))
            write_lines(text, documents(pieces, number, arguments.document_bytes, 0), min(ASKED_EVERY, number), asked)
            like.write_text("\n".join(documents(pieces[: len(pieces) // 10], NUM_TARGETS, 3000, 1)), encoding="utf-8")
            command = [sys.executable, "-m", "cartilha", "prepare", "--input", str(text), "--output", str(store)]
            command += ["--model", arguments.tokenizer, "--workers", str(arguments.workers), "--near_duplicates"]
            command += ["--like", str(like), "--select_tokens", "20%", "--decontaminate", str(questions)]
            found = measure([*command, *arguments.options], store, arguments.log)
            megabytes = text.stat().st_size / 1e6
            info = json.loads((store / "store.json").read_text(encoding="utf-8"))
        print(f"{number:,} documents, {megabytes:.0f} MB: {found['seconds']:.0f} s, {found['cpu']:.0f} s of processors")
        print(f"  left out: {info['dropped']}")
        for name, (total, pages, main_process, workers) in zip(PHASES, found["peaks"], strict=True):
            each = " + ".join(f"{worker:.0f}" for worker in workers)
            print(f"  {name}: {total:.0f} MB = {main_process:.0f} + workers {each}; and {pages:.0f} MB of files")
        sys.stdout.flush()
        sizes.append((number, megabytes))
        peaks.append([peak[0] for peak in found["peaks"]])
    if len(sizes) > 1:
        report(np.array(sizes), np.array(peaks))


def report(sizes: np.ndarray, peaks: np.ndarray) -> None:
    """The slope of each phase, and what it comes to; fails if that is too much."""
    at_most = 0.0
    for name, own in zip(PHASES, peaks.T, strict=True):
        slope, base = np.polyfit(sizes[:, 0], own, 1)
        expected = base + slope * TARGET_DOCUMENTS
        per_mb = 1e6 * np.polyfit(sizes[:, 1], own, 1)[0]
        print(f"{name}: {base:.0f} MB and {1e6 * slope:.1f} bytes per document ({per_mb:,.0f} per MB of text)", end="")
        print(f"; {expected:.0f} MB for {TARGET_DOCUMENTS:,}")
        at_most = max(at_most, expected)
    if at_most > LIMIT_MB:
        raise SystemExit(f"{at_most:.0f} MB would be needed, more than {LIMIT_MB} MB.")


if __name__ == "__main__":
    main()
