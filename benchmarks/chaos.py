"""Kill commands at random instants, give each again, and compare what is there with an undisturbed run, to the bit.

    python benchmarks/chaos.py --prepare 50 --train 90 --evaluate 30 --report 30 --work /tmp/chaos

Each trial is a process of its own that is ended by SIGKILL (`kill -9`) at an instant drawn uniformly from the command's
duration; of the trainings every second one is killed while a checkpoint is being written. Then the same command is
given again and must end with 0; its files must equal those of the undisturbed command (times apart), and nothing
half-written may be left. Processes are forked from one that has the libraries loaded, so that the instants fall into
the work rather than into imports. Needs a system with fork.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

TIMES = {
    "seconds",
    "matmul_gflops",
    "tokens_per_second",
    "tokens_per_second_after_first_step",
    "utilization",
    "memory_bytes",
    "modified_ns",
    "checkpoint_seconds",
    "mtime",
}
WRITING = ("prepare", "train", "evaluate", "report")
WORDS = "a fazenda o café de manhã lia devagar menina água roça e cartilha não sabia ler nem escrever ainda".split()  # noqa: SIM905


def main() -> None:
    """Run the trials and print the figures as JSON; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in WRITING:
        parser.add_argument(f"--{name}", type=int, default=0, help=f"kills of {name}")
    parser.add_argument("--work", type=Path, required=True, help="an empty directory for all files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    _load_libraries()
    arguments.work.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(arguments.work, random.Random(arguments.seed))
    chaos.make_reference()
    for name in WRITING:
        for number in range(getattr(arguments, name)):
            chaos.trial(name, number)
            print(f"{name} {number + 1}: {chaos.last}", file=sys.stderr, flush=True)
    print(json.dumps(chaos.figures(), indent=2))
    sys.exit(bool(chaos.faults))


def _load_libraries() -> None:
    """Import what the commands will need, before the forks, and compute nothing: threads do not survive a fork."""
    for name in ("prepare", "train", "evaluate", "report"):
        importlib.import_module(f"cartilha.pipeline.{name}")
    for name in ("transformers.models.opt.modeling_opt", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)


def differing(name: str, found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Where the contents of two commands' files differ, to the bit: each place, with both values."""
    return _differences(expected, found, "")


def _differences(one: Any, other: Any, place: str) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return [found for key in keys for found in _differences(one.get(key), other.get(key), f"{place} {key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for at, (left, right) in pairs for found in _differences(left, right, f"{place}[{at}]")]
    same = one == other or (one != one and other != other)
    return [] if same else [f"{place.strip()}: {str(one)[:60]} against {str(other)[:60]}"]


class Chaos:
    """The trials and what came of them."""

    def __init__(self, work: Path, draw: random.Random) -> None:
        self.work = work
        self.draw = draw
        self.corpus = work / "corpus.txt"
        lines = (f"Texto {n}: {' '.join(WORDS[(n * 7 + i * i) % 19] for i in range(5 + n % 40))}." for n in range(80))
        self.corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.reference = work / "reference"
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, Any] = {}
        self.faults: list[str] = []
        self.kills = dict.fromkeys(WRITING, 0)
        self.inside_checkpoints = 0
        self.left_behind = 0
        self.last = ""

    def arguments(self, name: str, place: Path) -> list[str]:
        """The command, writing below `place` and reading the reference's earlier stages."""
        store, run = self.reference / "store", self.reference / "run"
        tiny = ["--block_size", "32", "--batch_tokens", "512", "--lr", "3e-3", "--dtype", "float32"]
        return {
            "prepare": ["--input", str(self.corpus), "--model", "random:tiny", "--output", str(place / "store")],
            "train": [
                *("--model", "random:tiny-opt", "--store", str(store), "--output", str(place / "run"), *tiny),
                *("--dropout", "--epochs", "2", "--checkpoint_steps", "1", "--resume", "auto", "--skip_checks"),
            ],
            "evaluate": [
                *("--model", str(run / "model"), "--store", str(store), "--dtype", "float32", "--json"),
                *("--save", str(place / "saved.parquet"), "--per_token", str(place / "tokens.parquet")),
            ],
            "report": [str(run), "--output", str(place / "report.html"), "--language", "pt"],
        }[name]

    def begin(self, name: str, place: Path) -> int:
        """Fork a process that gives the command; returns its id."""
        place.mkdir(parents=True, exist_ok=True)
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            log = os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from cartilha.cli import main as cartilha

            code = cartilha([name, *self.arguments(name, place)])
        finally:
            os._exit(code)

    def finish(self, name: str, place: Path) -> int:
        """Give the command and wait for its end; returns the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.begin(name, place), 0)[1])

    def make_reference(self) -> None:
        """The undisturbed commands, each given twice: what two of them agree on is what a killed one must come to."""
        for name in WRITING:
            started = time.monotonic()
            code = self.finish(name, self.reference)
            self.seconds[name] = time.monotonic() - started
            assert code == 0, f"{name} failed: see {self.reference.with_suffix('.log')}"
            self.expected[name] = self.contents(name, self.reference)
            again = self.work / f"again-{name}"
            assert self.finish(name, again) == 0, f"{name} failed the second time: see {again.with_suffix('.log')}"
            parts = differing(name, self.contents(name, again), self.expected[name])
            assert not parts, (
                f"{name} is not the same twice over ({'; '.join(parts[:12])}): there is nothing to compare with"
            )

    def trial(self, name: str, number: int) -> None:
        """Kill one command, give it again, compare."""
        place = self.work / f"{name}-{number}"
        inside = name == "train" and number % 2 == 0
        while True:
            process = self.begin(name, place)
            at = self._wait_for_checkpoint(place, process) if inside else self.draw.uniform(0, self.seconds[name])
            time.sleep(at)
            os.kill(process, signal.SIGKILL)
            killed = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
            left = [path for path in place.rglob(".*") if path.suffix in (".tmp", ".old")]
            was_inside = any(path.name.startswith(".step-") for path in left)
            if killed and (was_inside or not inside):
                break
            shutil.rmtree(place)  # the instant came too late: the checkpoint, or the command, had ended before
        self.kills[name] += 1
        self.left_behind += bool(left)
        self.inside_checkpoints += was_inside
        before = len(self.faults)
        self._compare(name, place)
        self.last = f"{len(left)} half-written things left, then {'equal' if len(self.faults) == before else 'FAULT'}"
        if len(self.faults) == before:
            shutil.rmtree(place)

    def _wait_for_checkpoint(self, place: Path, process: int) -> float:
        """Wait until one of the checkpoints is being written; returns how much longer to wait."""
        number = self.draw.randrange(1, 20)
        seen: set[str] = set()
        deadline = time.monotonic() + 10 * self.seconds["train"]
        while time.monotonic() < deadline and len(seen) < number:
            ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                return 0.0
            with_temporary = place / "run" / "checkpoints"
            if with_temporary.is_dir():
                seen |= {path.name for path in with_temporary.glob(".step-*.tmp")}
            time.sleep(0.0005)
        return self.draw.uniform(0, 0.01)

    def _compare(self, name: str, place: Path) -> None:
        code = self.finish(name, place)
        if code != 0:
            self.faults.append(f"{place.name}: the command given again ended with {code}")
            return
        found = self.contents(name, place)
        if parts := differing(name, found, self.expected[name]):
            self.faults.append(f"{place.name}: {len(parts)} places differ: {'; '.join(parts[:12])}")
        left = [path.name for path in place.rglob(".*") if path.name != ".verified.json"]
        if left:
            self.faults.append(f"{place.name}: {', '.join(left)} left behind")

    def contents(self, name: str, place: Path) -> dict[str, Any]:
        """All files of a command, times apart: JSON as values, tables as rows, anything else as a hash."""
        places = {"prepare": ["store"], "train": ["run"], "evaluate": ["saved.parquet", "tokens.parquet"]}
        found = {}
        for part in places.get(name, ["report.html"]):
            files = [place / part] if (place / part).is_file() else sorted((place / part).rglob("*"))
            for file in files:
                relative = file.relative_to(place).as_posix()
                if file.is_file() and not file.name.startswith(".") and relative not in ("run/config.yaml",):
                    found[relative] = self._content(file, place)
        return found

    def _content(self, file: Path, place: Path) -> Any:
        if file.name in ("manifest.json",):  # holds the hash of state.json, which holds seconds
            return None
        if file.name == "plan.json":  # says how much memory was free just then
            return sorted(json.loads(file.read_text(encoding="utf-8")))
        if file.suffix == ".json":
            return self._plain(json.loads(file.read_text(encoding="utf-8")), place)
        if file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8").split("\n")
            return [self._plain(json.loads(line), place) for line in lines if line]
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            kept = {key: self._plain(json.loads(value), place) for key, value in meta.items() if value[:1] in "{["}
            return [kept, table.to_pydict()]
        if file.suffix in (".md", ".html"):  # the model card and the report show times
            return file.stat().st_size > 0
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def _plain(self, value: Any, place: Path) -> Any:
        """A value without times, places, and what a resumed run says of itself."""
        if isinstance(value, dict):
            skipped = {*TIMES, "resumed_from_step", "notices", "sha256", "files", "epoch_seconds"}
            return {key: self._plain(item, place) for key, item in value.items() if key not in skipped}
        if isinstance(value, list):
            return [self._plain(item, place) for item in value]
        return value.replace(str(place), "").replace(str(self.reference), "") if isinstance(value, str) else value

    def figures(self) -> dict[str, Any]:
        """What came of it."""
        return {
            "kills": self.kills,
            "total": sum(self.kills.values()),
            "inside_checkpoint_writing": self.inside_checkpoints,
            "with_half_written_files": self.left_behind,
            "seconds_undisturbed": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
            "faults": self.faults,
        }


if __name__ == "__main__":
    main()
