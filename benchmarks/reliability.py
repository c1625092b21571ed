"""What reliability costs: memory over 3,000 steps, and the time of a checkpoint against the default interval.

    python benchmarks/reliability.py memory --steps 3000
    python benchmarks/reliability.py checkpoint --model random:smollm2-135m

Prints the figures as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from cartilha.config import PrepareConfig, TrainConfig
from cartilha.model.load import load_model
from cartilha.pipeline.prepare import prepare
from cartilha.pipeline.train import train
from cartilha.tokens.tokenizer import byte_tokenizer
from cartilha.training.checkpoint import freeze, load_checkpoint, newest_sound_checkpoint, write_checkpoint
from cartilha.training.loop import train_steps
from cartilha.training.state import TrainingState


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("memory", "checkpoint"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--model", default="random:smollm2-135m")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found = memory(work, arguments.steps) if arguments.what == "memory" else checkpoint(work, arguments.model)
    print(json.dumps(found, indent=2))


def memory(work: Path, steps: int) -> dict[str, Any]:
    """Resident memory of this process while a tiny model trains, a checkpoint every 50 steps."""
    prepare(PrepareConfig(input=("primer",), model="random:tiny", output=str(work / "store")))
    sizes: dict[int, int] = {}
    process = psutil.Process()

    def noting(*rest: Any, **more: Any) -> Any:
        for record in train_steps(*rest, **more):
            if record.step % 100 == 0:
                gc.collect()
                sizes[record.step] = process.memory_info().rss
            yield record

    import cartilha.pipeline.train as module

    module.train_steps = noting  # type: ignore[assignment]
    options: dict[str, Any] = {"block_size": 64, "batch_tokens": 256, "max_steps": steps, "checkpoint_steps": 50}
    train(TrainConfig(model="random:tiny", store=str(work / "store"), output=str(work / "run"), lr=1e-3, **options))
    later = {step: size for step, size in sizes.items() if step > steps // 6}  # after everything was loaded once
    first, last = later[min(later)], later[max(later)]
    return {
        "steps": steps,
        "mib_by_step": {step: round(size / 2**20, 1) for step, size in sizes.items()},
        "from_step": min(later),
        "growth_percent": round(100 * (last / first - 1), 2),
        "largest_above_first_percent": round(100 * (max(later.values()) / first - 1), 2),
    }


def checkpoint(work: Path, ref: str) -> dict[str, Any]:
    """Seconds of freezing a state (what training waits for where it is written beside it), of writing, of loading."""
    model = load_model(ref, torch.device("cpu"), tokenizer=byte_tokenizer() if "tiny" in ref else None).model
    state = TrainingState.begin(model, torch.float32, lr=1e-3, weight_decay=0.1)
    state.progress.step = 1
    rows = []
    for _ in range(3):
        started = time.perf_counter()
        frozen = freeze(state, {}, copy=True)
        frozen_at = time.perf_counter()
        path = write_checkpoint(work, frozen)
        written_at = time.perf_counter()
        del frozen
        newest = newest_sound_checkpoint(work)
        assert newest == path
        load_checkpoint(path, state)
        rows.append((frozen_at - started, written_at - frozen_at, time.perf_counter() - written_at))
    freezing, writing, loading = (sorted(times)[1] for times in zip(*rows, strict=True))
    interval_s = 60 * TrainConfig().checkpoint_minutes
    return {
        "model": ref,
        "gigabytes": round(sum(file.stat().st_size for file in path.iterdir()) / 1e9, 2),
        "freeze_s": round(freezing, 2),
        "write_s": round(writing, 2),
        "verify_and_load_s": round(loading, 2),
        "interval_s": interval_s,
        "share_in_the_foreground_percent": round(100 * (freezing + writing) / interval_s, 2),
        "share_in_the_background_percent": round(100 * freezing / interval_s, 2),
    }


if __name__ == "__main__":
    main()
