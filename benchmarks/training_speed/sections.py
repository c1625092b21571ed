"""Sections of a benchmark: each in its own process with a time limit, so that one that fails is one row less."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MARK = "RESULT"
WORKER = Path(__file__).with_name("worker.py")


def compute(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One section, in this process."""
    from training_speed import kernels, memory, numerics, variants
    from training_speed.setup import Shape

    functions = {
        "numerics": numerics.check,
        "train": variants.measure,
        "memory": memory.measure,
        "noise": numerics.noise,
        "loss_kernel": kernels.loss,
        "attention_kernel": kernels.attention,
        "gemm": kernels.gemm,
    }
    settings = dict(settings)
    return functions[name](Shape(**settings.pop("shape")), **settings)


def run(name: str, settings: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """One section in a process of its own: its result, or `failed` with the reason; `seconds` in either case."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, str(WORKER), name, json.dumps(settings)],
            capture_output=True, text=True, timeout=limit_s,
        )  # fmt: skip
        found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        result = json.loads(found[-1].removeprefix(MARK)) if found else {"failed": _last_line(done.stderr)}
    except subprocess.TimeoutExpired:
        result = {"failed": f"more than {limit_s:.0f} s"}
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1][:300]


class Results:
    """A dated file that is whole after every section."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), **about, "sections": []}

    def add(self, title: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write a section down, and give it back."""
        self.values["sections"].append({"title": title, **result})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)
        return result
