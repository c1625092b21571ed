"""The long harnesses in short: `kill -9` at random instants, and mutated inputs (benchmarks/ has them in full)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def figures(name: str, *arguments: object) -> dict[str, Any]:
    """Run a harness in a process of its own; what it prints."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_command_given_again_comes_to_the_same(tmp_path):
    found = figures("chaos.py", "--work", tmp_path, "--prepare", 1, "--train", 3, "--evaluate", 1, "--report", 1)
    assert found["faults"] == [] and found["total"] == 6
    assert found["inside_checkpoint_writing"] >= 1  # not vacuous: something was half-written


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGALRM")
def test_mutated_inputs_are_refused_in_a_sentence_or_read(tmp_path):
    found = figures("mutations.py", "--examples", 40)
    assert found.pop("faults") == 0 and found.keys() == {"recipes", "stores", "checkpoints", "documents"}
    assert all(kind["inputs"] >= 40 for kind in found.values())
    outcomes = {name: number for kind in found.values() for name, number in kind["outcomes"].items()}
    assert outcomes["store: refused"] > 30 and outcomes["checkpoint: passed over"] > 30
