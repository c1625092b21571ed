"""Sections of a benchmark: each in its own process with a time limit, so that one that fails is one row less."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MARK = "RESULT"
WORKER = Path(__file__).with_name("worker.py")


def compute(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One section, in this process."""
    from training_speed import kernels, machine, memory, numerics, scoring, variants
    from training_speed.setup import Shape

    functions = {
        "machine": machine.describe,
        "numerics": numerics.check,
        "train": variants.measure,
        "score": scoring.measure,
        "memory": memory.measure,
        "noise": numerics.noise,
        "loss_kernel": kernels.loss,
        "attention_kernel": kernels.attention,
        "gemm": kernels.gemm,
    }
    settings = dict(settings)
    return functions[name](Shape(**settings.pop("shape")), **settings)


def run(name: str, settings: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """One section in a process of its own: its result, or `failed` with the reason; `seconds` in either case.

    The process gets one GPU (the Trainer would spread its batch over all), and is killed with its children: compilers
    that outlive it would hold the pipes and the memory.
    """
    started = time.perf_counter()
    one_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    process = subprocess.Popen(
        [sys.executable, str(WORKER), name, json.dumps(settings)], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "CUDA_VISIBLE_DEVICES": one_gpu},
    )  # fmt: skip
    too_long = False
    try:
        printed, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        too_long = True
    finally:
        _kill_with_children(process)
    if too_long:
        printed, errors = process.communicate()
    found = [line for line in printed.splitlines() if line.startswith(MARK)]
    if found:
        result = json.loads(found[-1].removeprefix(MARK))
    elif too_long:
        result = {"failed": f"more than {limit_s:.0f} s", "last_line": _last_line(errors)}
    else:
        result = {"failed": f"{_last_line(errors)} (exit status {process.returncode})"}
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def _kill_with_children(process: subprocess.Popen[str]) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()


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
