"""Why your number differs: the usual mistakes of a perplexity, each made on purpose beside the figure of `evaluate`.

    python benchmarks/why_numbers_differ.py [--epochs 6] [--seed 0] [--keep DIR]

The corpus is the primer, its 20 % held out as `prepare` does, each side cut anew into documents whose lengths spread as
they do on the web (log-normal, median 800 bytes, the log's standard deviation 1; the primer's own are nearly equal).
Byte-level models in the shape of `random:tiny`, with a context of 2,048, learn from it in a minute or so each: `packed`
as `cartilha train` does it, `memorised` likewise from a tenth of the documents in ten times the epochs, `padded` as the
notebooks do, from rows filled up with pads that are scored. `--keep` leaves them and the corpus in a directory. Every
figure is of a model that sits on disk, beside what `cartilha evaluate` says of the same files. Float32, seeded: the
same machine gives the same table.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from cartilha import EvaluateConfig, evaluate
from cartilha.blocks.packing import Batch, stack
from cartilha.blocks.sampler import BlockSampler
from cartilha.corpus.document import Document
from cartilha.corpus.readers import read_documents
from cartilha.corpus.splits import SPLITS, Split, choose_split
from cartilha.evaluation.documents import encode_documents
from cartilha.evaluation.measures import Evaluation
from cartilha.evaluation.nll import score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.evaluation.windows import make_protocol
from cartilha.model.forward import batch_nll, scored_tokens
from cartilha.model.load import LoadedModel, load_model
from cartilha.tokens.packed import PackedDocuments
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.optimizer import make_optimizer
from cartilha.training.schedule import Schedule
from cartilha.training.state import TrainingState

CONTEXT = 2048
BLOCKS_PER_STEP = 2
LR = 5e-3
TRAINER_BATCH = 8  # the exercise's
MEDIAN_BYTES, SIGMA = 800, 1.0
PAD_ID = 258  # of `random:tiny`: in no text
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FirstSteps:
    """What a training log shows of a fresh model.

    Attributes:
        first: Loss of the first step, on its batch before the update; `updated` on the same batch after it.
        mean_of_ten: Mean loss of the first ten steps: the first line of a log with logging_steps = 10.
    """

    first: float
    updated: float
    mean_of_ten: float


def web_like(texts: Sequence[str], generator: np.random.Generator) -> list[str]:
    """The texts as one, cut at ends of sentences into documents of log-normal length."""
    text, begin, documents = "\n".join(texts), 0, []
    while begin < len(text):
        wanted = begin + round(MEDIAN_BYTES * math.exp(generator.normal(0, SIGMA)))
        ends = [end for mark in (". ", "\n") if (end := text.find(mark, wanted)) >= 0]
        past = min(ends, default=len(text)) + 1
        document = text[begin:past].strip()
        if document:
            documents.append(document)
        begin = past
    return documents


def make_corpus(directory: Path, seed: int) -> dict[Split, list[Document]]:
    """Both sides, each also as a file for `evaluate`."""
    generator = np.random.default_rng(seed)
    primer = list(read_documents(("primer",)))
    documents: dict[Split, list[Document]] = {}
    for split in SPLITS:
        texts = web_like([d.text for d in primer if choose_split(d.text_hash, 0.2, 0) == split], generator)
        documents[split] = write_documents(directory / f"{split}.jsonl", texts)
    return documents


def write_documents(path: Path, texts: Sequence[str]) -> list[Document]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return list(read_documents((str(path),)))


def fresh_model(tokenizer: TextTokenizer, seed: int) -> LoadedModel:
    loaded = load_model("random:tiny", CPU, tokenizer=tokenizer, seed=seed)
    loaded.model.config.max_position_embeddings = CONTEXT  # its positions are rotary: no weight depends on it
    return loaded


def save(loaded: LoadedModel, tokenizer: TextTokenizer, path: Path) -> str:
    loaded.model.save_pretrained(path)
    tokenizer.save(path)
    return str(path)


def train_packed(
    loaded: LoadedModel, tokenizer: TextTokenizer, ids: list[np.ndarray], epochs: int, seed: int
) -> FirstSteps:
    """As `cartilha train` does: full blocks, every token once an epoch, no pad scored."""
    documents = PackedDocuments.from_ids(ids, tokenizer.prefix_id, tokenizer.end_id)
    sampler = BlockSampler(documents, block_size=CONTEXT, blocks_per_step=BLOCKS_PER_STEP, seed=seed)
    schedule = Schedule(epochs * sampler.steps_per_epoch, LR, warmup_fraction=0.05, final_lr_fraction=0.1)
    losses, updated = [], math.nan
    state = TrainingState.begin(loaded.model, torch.float32, lr=LR, weight_decay=0.1)
    for record in train_steps(state, sampler, schedule, StepSettings(torch.float32, BLOCKS_PER_STEP)):
        losses.append(float(record.loss))
        if record.step == 1:
            batch = stack(sampler.blocks(0))
            with torch.no_grad():
                updated = float(batch_nll(loaded.model, batch, torch.float32)) / batch.num_targets
    return FirstSteps(losses[0], updated, float(np.mean(losses[:10])))


def padded_rows(ids: Sequence[np.ndarray], tokenizer: TextTokenizer, length: int) -> np.ndarray:
    """Each document in rows of `length`, each with a prefix, the last one filled up with pads; nothing is lost."""
    rows = []
    for document in ids:
        for begin in range(0, len(document), length - 1):
            piece = document[begin : begin + length - 1]
            row = np.full(length, PAD_ID, np.int64)
            row[0], row[1 : 1 + len(piece)] = tokenizer.prefix_id, piece
            rows.append(row)
    return np.stack(rows)


def row_batch(rows: np.ndarray) -> Batch:
    """Rows as the notebooks score them: every position, pads included, is a target."""
    num_rows, length = rows.shape[0], rows.shape[1] - 1
    positions = np.tile(np.arange(length), (num_rows, 1))
    return Batch(rows[:, :-1].copy(), rows[:, 1:].copy(), positions, np.full(num_rows, length, np.int64))


def train_padded(loaded: LoadedModel, rows: np.ndarray, epochs: int, seed: int) -> None:
    """As the notebooks do: one document or piece a row, pads scored like text."""
    optimizer = make_optimizer(loaded.model, LR, weight_decay=0.1)
    steps_per_epoch = -(-len(rows) // BLOCKS_PER_STEP)
    schedule = Schedule(epochs * steps_per_epoch, LR, warmup_fraction=0.05, final_lr_fraction=0.1)
    generator = np.random.default_rng(seed)
    for step in range(schedule.num_steps):
        if step % steps_per_epoch == 0:
            order = generator.permutation(len(rows))
        at = step % steps_per_epoch * BLOCKS_PER_STEP
        batch = row_batch(rows[order[at : at + BLOCKS_PER_STEP]])
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step)
        (batch_nll(loaded.model, batch, torch.float32) / batch.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def score_rows(loaded: LoadedModel, rows: np.ndarray) -> tuple[float, float, int, int]:
    """Nats of the text, nats of the pads, tokens of the text, pads."""
    text = pads = 0.0
    for begin in range(0, len(rows), 4):
        batch = row_batch(rows[begin : begin + 4])
        nll = scored_tokens(loaded.model, batch, torch.float32).nll.double().numpy()
        is_pad = batch.targets.ravel() == PAD_ID
        text, pads = text + nll[~is_pad].sum(), pads + nll[is_pad].sum()
    num_pads = int((rows[:, 1:] == PAD_ID).sum())
    return text, pads, rows[:, 1:].size - num_pads, num_pads


def document_sums(loaded: LoadedModel, tokenizer: TextTokenizer, documents: list[Document], name: str) -> np.ndarray:
    """Nats and tokens of each document under a protocol: shape (num_documents, 2)."""
    protocol = make_protocol(name, None, None, prefix_id=tokenizer.prefix_id, dtype="float32", context_length=CONTEXT)
    scored = encode_documents(documents, tokenizer, protocol.first_tokens)
    nll = score_documents(Scorer(loaded, tokenizer, protocol), scored).nll
    return np.stack([nll, scored.num_tokens], axis=1)


def mean_of_batches(sums: np.ndarray, batch_size: int) -> tuple[float, float]:
    """Exp of the mean of batch losses, as HF's Trainer has it (weighted by documents); mean of batch perplexities."""
    batches = [sums[i : i + batch_size] for i in range(0, len(sums), batch_size)]
    losses = np.array([batch[:, 0].sum() / batch[:, 1].sum() for batch in batches])
    sizes = [len(batch) for batch in batches]
    return math.exp(np.average(losses, weights=sizes)), float(np.average(np.exp(losses), weights=sizes))


