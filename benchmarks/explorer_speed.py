"""How soon the explorer is there, and how soon it answers: prints seconds (two threads; run on a quiet machine).

python benchmarks/explorer_speed.py [MODEL]
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from cartilha.config import EMBEDDED_MODEL, ExploreConfig
from cartilha.corpus.primer import read_primer
from cartilha.explorer.choices import Shaping
from cartilha.explorer.session import Answers, Explorer, Spot
from cartilha.explorer.wording import PageWording
from cartilha.pipeline.explore import open_explorer

NUM_TOKENS = 300
ROUNDS = 3


def seconds_to_start(model: str) -> float:
    command = [sys.executable, "-m", "cartilha", "explore", "--model", model, "--port", "0", "--no_browser"]
    started = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if re.search(r"http://127\.0\.0\.1:\d+/", line):
                break
        else:
            raise SystemExit("The explorer did not start.")
        seconds = time.perf_counter() - started
        process.terminate()
    return seconds


def median_seconds(action: Callable[[], object]) -> float:
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else EMBEDDED_MODEL
    starts = [seconds_to_start(model) for _ in range(ROUNDS)]
    print(f"{os.cpu_count()} cores; {model}")
    print(f"start to ready: {', '.join(f'{s:.1f}' for s in starts)} s")
    both = open_explorer(ExploreConfig(models=(model, model)))
    say = PageWording("pt")
    tokenizer = both.readers["A"].tokenizer
    ids = tokenizer.encode([" ".join(document.text for document in read_primer())])[0]
    text = tokenizer.decode(ids[:NUM_TOKENS])
    for explorer in (Explorer({"A": both.readers["A"]}), both):

        def read(explorer: Explorer = explorer) -> None:
            explorer._readings.clear()
            Answers(explorer, say).reading(text)

        def click(explorer: Explorer = explorer) -> None:
            for reader in explorer.readers.values():
                reader._kept.clear()
            Answers(explorer, say).choices(text, Spot("A", 150, 400), Shaping())

        read()
        again = median_seconds(lambda e=explorer: Answers(e, say).choices(text, Spot("A", 99, 300), Shaping()))
        print(
            f"{len(explorer.readers)} model(s), {NUM_TOKENS} tokens: text {median_seconds(read):.2f} s, "
            f"first click {median_seconds(click):.2f} s, later clicks {again:.3f} s"
        )


if __name__ == "__main__":
    main()
