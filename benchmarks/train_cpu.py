"""Training speed and memory on this CPU: ours beside the HF Trainer, in alternation, the same model and texts.

    python benchmarks/train_cpu.py --text FILE --tokenizer DIR [--rounds 2] [--steps 3] [--variants ours:float32 ...]

OPT-125M's shape with fresh weights; each measurement is a process of its own, whose first step is not counted. Numerics
first. Speeds are tokens of text a second: `hf_users` puts one text a row and pads, and its padding does not count.
`share` is of the machine's own rate in that dtype for the model's own products: by 6N, N being the weights that are
multiplied (the tied head once, tables that are looked up not at all), and by 6N and the causal half of attention.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from training_speed.flops import flops_per_token, median
from training_speed.sections import run
from training_speed.setup import Shape, model_config

ALL = [f"{kind}:{dtype}" for dtype in ("float32", "bfloat16") for kind in ("ours", "hf_users", "hf_packed", "hf_tuned")]


def main() -> None:
    arguments = parse()
    shape = Shape(
        model=arguments.model, block_size=arguments.block_size, micro_batch=arguments.micro_batch,
        windows=arguments.steps, text=arguments.text, tokenizer=arguments.tokenizer,
    )  # fmt: skip
    if not arguments.skip_numerics:
        check_numerics(shape)
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in arguments.variants}
    for number in range(arguments.rounds):
        for variant in arguments.variants:
            kind, dtype = variant.split(":")
            result = run("train", {"shape": dataclasses.asdict(shape), "variant": kind, "dtype": dtype}, 600)
            reason = result.get("failed") or result.get("out_of_memory")
            if reason:
                print(f"round {number + 1}: {variant} failed: {reason}", flush=True)
                continue
            found[variant].append(result)
            print(f"round {number + 1}: {variant}: {median(result['tokens_per_second']):.0f} tokens/s", flush=True)
    show(shape, found)
    if not all(found.values()):
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-125m", choices=("opt-125m", "tiny-opt"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--text", help="one text a line; default random tokens in texts as long as those on the web")
    parser.add_argument("--tokenizer")
    parser.add_argument("--variants", nargs="+", default=ALL[:4], choices=ALL, metavar="KIND:DTYPE")
    parser.add_argument("--skip_numerics", action="store_true")
    return parser.parse_args()


def check_numerics(shape: Shape) -> None:
    small = dataclasses.replace(shape, block_size=min(128, shape.block_size), micro_batch=2)
    result = run("numerics", {"shape": dataclasses.asdict(small), "dtype": "bfloat16"}, 300)
    for row in result.get("checks", []):
        figures = ", ".join(f"{key} {row[key]:.1e}" for key in ("loss", "gradient") if key in row)
        print(f"numerics: {row['name']}: {figures} {'' if row['ok'] else 'FAILED'}")
    if "failed" in result:
        sys.exit(f"numerics failed: {result['failed']}")


def show(shape: Shape, found: dict[str, list[dict[str, Any]]]) -> None:
    rates = {}
    for dtype in dict.fromkeys(variant.split(":")[1] for variant in found):
        rates[dtype] = run("gemm", {"shape": dataclasses.asdict(shape), "dtype": dtype}, 120).get("gemm_flops")
        if rates[dtype]:
            print(f"the model's own products in {dtype}: {rates[dtype] / 1e9:.0f} GFLOP/s")
    by_products, with_attention = flops_per_token(model_config(shape), shape.block_size)
    print(f"\n{'variant':<20}{'tokens/s':>9}{'min':>7}{'max':>7}{'text':>7}{'6N':>6}{'+att':>6}{'peak GiB':>10}")
    for variant, results in found.items():
        if not results:
            continue
        speeds = [speed for result in results for speed in result["tokens_per_second"]]
        share, rate = results[0]["text_share"], rates[variant.split(":")[1]]
        computed = median(speeds) / share / rate if rate else 0.0
        peak = max(result["peak_bytes"] for result in results) / 2**30
        print(
            f"{variant:<20}{median(speeds):>9.0f}{min(speeds):>7.0f}{max(speeds):>7.0f}{share:>7.0%}"
            f"{computed * by_products:>6.0%}{computed * with_attention:>6.0%}{peak:>10.2f}"
        )


if __name__ == "__main__":
    main()
