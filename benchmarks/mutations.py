"""Give commands thousands of mutated inputs: no traceback, no hang, no flipped bit of a store or checkpoint accepted.

    python benchmarks/mutations.py --examples 2500

Four kinds of input, `--examples` of each, mutated by hypothesis (bits flipped, bytes cut, repeated, inserted, replaced
by what parsers dislike): recipes, stores, checkpoints, and documents in each format. Prints the figures as JSON; exit
code 1 where a fault was found.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import itertools
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cartilha.cli import main as cartilha
from cartilha.errors import UserError
from cartilha.model.load import load_model
from cartilha.tokens.store import TokenStore
from cartilha.training.checkpoint import freeze, load_checkpoint, newest_sound_checkpoint, write_checkpoint
from cartilha.training.state import TrainingState

SECONDS_AT_MOST = 30
NASTY = [
    *(b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"[" * 3000, b'"', b"\n", b"\r", b"-1", b"1e999", b"NaN", b"null"),
    *(b"99999999999999999999", b"&a [*a]", b"!!python/object/apply:os.system [id]", b"<script>", b": ", b"- ", b"\t"),
]
RECIPE = """
description: Uma receita.
model: random:tiny
prepare:
  input: [textos.txt]
  validation_fraction: 0.2
train:
  block_size: 32
  batch_tokens: 128
  epochs: 1
  lr: 3e-3
  dtype: float32
generate:
  prompt: [Era uma vez, "Outra vez"]
  max_new_tokens: 4
"""
LINES = [f"Texto {n}: a fazenda e o café, {'lia devagar ' * (n % 4)}ontem." for n in range(12)]


def mutations() -> st.SearchStrategy[list[tuple[str, float, Any]]]:
    """One to three changes: what is done, where (a share of the length), and with what."""
    one = st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 64)),
        st.tuples(st.just("truncate"), st.floats(0, 1), st.none()),
        st.tuples(st.just("insert"), st.floats(0, 1), st.sampled_from(NASTY) | st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("replace"), st.floats(0, 1), st.sampled_from(NASTY) | st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 200)),
    )
    return st.lists(one, min_size=1, max_size=3)


def mutate(data: bytes, changes: list[tuple[str, float, Any]]) -> bytes:
    """The data after the changes."""
    for kind, place, value in changes:
        at = int(place * max(0, len(data) - 1))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << value]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + value :]
        elif kind == "truncate":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "replace":
            data = data[:at] + value + data[at + len(value) :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 8] * value + data[at:]
    return data


class Faults:
    """Counts what came of each input and keeps the first faults of each kind."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.faults: dict[str, str] = {}
        self.slowest_s = 0.0

    @contextlib.contextmanager
    def watching(self, kind: str) -> Iterator[None]:
        """An exception, or no end in sight, is a fault."""

        def too_long(*_: object) -> None:
            raise TimeoutError(f"still at it after {SECONDS_AT_MOST} s")

        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS_AT_MOST)
        started = time.monotonic()
        try:
            yield
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.faults.setdefault(
                f"{kind}: {type(error).__name__} in {Path(place.filename).name}:{place.lineno}", str(error)[:300]
            )
        finally:
            signal.alarm(0)
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)


