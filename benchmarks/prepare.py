"""`prepare` beside `datasets` load + map + group, on the same file in one run.

    python benchmarks/prepare.py --text TEXT... --megabytes 400 --tokenizer DIR [--peer]

The text is made of the paragraphs of TEXT in random order, as documents of about 4,900 bytes (the mean of the
exercise's corpus), each with its own number, so that none is a duplicate. Each way is a process of its own, timed from
its start to its end, the memory of its children included (the sum of the resident sets, sampled). The peer does what
the language-modelling example of transformers does: `load_dataset("text")`, `map` of the fast tokenizer, `map` of the
grouping into blocks, with as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

PEER = """
import sys
from itertools import chain
from datasets import load_dataset
from transformers import AutoTokenizer

path, tokenizer, cache, cores = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
raw = load_dataset("text", data_files=path, cache_dir=cache)["train"].train_test_split(0.2, seed=0)


def tokenize(batch):
    return tokenizer(batch["text"])


def group(batch):
    joined = {name: list(chain(*values)) for name, values in batch.items()}
    total = len(joined["input_ids"]) // 512 * 512
    blocks = {name: [values[i : i + 512] for i in range(0, total, 512)] for name, values in joined.items()}
    blocks["labels"] = blocks["input_ids"].copy()
    return blocks


tokens = raw.map(tokenize, batched=True, remove_columns=["text"], num_proc=int(cores))
tokens.map(group, batched=True, num_proc=int(cores))
"""


def make_text(sources: list[Path], megabytes: float, mean_bytes: float, path: Path) -> int:
    """Write documents of about `mean_bytes`, one a line; returns their number."""
    paragraphs = [line for source in sources for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    rng = random.Random(0)
    number = written = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        while written < megabytes * 1e6:
            document: list[str] = []
            held, wanted = 0, rng.expovariate(1 / mean_bytes)
            for paragraph in rng.sample(paragraphs, len(paragraphs)):
                document.append(paragraph)
                held += len(paragraph)
                if held >= wanted:
                    number += 1
                    written += file.write(f"{number} {' '.join(document)}\n")
                    document, held, wanted = [], 0, rng.expovariate(1 / mean_bytes)
    return number


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of a command, and the peak of the memory of its processes in GB."""
    started = time.perf_counter()
    process = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        held = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                held += one.memory_info().rss - one.memory_info().shared
            except psutil.Error:
                continue
        peak = max(peak, held)
        time.sleep(0.2)
    seconds = time.perf_counter() - started
    assert process.returncode == 0, process.stderr.read().decode()
    return seconds, peak / 1e9


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="a directory in Hugging Face format")
    parser.add_argument("--megabytes", type=float, default=400)
    parser.add_argument("--mean_bytes", type=float, default=4900)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more options for prepare, at the end")
    parser.add_argument("--peer", action="store_true", help="also run the datasets path, which takes minutes")
    arguments = parser.parse_args()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "text.txt"
        number = make_text(arguments.text, arguments.megabytes, arguments.mean_bytes, text)
        megabytes = text.stat().st_size / 1e6
        print(f"{megabytes:.0f} MB, {number:,} documents, {arguments.workers} workers")
        store = folder / "store"
        command = [sys.executable, "-m", "cartilha", "prepare", "--input", str(text), "--model", arguments.tokenizer]
        command += ["--output", str(store), "--workers", str(arguments.workers), *arguments.options]
        seconds, peak = measure(command, environment)
        counts = json.loads((store / "store.json").read_text(encoding="utf-8"))["splits"].values()
        tokens = sum(side["num_tokens"] for side in counts)
        ids = sum((store / f"{side}.tokens").stat().st_size for side in ("train", "validation"))
        index = sum((store / f"{side}.documents.parquet").stat().st_size for side in ("train", "validation"))
        disk = size_of(store)
        print(f"prepare: {seconds:.1f} s, {megabytes / seconds:.1f} MB/s, {peak:.2f} GB of memory")
        print(
            f"disk: {disk / tokens:.2f} bytes a token, of which ids {ids / tokens:.2f}, index {index / tokens:.3f};"
            f" {disk / text.stat().st_size:.2f} bytes a byte of text"
        )
        again, _ = measure(command, environment)
        print(f"the same command again: {again:.2f} s")
        shutil.rmtree(store)
        if arguments.peer:
            cache = folder / "cache"
            peer_environment = {**environment, "HF_HOME": str(cache)}
            peer = [sys.executable, "-c", PEER, str(text), arguments.tokenizer, str(cache), str(arguments.workers)]
            peer_seconds, peer_peak = measure(peer, peer_environment)
            rate = megabytes / peer_seconds
            print(f"datasets: {peer_seconds:.1f} s, {rate:.1f} MB/s, {peer_peak:.2f} GB of memory")
            print(f"datasets' disk: {size_of(cache) / text.stat().st_size:.1f} bytes a byte of text")
            print(f"prepare is {peer_seconds / seconds:.1f} times as fast")


if __name__ == "__main__":
    main()
