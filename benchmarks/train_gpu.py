"""Training on this GPU in under 8 minutes (H100): numerics first, then speed, memory under limits, kernels, noise.

    python benchmarks/train_gpu.py [--output benchmarks/results] [--minutes 8]
    python benchmarks/train_gpu.py --device cpu --quick     every section on a tiny model: that the script runs

Ours beside the HF Trainer as its users run it (one text a row, padded, bf16) and tuned (packed rows, sdpa,
torch.compile, fused AdamW) at blocks of 512, 1024 and 2048, 16,384 positions a step; the exercise's rows that ran
out of memory, and those that are to fit in 15 GiB, in the T4's profile (fp16 with a gradient scaler, no flash
attention) and in bf16, under a limit on torch's memory; fused loss and attention alone beside their floor; an epoch
of 330 M tokens extrapolated; how far two equal runs lie apart. Speeds are tokens of text a second, padding not
counted. Each section is a process of its own with a time limit, and is written down as soon as it ends; one that
fails is recorded, and the rest goes on. The exit status is 1 where the numerics fail or a section gave no result. A
Trainer for which memory does not suffice is a result, and so are the sections, the least important, that `--minutes`
leaves no time for.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training_speed.flops import flops_per_token, median
from training_speed.sections import Results, run
from training_speed.setup import Shape, model_config

GIB = 2**30
EPOCH_TOKENS = 330e6  # of the exercise's text
TOKENS_PER_STEP = 16_384
# Block size, rows a step, GiB: the exercise's two rows without memory, and what is to fit into a T4.
LIMITED = ((512, 4, 15), (512, 8, 15), (1024, 16, 15), (2048, 8, 15), (1024, 16, 39))
LEAST_SECONDS = 10  # a section that has less than this left is not begun: Python and torch alone take as long


def main() -> None:
    arguments = parse()
    quick, device = arguments.quick, arguments.device
    end = time.monotonic() + 60 * arguments.minutes
    base = Shape(model="tiny-opt", device="cpu", block_size=64, micro_batch=4, windows=1) if quick else Shape(
        device=device, windows=4, window=10, warmup=4
    )  # fmt: skip
    machine = run("machine", {"shape": dataclasses.asdict(dataclasses.replace(base, device=device))}, 120)
    if "failed" in machine:
        sys.exit(f"The device could not be asked what it is: {machine['failed']}")
    if not machine["available"]:
        sys.exit("There is no CUDA device here; --device cpu --quick shows that the script runs.")
    flash = device == "cuda" and machine["capability"] >= [8, 0]
    half = "bfloat16" if flash or device == "cpu" else "float16"
    name = machine["name"]
    stamp = datetime.now(UTC).strftime("%Y-%m-%d-%H%M")
    path = Path(arguments.output) / f"train_{device}_{name.replace(' ', '-').replace('/', '-')}_{stamp}.json"
    results = Results(path, {"device": name, "half": half, "quick": quick, "machine": machine})
    measured = [
        (title, report(title, results.add(title, in_time(section, settings, limit, end))))
        for title, section, settings, limit in plan(base, half, flash, quick)
    ]
    show_speeds(results.values["sections"], base)
    print(f"written to {results.path}")
    left_out = [title for title, result in measured if "left_out" in result]
    if left_out:
        print(f"not measured, for want of time (--minutes): {', '.join(left_out)}")
    failures = [title for title, result in measured if "failed" in result]
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")


def in_time(section: str, settings: dict[str, Any], limit_s: float, end: float) -> dict[str, Any]:
    """A section within its own limit and what is left until `end`; `left_out` where the latter was too short."""
    left = end - time.monotonic()
    if left < LEAST_SECONDS:
        return {"left_out": "no time was left"}
    result = run(section, settings, min(limit_s, left))
    if left < limit_s and "failed" in result and result["seconds"] >= left:
        return {"left_out": f"{left:.0f} s were left and were too few"}
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that every section runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all sections together")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results"))
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu is for --quick alone; benchmarks/train_cpu.py measures a CPU")
    return arguments


def plan(base: Shape, half: str, flash: bool, quick: bool) -> list[tuple[str, str, dict[str, Any], float]]:
    """Title, section, settings and time limit in seconds of everything that is measured, the most important first."""

    def settings(shape: Shape, **more: Any) -> dict[str, Any]:
        return {"shape": dataclasses.asdict(shape), **more}

    def rows_of(block_size: int) -> Shape:
        return dataclasses.replace(base, block_size=block_size, micro_batch=TOKENS_PER_STEP // block_size)

    small = base if quick else dataclasses.replace(base, block_size=256, micro_batch=4)

    def speeds(shape: Shape) -> list[tuple[str, str, dict[str, Any], float]]:
        return [
            (f"speed {shape.block_size} x {shape.micro_batch} {variant}", "train",
             settings(shape, variant=variant, dtype=half, compiled=not quick), 150)
            for variant in ("ours", "hf_users", "hf_tuned")
        ]  # fmt: skip

    middle = base if quick else rows_of(512)
    sections = [
        ("numerics", "numerics", settings(small, dtype=half), 120),
        ("products", "gemm", settings(middle, dtype=half), 60),
        *speeds(middle),
    ]
    if not quick:
        sections += speeds(rows_of(1024))
    few = dataclasses.replace(base, windows=2, window=1, warmup=1)
    profiles = [("float32", "segments")] if quick else [("float16", "mask"), (half, "varlen" if flash else "mask")]
    for block_size, micro_batch, gib in [(64, 4, None)] if quick else LIMITED:
        for dtype, kernel in dict.fromkeys(profiles):
            shape = dataclasses.replace(few, block_size=block_size, micro_batch=micro_batch)
            title = f"memory {block_size} x {micro_batch} in {gib} GiB, {dtype}, {kernel}"
            sections.append((title, "memory", settings(shape, dtype=dtype, kernel=kernel, limit_gib=gib), 60))
    kernels = ["segments", "mask"] if quick else (["varlen"] if flash else []) + ["mask"]
    noisy = dataclasses.replace(middle, windows=10 if not quick else 2, window=1)
    sections += [
        ("loss alone", "loss_kernel", settings(middle, dtype=half, chunks=[256] if quick else [1024, 2048, 4096]), 60),
        ("attention alone", "attention_kernel", settings(middle, dtype=half, kernels=kernels), 60),
        ("two equal runs", "noise", settings(noisy, dtype=half, compiled=not quick), 90),
    ]
    return sections if quick else sections + speeds(rows_of(2048))


def report(title: str, result: dict[str, Any]) -> dict[str, Any]:
    """A line or a few about a section that has ended."""
    if "failed" in result:
        print(f"{title}: FAILED: {result['failed']}", flush=True)
    elif "left_out" in result:
        print(f"{title}: not measured: {result['left_out']}", flush=True)
    elif "out_of_memory" in result:
        print(f"{title}: DID NOT FIT: {result['out_of_memory']}", flush=True)
    elif "tokens_per_second" in result:
        peak = result["peak_bytes"] / GIB
        rate = median(result["tokens_per_second"])
        print(f"{title}: {rate:,.0f} tokens/s, {result['text_share']:.0%} text, peak {peak:.1f} GiB", flush=True)
    elif "planned_bytes" in result:
        word = "fits" if result["fits"] else "DOES NOT FIT"
        peak = f"{result['peak_bytes'] / GIB:.2f}" if "peak_bytes" in result else "-"
        print(f"{title}: {word}, peak {peak} GiB, planned {result['planned_bytes'] / GIB:.2f}", flush=True)
    else:
        rows = result.get("rows") or result.get("checks") or [{k: v for k, v in result.items() if k != "seconds"}]
        for row in rows:
            print(f"{title}: " + ", ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
    return result


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_speeds(sections: list[dict[str, Any]], base: Shape) -> None:
    """The table: speed, ratio to ours, shares of what the hardware could do, memory, an epoch."""
    rates = next((s for s in sections if s["title"] == "products" and "gemm_flops" in s), {})
    peak = rates.get("known_peak") or rates.get("gemm_flops")
    speeds = [section for section in sections if "tokens_per_second" in section or "out_of_memory" in section]
    if not speeds:
        return
    print(f"\n{'':<28}{'tokens/s':>10}{'ours is':>9}{'6N':>6}{'+att':>6}{'peak GiB':>10}{'epoch':>10}")
    for section in speeds:
        if "out_of_memory" in section:
            print(f"{section['title']:<28}  did not fit")
            continue
        block_size = int(section["title"].split()[1])
        rate = median(section["tokens_per_second"])
        ours = next((s for s in speeds if s["title"] == f"{section['title'].rsplit(' ', 1)[0]} ours"), section)
        costs = flops_per_token(model_config(base), block_size)
        shares = [rate / section["text_share"] * cost / peak if peak else 0.0 for cost in costs]
        print(
            f"{section['title']:<28}{rate:>10,.0f}{median(ours['tokens_per_second']) / rate:>8.2f}x"
            f"{shares[0]:>6.0%}{shares[1]:>6.0%}{section['peak_bytes'] / GIB:>10.2f}"
            f"{EPOCH_TOKENS / rate / 60:>6.1f} min"
        )


if __name__ == "__main__":
    main()