def command(arguments: list[str]) -> tuple[int, str]:
    """Give a command in this process; its exit code and what it wrote to standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cartilha(arguments)
    return code, err.getvalue()


def checked(faults: Faults, kind: str, arguments: list[str]) -> None:
    """0, or 2 with one sentence: anything else is a fault."""
    with faults.watching(kind):
        code, err = command(arguments)
        said = [line for line in err.splitlines() if line.startswith("cartilha:")]
        assert code in (0, 2), f"exit code {code}"
        assert "Traceback" not in err, err
        assert code == 0 or len(said) == 1, f"not one sentence: {err}"
        faults.outcomes[f"{kind}: {'accepted' if code == 0 else 'refused'}"] += 1


def recipes(work: Path, faults: Faults) -> Callable[[list[Any], int], None]:
    """Mutated recipes, resolved and printed."""

    def test(changes: list[Any], _: int) -> None:
        file = work / "receita.yaml"
        file.write_bytes(mutate(RECIPE.encode(), changes))
        checked(faults, "recipe", ["run", str(file), "--print_config"])

    return test


def stores(work: Path, faults: Faults) -> Callable[[list[Any], int], None]:
    """One file of a store mutated: it must be refused."""
    store = work / "store"
    (work / "textos.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    assert (
        command(["prepare", "--input", str(work / "textos.txt"), "--model", "random:tiny", "--output", str(store)])[0]
        == 0
    )
    files = sorted(path for path in store.rglob("*") if path.is_file() and not path.name.startswith("."))
    good = {path: path.read_bytes() for path in files}

    def test(changes: list[Any], number: int) -> None:
        path = files[number % len(files)]
        mutated = mutate(good[path], changes)
        path.write_bytes(mutated)
        with faults.watching(f"store ({path.name})"):
            try:
                TokenStore(store)
            except UserError:
                assert mutated != good[path], "refused although nothing was changed"
                faults.outcomes["store: refused"] += 1
            else:
                assert mutated == good[path], "accepted although it was changed"
                faults.outcomes["store: nothing changed"] += 1
        path.write_bytes(good[path])

    return test


def checkpoints(work: Path, faults: Faults) -> Callable[[list[Any], int], None]:
    """One file of a checkpoint mutated: it must be passed over, and the one before must be loaded."""
    run = work / "run"
    model = load_model("random:tiny", torch.device("cpu")).model
    state = TrainingState.begin(model, torch.float32, lr=1e-3, weight_decay=0.1)
    state.progress.step = 1
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    before = write_checkpoint(run, freeze(state, {"lr": 1e-3}))
    state.progress.step = 2
    newest = write_checkpoint(run, freeze(state, {"lr": 1e-3}))
    files = sorted(newest.iterdir())
    good = {path: path.read_bytes() for path in files}

    def test(changes: list[Any], number: int) -> None:
        path = files[number % len(files)]
        mutated = mutate(good[path], changes)
        path.write_bytes(mutated)
        with faults.watching(f"checkpoint ({path.name})"):
            found = newest_sound_checkpoint(run)
            assert found == (newest if mutated == good[path] else before), f"{found} was taken"
            load_checkpoint(found, state)
            assert state.progress.step == (2 if found == newest else 1)
            faults.outcomes["checkpoint: " + ("nothing changed" if found == newest else "passed over")] += 1
        path.write_bytes(good[path])

    return test


def documents(work: Path, faults: Faults) -> Callable[[list[Any], int], None]:
    """Mutated documents in each format, prepared."""
    parquet = io.BytesIO()
    pq.write_table(pa.table({"text": LINES}), parquet)
    text = "\n".join(LINES).encode()
    good = {
        "a.txt": text,
        "a.jsonl": "\n".join(json.dumps({"text": line}) for line in LINES).encode(),
        "a.csv": b"text,n\n" + b"\n".join(f'"{line}",{n}'.encode() for n, line in enumerate(LINES)),
        "a.parquet": parquet.getvalue(),
        "a.txt.gz": gzip.compress(text),
    }

    def test(changes: list[Any], number: int) -> None:
        name = sorted(good)[number % len(good)]
        (work / name).write_bytes(mutate(good[name], changes))
        arguments = ["--input", str(work / name), "--model", "random:tiny", "--output", str(work / "prepared")]
        checked(faults, f"documents ({name})", ["prepare", *arguments, "--overwrite"])
        shutil.rmtree(work / "prepared", ignore_errors=True)

    return test


KINDS = {"recipes": recipes, "stores": stores, "checkpoints": checkpoints, "documents": documents}


def _many(test: Callable[[list[Any], int], None], examples: int) -> int:
    """Run a test on so many mutations; returns their number."""
    numbers = itertools.count()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations())
    def many(changes: list[Any]) -> None:
        test(changes, next(numbers))

    many()
    return next(numbers)


def main() -> None:
    """Run the mutations and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2500, help="inputs of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("cartilha").setLevel(logging.CRITICAL)
    os.environ["HF_HUB_OFFLINE"] = "1"
    result: dict[str, Any] = {}
    all_faults: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CARTILHA_CACHE"] = str(Path(folder) / "cache")
        for name in arguments.kinds:
            work = Path(folder) / name
            work.mkdir()
            faults = Faults()
            test = KINDS[name](work, faults)
            started = time.monotonic()
            num_inputs = _many(test, arguments.examples)
            result[name] = {
                "inputs": num_inputs,
                "outcomes": dict(faults.outcomes),
                "slowest_s": round(faults.slowest_s, 2),
                "seconds": round(time.monotonic() - started, 1),
                "faults": faults.faults,
            }
            all_faults |= faults.faults
    print(json.dumps({**result, "faults": len(all_faults)}, indent=2))
    sys.exit(bool(all_faults))


if __name__ == "__main__":
    main()