def error(figure: float, right: float) -> str:
    return f"{figure / right - 1:+.1%}".replace("%", " %")


def figure_row(label: str, nats: float, divided_by: float, right: Evaluation, figure: float | None = None) -> str:
    shown = math.exp(nats / divided_by) if figure is None else figure
    cells = [label, f"{nats:,.0f}", f"{divided_by:,.0f}", f"{shown:.3f}", f"{right.perplexity:.3f}"]
    return "| " + " | ".join([*cells, error(shown, right.perplexity)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None)
    arguments = parser.parse_args()
    logging.getLogger("cartilha").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # the model is so small that more threads wait for each other
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
        measure(arguments.keep, arguments.epochs, arguments.seed)
    else:
        with tempfile.TemporaryDirectory() as directory:
            measure(Path(directory), arguments.epochs, arguments.seed)


def measure(directory: Path, epochs: int, seed: int) -> None:
    begin = time.perf_counter()
    tokenizer = load_tokenizer("random:tiny")
    documents = make_corpus(directory, seed)
    ids = {split: tokenizer.encode([d.text for d in documents[split]]) for split in SPLITS}

    few = documents["train"][: len(documents["train"]) // 10]
    write_documents(directory / "few.jsonl", [d.text for d in few])

    def right(model: str, split: str = "validation", protocol: str = "full") -> Evaluation:
        text = (str(directory / f"{split}.jsonl"),)
        config = EvaluateConfig(model=(model,), input=text, protocol=protocol, dtype="float32", device="cpu")
        return evaluate(config).evaluations[0]

    packed, memorised, padded = (fresh_model(tokenizer, seed) for _ in range(3))
    initial = right(save(packed, tokenizer, directory / "initial"))
    first_steps = train_packed(packed, tokenizer, ids["train"], epochs, seed)
    path = save(packed, tokenizer, directory / "packed")
    train_packed(memorised, tokenizer, ids["train"][: len(few)], 10 * epochs, seed)
    memorised_path = save(memorised, tokenizer, directory / "memorised")
    train_padded(padded, padded_rows(ids["train"], tokenizer, CONTEXT), epochs, seed)
    true_padded = right(save(padded, tokenizer, directory / "padded"))

    true = right(path)
    sums = document_sums(packed, tokenizer, documents["validation"], "full")
    assert math.isclose(sums[:, 0].sum(), true.total.nll, rel_tol=1e-9)
    cut = document_sums(packed, tokenizer, documents["validation"], "first-512")
    on_train, first = right(path, "train").total, right(path, protocol="first-128").total
    print(
        f"{len(ids['train'])} training documents of {sum(map(len, ids['train'])):,} tokens (bytes), {len(sums)} held "
        f"out of {true.total.num_tokens:,}; {epochs} epochs, seed {seed}; {true.bits_per_byte:.4f} bits per byte. "
        f"Cutting at 512 keeps {cut[:, 1].sum() / true.total.num_tokens:.0%} of the tokens, at 128 "
        f"{first.num_tokens / true.total.num_tokens:.0%}.\n".replace("%", " %")
    )
    print("| the exercise | the mistake | nats | divided by | figure | `evaluate` | error |")
    print("|---|---|---:|---:|---:|---:|---:|")
    figure = mean_of_batches(cut, TRAINER_BATCH)[0]
    print(figure_row("9.67 | cut at 512, mean over batches of 8", cut[:, 0].sum(), cut[:, 1].sum(), true, figure))
    label = f"9.29 | scored on the training text ({len(documents['train'])} documents, {epochs} epochs)"
    print(figure_row(label, on_train.nll, on_train.num_tokens, true))
    on_few = right(memorised_path, "few").total
    label = f"9.29 | the same, {len(few)} documents, {10 * epochs} epochs"
    print(figure_row(label, on_few.nll, on_few.num_tokens, right(memorised_path)))
    print(figure_row("10.08 | first 128 tokens only", first.nll, first.num_tokens, true))
    for exercise, length in (("7.25", 512), ("3.46", CONTEXT)):
        text, pads, num_text, num_pads = score_rows(padded, padded_rows(ids["validation"], tokenizer, length))
        assert num_text == true.total.num_tokens
        label = f"rows of {length}, {num_pads / (num_text + num_pads):.0%} pads scored ({pads:,.0f} nats)"
        label = f"{exercise} | {label.replace('%', ' %')}"
        print(figure_row(label, text + pads, num_text + num_pads, true_padded))
    print_first_steps(first_steps, initial)
    print_means(sums, true)
    print(f"\n{time.perf_counter() - begin:.0f} s")


def print_first_steps(steps: FirstSteps, initial: Evaluation) -> None:
    print("\n| taken for the initial perplexity | figure | `evaluate` | error |\n|---|---:|---:|---:|")
    for label, loss in (
        ("loss of the first step (one training batch, before the update)", steps.first),
        ("the same batch after the update", steps.updated),
        ("mean loss of the first ten steps (a log's first line)", steps.mean_of_ten),
    ):
        shown = math.exp(loss)
        print(f"| {label} | {shown:.1f} | {initial.perplexity:.1f} | {error(shown, initial.perplexity)} |")


def print_means(sums: np.ndarray, true: Evaluation) -> None:
    print("\n| documents a batch | exp of the mean of batch losses | error | mean of batch perplexities | error |")
    print("|---:|---:|---:|---:|---:|")
    for batch_size in (1, 4, 16):
        of_losses, of_perplexities = mean_of_batches(sums, batch_size)
        errors = [error(value, true.perplexity) for value in (of_losses, of_perplexities)]
        print(f"| {batch_size} | {of_losses:.3f} | {errors[0]} | {of_perplexities:.3f} | {errors[1]} |")


if __name__ == "__main__":
    main()
