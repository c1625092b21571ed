"""How long a report of many runs takes, in seconds of CPU, and how large it is.

    python benchmarks/report_speed.py RUN [--runs 10] [--steps 3000]

The finished run RUN is copied; the records of its steps are repeated until there are as many as asked for.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from cartilha.reporting.html import render_report

ROUNDS = 3


def lengthened(metrics: Path, steps: int) -> str:
    """The same lines, those of steps repeated and counted on."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    of_steps = [record for record in records if "lr" in record]
    others = [record for record in records if "lr" not in record]
    repeated = [{**of_steps[n % len(of_steps)], "step": n + 1} for n in range(steps)]
    return "".join(json.dumps(record) + "\n" for record in [*others, *repeated])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / f"run-{number}" for number in range(arguments.runs)]
        for run in runs:
            shutil.copytree(arguments.run, run, ignore=shutil.ignore_patterns("model", "checkpoints"))
            (run / "metrics.jsonl").write_text(lengthened(run / "metrics.jsonl", arguments.steps), encoding="utf-8")
        page, seconds = Path(folder) / "report.html", []
        for _ in range(ROUNDS):
            started = time.process_time()
            render_report(tuple(runs), page, "en")
            seconds.append(time.process_time() - started)
        size = page.stat().st_size / 1e6
    print(f"{arguments.runs} runs of {arguments.steps} steps: {statistics.median(seconds):.2f} s of CPU, {size:.2f} MB")


if __name__ == "__main__":
    main()
