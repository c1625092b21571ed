"""Training on this GPU in 4 minutes (H100), the most important first: speed beside the Trainer's, scoring, numerics.

    python benchmarks/train_gpu.py [--output benchmarks/results] [--minutes 4]
    python benchmarks/train_gpu.py --device cpu --quick     every section on a tiny model: that the script runs

Ours beside the HF Trainer tuned (packed rows, sdpa, torch.compile, fused AdamW) at 8,192, 16,384 and 131,072 positions
per step; the first step, and that of a second process, which finds the compiled code; scoring. With more minutes:
numerics; our training without each of the things that make it fast (`training_speed/switches.py`); the model's
products; the Trainer as its users run it (one text a row, padded, bf16), and blocks of 1024 and 2048; the exercise's
rows that ran out of memory, and those that are to fit in 15 GiB, in the T4's profile (fp16 with a gradient scaler, no
flash attention) and in bf16, under a limit on torch's memory; fused loss and attention alone beside their floor; how
far two equal runs lie apart. Speeds are tokens of text per second, padding not counted. The last thing printed is a
table in Markdown. Each section is a process of its own with a time limit, and is written down as soon as it ends; one
that fails is recorded, and the rest goes on. The exit status is 1 where the numerics fail or a section gave no result.
A Trainer for which memory does not suffice is a result, and so are the sections that `--minutes` leaves no time for.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cartilha.machine.peaks import data_sheet_flops
from cartilha.model.flash_attention_3 import PACKAGE
from training_speed.flops import flops_per_token, median
from training_speed.kernels import BOOLEAN_MASK
from training_speed.sections import Results, run
from training_speed.setup import Shape, model_config
from training_speed.switches import SWITCHES

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
        device=device, windows=3, window=10, warmup=3
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
    show_speeds(results.values["sections"], base, name)
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
    parser.add_argument("--minutes", type=float, default=4.0, help="of all sections together")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results"))
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu is for --quick alone; benchmarks/train_cpu.py measures a CPU")
    return arguments


Section = tuple[str, str, dict[str, Any], float]  # title, name, settings, time limit in seconds


def plan(base: Shape, half: str, flash: bool, quick: bool) -> list[Section]:
    """Everything that is measured, the most important first."""

    def settings(shape: Shape, **more: Any) -> dict[str, Any]:
        return {"shape": dataclasses.asdict(shape), **more}

    def rows_of(block_size: int) -> Shape:
        return dataclasses.replace(base, block_size=block_size, micro_batch=TOKENS_PER_STEP // block_size)

    def speeds(shape: Shape, *variants: str) -> list[Section]:
        name = f"{shape.block_size} x {shape.micro_batch}"
        how = {"dtype": half, "compiled": not quick}
        return [
            (f"speed {name} {variant}", "train", settings(shape, variant=variant, **how), 120) for variant in variants
        ]

    middle = base if quick else rows_of(512)
    few = dataclasses.replace(base, windows=2, window=1, warmup=1)
    large = dataclasses.replace(base, block_size=1024, micro_batch=128, at_once=32, windows=3, window=3, warmup=2)
    sections = []
    for shape in [base] if quick else [dataclasses.replace(base, micro_batch=16), middle, large]:
        sections += speeds(shape, "ours", "hf_tuned")
    again = dataclasses.replace(few, micro_batch=base.micro_batch if quick else 16)
    train_again = settings(again, variant="ours", dtype=half, compiled=not quick)
    small = base if quick else dataclasses.replace(base, block_size=256, micro_batch=4)
    scored = dataclasses.replace(middle, windows=1, window=1, warmup=32)  # as many texts as 35 steps take
    first = f"speed {again.block_size} x {again.micro_batch} ours"
    timed = dataclasses.replace(base, micro_batch=again.micro_batch)
    sections += [
        ("first step of a second process", "train", train_again, 60),
        ("scoring", "score", settings(scored, dtype=half, tokens=2_000 if quick else 500_000), 60),
        ("numerics", "numerics", settings(small, dtype=half), 120),
        *(
            (f"{first} without {name}", "train", {**train_again, **settings(timed), "without": name}, 60)
            for name in SWITCHES
            if name != "flash attention 3" or importlib.util.find_spec(PACKAGE)
        ),
        ("products", "gemm", settings(middle, dtype=half), 60),
        *speeds(middle, "hf_users"),
    ]
    if not quick:
        sections += speeds(rows_of(1024), "ours", "hf_tuned")
    return sections + _details(base, half, flash, quick) + ([] if quick else speeds(rows_of(2048), "ours", "hf_tuned"))


def _details(base: Shape, half: str, flash: bool, quick: bool) -> list[Section]:
    """Memory under limits, parts of a step alone, and two equal runs."""

    def settings(shape: Shape, **more: Any) -> dict[str, Any]:
        return {"shape": dataclasses.asdict(shape), **more}

    middle = base if quick else dataclasses.replace(base, micro_batch=TOKENS_PER_STEP // base.block_size)
    few = dataclasses.replace(base, windows=2, window=1, warmup=1)
    profiles = [("float32", "segments")] if quick else [("float16", "mask"), (half, "varlen" if flash else "mask")]
    sections: list[Section] = []
    for block_size, micro_batch, gib in [(64, 4, None)] if quick else LIMITED:
        for dtype, kernel in dict.fromkeys(profiles):
            shape = dataclasses.replace(few, block_size=block_size, micro_batch=micro_batch)
            title = f"memory {block_size} x {micro_batch} in {gib} GiB, {dtype}, {kernel}"
            sections.append((title, "memory", settings(shape, dtype=dtype, kernel=kernel, limit_gib=gib), 60))
    kernels = ["segments", "mask"] if quick else (["varlen"] if flash else []) + ["mask", BOOLEAN_MASK]
    noisy = dataclasses.replace(middle, windows=10 if not quick else 2, window=1)
    return [
        *sections,
        ("loss alone", "loss_kernel", settings(middle, dtype=half, chunks=[256] if quick else [1024, 4096, 8192]), 60),
        ("attention alone", "attention_kernel", settings(middle, dtype=half, kernels=kernels), 60),
        ("two equal runs", "noise", settings(noisy, dtype=half, compiled=not quick), 90),
    ]


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
        rate, first = median(result["tokens_per_second"]), result.get("first_step_s") or 0.0
        print(f"{title}: {rate:,.0f} tokens/s, {result['text_share']:.0%} text", end="")
        print(f", peak {peak:.1f} GiB, first step {first:.1f} s", flush=True)
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


def show_speeds(sections: list[dict[str, Any]], base: Shape, device_name: str) -> None:
    """The table in Markdown: speed, ratio to ours, shares of what the hardware could do, memory, an epoch."""
    rates = next((s for s in sections if s["title"] == "products" and "gemm_flops" in s), {})
    peak = data_sheet_flops(device_name, "bfloat16") or rates.get("gemm_flops")
    speeds = [section for section in sections if "tokens_per_second" in section or "out_of_memory" in section]
    print("\n| | tokens/s | ours is | 6N | with attention | peak GiB | first step, s | an epoch, min |")
    print("|---|---|---|---|---|---|---|---|")
    for section in speeds:
        title = section["title"].removeprefix("speed ")
        if "out_of_memory" in section:
            print(f"| {title} | did not fit | | | | | | |")
            continue
        rate, first = median(section["tokens_per_second"]), section.get("first_step_s")
        ours = next((s for s in speeds if s["title"].split() == [*section["title"].split()[:4], "ours"]), section)
        ratio = median(ours["tokens_per_second"]) / rate if "tokens_per_second" in ours else None
        costs = flops_per_token(model_config(base), int(title.split()[0])) if title[0].isdigit() else ()
        shares = [f"{rate / section['text_share'] * cost / peak:.0%}" if peak else "" for cost in costs] or ["", ""]
        cells = [
            *(title, f"{rate:,.0f}", f"{ratio:.2f}x" if ratio else "", *shares),
            *(f"{section['peak_bytes'] / GIB:.2f}", f"{first:.1f}" if first else "", f"{EPOCH_TOKENS / rate / 60:.1f}"),
        ]
        print(f"| {' | '.join(cells)} |")
    for section in sections:
        if "scored_per_second" in section:
            print(f"\nScoring: {section['scored_per_second']:,.0f} tokens/s of {section['num_tokens']:,}.")


if __name__ == "__main__":
    main()
