"""Training speed and memory on this CPU: ours beside the HF Trainer, in alternation, the same model, blocks and batch.

    python benchmarks/train_cpu.py [--rounds 2] [--steps 3] [--block_size 512] [--micro_batch 4]
                                   [--text FILE --tokenizer DIR]

OPT-125M's shape with fresh weights. Each measurement is a process of its own; the first step of each is not counted.
The HF Trainer runs as its users run it (float32, then bf16 autocast) over the same packed blocks without padding.
Numerics first: both losses on the same blocks with one document a row must agree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

VARIANTS = ("ours float32", "ours bfloat16", "hf float32", "hf bfloat16")


def token_stream(arguments: argparse.Namespace) -> np.ndarray:
    if arguments.text:
        from cartilha.tokens.tokenizer import load_tokenizer

        lines = [line for line in Path(arguments.text).read_text(encoding="utf-8").split("\n") if line.strip()]
        return np.concatenate(load_tokenizer(arguments.tokenizer).encode(lines)).astype(np.int64)
    return np.random.default_rng(0).integers(4, 50265, 2_000_000)


def documents(stream: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.arange(0, len(stream) - length, length)
    return starts, np.full(len(starts), length)


def measure_ours(arguments: argparse.Namespace, dtype_name: str) -> list[float]:
    import torch

    from cartilha.blocks.sampler import BlockSampler
    from cartilha.model.load import load_model
    from cartilha.training.loop import Progress, Schedule, train_steps
    from cartilha.training.optimizer import make_optimizer

    stream = token_stream(arguments)
    starts, lengths = documents(stream, arguments.document_length or arguments.block_size - 1)
    sampler = BlockSampler(
        stream, starts, lengths, prefix_id=2, end_id=2, block_size=arguments.block_size,
        blocks_per_step=arguments.micro_batch, seed=0,
    )  # fmt: skip
    loaded = load_model("random:opt-125m", torch.device("cpu"))
    steps = train_steps(
        loaded.model, make_optimizer(loaded.model, 1e-5, 0.1), sampler,
        Schedule(arguments.steps + 1, 1e-5, 0.0, 1.0), Progress(), dtype=getattr(torch, dtype_name),
        micro_batch_size=arguments.micro_batch, max_grad_norm=1.0, scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip
    return [arguments.block_size * arguments.micro_batch / record.seconds for record in steps][1:]


def measure_hf(arguments: argparse.Namespace, dtype_name: str) -> list[float]:
    import tempfile

    import torch
    from transformers import OPTConfig, OPTForCausalLM, Trainer, TrainerCallback, TrainingArguments

    stream = token_stream(arguments)
    size = arguments.block_size
    rows = [{"input_ids": r, "labels": r} for r in stream[: len(stream) // size * size].reshape(-1, size).tolist()]
    rows = [{key: torch.tensor(value) for key, value in row.items()} for row in rows[: arguments.micro_batch * 50]]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter())

    model = OPTForCausalLM(OPTConfig(vocab_size=50272))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=arguments.micro_batch, max_steps=arguments.steps + 1, use_cpu=True,
            bf16=dtype_name == "bfloat16", save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(model=model, args=settings, train_dataset=rows, callbacks=[Clock()]).train()
    return [size * arguments.micro_batch / (b - a) for a, b in itertools.pairwise(times)]


def check_numerics(arguments: argparse.Namespace) -> float:
    import torch

    from cartilha.blocks.packing import PackedStream, stack
    from cartilha.model.forward import batch_nll
    from cartilha.model.load import load_model

    stream = token_stream(arguments)
    loaded = load_model("random:opt-125m", torch.device("cpu"))
    packed = PackedStream(
        stream, np.array([0]), np.array([64]), np.array([0]), prefix_id=2, end_id=2, block_size=65
    )  # fmt: skip
    batch = stack([packed.block(0)])
    ids = torch.tensor([[2, *stream[:64].tolist(), 2]])
    with torch.no_grad():
        ours = batch_nll(loaded.model, batch, torch.float32) / batch.num_targets
        loaded.model.set_attn_implementation("sdpa")
        theirs = loaded.model(ids, labels=ids).loss
    return abs(float(ours) - float(theirs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--document_length", type=int, default=None, help="of ours; default one document a block")
    parser.add_argument("--text", default=None)
    parser.add_argument("--tokenizer", default=None)
    parser.add_argument("--variant", default=None, help="internal: measure one and print JSON")
    arguments = parser.parse_args()
    if arguments.variant:
        kind, dtype_name = arguments.variant.split()
        rates = (measure_ours if kind == "ours" else measure_hf)(arguments, dtype_name)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("RESULT" + json.dumps({"rates": rates, "peak": peak}))
        return
    print(f"numerics: |our loss - HF loss| = {check_numerics(arguments):.2e} nats (float32, one document)")
    rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    peaks: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_number in range(arguments.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result = json.loads(output.split("RESULT")[1])
            rates[variant] += result["rates"]
            peaks[variant].append(result["peak"])
            print(f"round {round_number + 1}: {variant}: {statistics.median(result['rates']):.0f} tokens/s", flush=True)
    print(f"\n{'variant':<16}{'tokens/s (median)':>20}{'min':>8}{'max':>8}{'peak GiB':>10}")
    for variant in VARIANTS:
        values, peak = rates[variant], max(peaks[variant]) / 2**30
        print(f"{variant:<16}{statistics.median(values):>20.0f}{min(values):>8.0f}{max(values):>8.0f}{peak:>10.2f}")


if __name__ == "__main__":
    main()
