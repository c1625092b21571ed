"""`vocab --advise`: trains a model with its vocabulary as it is and extended, for the same time, and recommends one.

All that is tried goes through the pipeline's own commands: prepare, train, evaluate, compare. The documents that are
held out are the same for all, chosen by hash, and the new tokens are learnt on the training side alone.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cartilha.config import CompareConfig, EvaluateConfig, PrepareConfig, TrainConfig, VocabConfig
from cartilha.corpus.english import english_sample
from cartilha.corpus.readers import read_documents
from cartilha.corpus.records import ReadSettings
from cartilha.errors import UserError, counted
from cartilha.pipeline.compare import compare
from cartilha.pipeline.evaluate import evaluate
from cartilha.pipeline.prepare import prepare
from cartilha.pipeline.train import train
from cartilha.pipeline.vocab_extension import write_extension
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import load_tokenizer
from cartilha.tokens.vocabulary import check_extendable, count_words, extend, first_new_tokens, learn_merges
from cartilha.units import parse_duration

log = logging.getLogger("cartilha")

TRIED = (4000, 8000)
SAMPLE_CHARS = 20_000_000  # of the text; more than any budget of an hour reads
HELD_OUT = 0.1
LEAST_HELD_OUT = 5  # documents; the sign-flip test needs as many to find anything
HELD_OUT_BYTES = 100_000  # scored with each model after its training
BATCH_TOKENS = 2048  # small steps, so that a short budget has many
BLOCK_SIZE = 512
EMBEDDINGS_FIRST = "5%"
MANY_EPOCHS = 100_000  # the time decides


@dataclass(frozen=True)
class _Tried:
    """One vocabulary after its training: its model, store and saved evaluations."""

    num_new: int
    model: str
    trained: dict[str, Any]
    evaluations: dict[str, str]


def advise(config: VocabConfig) -> dict[str, Any]:
    """Try, compare and recommend; the record that `vocab --json` carries.

    Raises:
        UserError: No time to speak of, a tokenizer that cannot be extended, or a text too small to learn or hold out.
    """
    budget = parse_duration(config.time_budget)
    assert budget is not None
    tokenizer = load_tokenizer(config.model)
    check_extendable(tokenizer, config.model)
    with _work_directory(config) as work:
        num_documents = _sample_size(config)
        keep_store = _prepare(config, config.model, work / "keep", num_documents)
        store = TokenStore(keep_store)
        if store.counts["validation"].num_documents < LEAST_HELD_OUT:  # said before the time is spent
            raise UserError(
                f"The text is too small to compare on: of its documents {store.counts['validation'].num_documents} "
                f"would be held out, and {LEAST_HELD_OUT} are needed; give more documents."
            )
        words = count_words(tokenizer, (document.text for document in store.read_documents("train")))
        merges, before = learn_merges(tokenizer, words, max(TRIED))
        learnt = sum(merge.is_new for merge in merges)
        if not learnt:
            raise UserError("The text is too small to learn new tokens from: no pair occurs twice; give more text.")
        sizes = sorted({min(size, learnt) for size in TRIED})
        if learnt < max(TRIED):
            log.warning("The text is enough for %s only.", counted(learnt, "new token"))
        seconds = budget / (1 + len(sizes))
        limit = _num_held_out(store)
        tried = [_try(config, work / "keep", 0, config.model, keep_store, seconds, keep_store, limit)]
        lr = tried[0].trained["settings"]["lr"]
        for size in sizes:
            place = work / f"plus-{size}"
            extension = extend(tokenizer, first_new_tokens(merges, size), before)
            write_extension(config.model, tokenizer, extension, place / "model", {"input": list(config.input)})
            extended = _prepare(config, str(place / "model"), place, num_documents)
            tried.append(_try(config, place, size, str(place / "model"), extended, seconds, keep_store, limit, lr))
        return _recommend(tried, seconds)


@contextmanager
def _work_directory(config: VocabConfig) -> Iterator[Path]:
    """`--output`, where the runs stay, or a temporary directory."""
    if config.output:
        yield Path(config.output)
        return
    with tempfile.TemporaryDirectory(prefix="cartilha-vocab-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _sample_size(config: VocabConfig) -> int:
    """Documents of the sample: the first ones, up to some megabytes of text."""
    documents = read_documents(config.input, ReadSettings.of(config), limit_documents=config.limit_documents)
    num_documents = num_chars = 0
    for document in documents:
        num_documents += 1
        num_chars += len(document.text)
        if num_chars >= SAMPLE_CHARS:
            log.info("The sample is the first %s.", counted(num_documents, "document"))
            break
    if not num_documents:
        raise UserError(f"The input holds no text ({', '.join(config.input)}); check the files and --text_column.")
    return num_documents


def _prepare(config: VocabConfig, model: str, place: Path, num_documents: int) -> str:
    settings = PrepareConfig(
        input=config.input,
        model=model,
        output=str(place / "store"),
        validation_fraction=HELD_OUT,
        seed=config.seed,
        limit_documents=num_documents,
        **vars(ReadSettings.of(config)),
    )
    return prepare(settings).store


def _num_held_out(store: TokenStore) -> int:
    """Documents to score: the first ones of the validation side, up to some kilobytes."""
    sizes = store.documents("validation").num_bytes.cumsum()
    return min(len(sizes), 1 + int((sizes < HELD_OUT_BYTES).sum()))


def _try(
    config: VocabConfig,
    place: Path,
    num_new: int,
    model: str,
    store: str,
    seconds: float,
    scored_store: str,
    limit_documents: int,
    lr: float | Literal["auto"] = "auto",
) -> _Tried:
    """Train one for its share of the time, and score it on the held-out text and on English."""
    settings = TrainConfig(
        model=model,
        store=store,
        output=str(place / "run"),
        time_budget=f"{seconds}s",
        epochs=MANY_EPOCHS,
        block_size=BLOCK_SIZE,
        batch_tokens=BATCH_TOKENS,
        lr=lr,
        embeddings_first=EMBEDDINGS_FIRST if num_new else "0%",
        seed=config.seed,
        device=config.device,
        validation_tokens=1,
    )
    trained = train(settings).results
    english = place / "english.txt"
    english.write_text("\n".join(english_sample()) + "\n", encoding="utf-8")
    texts: dict[str, dict[str, Any]] = {
        "held_out": {"store": scored_store, "limit_documents": limit_documents},
        "english": {"input": (str(english),)},
    }
    saved = {}
    for name, text in texts.items():
        saved[name] = str(place / f"{name}.parquet")
        final = str(place / "run" / "model")
        evaluate(EvaluateConfig(model=(final,), save=saved[name], device=config.device, **text))
    return _Tried(num_new, model, trained, saved)


def _recommend(tried: list[_Tried], seconds: float) -> dict[str, Any]:
    keep, *extended = tried
    rows = []
    for one in extended:
        found = {
            name: compare(CompareConfig(evaluations=(keep.evaluations[name], one.evaluations[name]))).to_dict()
            for name in keep.evaluations
        }
        held_out = found["held_out"]
        tokens = [row["num_tokens"] for row in held_out["evaluations"]]
        rows.append(
            {
                "num_new": one.num_new,
                "bits_per_byte_keep": held_out["bits_per_byte_first"],
                "bits_per_byte": held_out["bits_per_byte_second"],
                "difference": held_out["bits_per_byte_difference"],
                "interval": held_out["bits_per_byte_difference_interval"],
                "p_value": held_out["p_value"],
                "num_documents": held_out["num_documents"],
                "share_of_tokens": tokens[1] / tokens[0],
                "difference_english": found["english"]["bits_per_byte_difference"],
                "tokens_trained": one.trained["tokens"],
                "tokens_trained_keep": keep.trained["tokens"],
            }
        )
    recommended, sentences = recommend(rows, seconds)
    return {"seconds_each": seconds, "tried": rows, "recommended": recommended, "sentences": sentences}


def recommend(rows: list[dict[str, Any]], seconds: float) -> tuple[int, list[str]]:
    """What to take (0: the vocabulary as it is) and two sentences that say why.

    An extension must be better by more than chance: the interval of its paired difference lies below zero. Of two that
    are, the better one is taken.

    Args:
        rows: One an extension: `num_new`, `difference`, `interval`, `share_of_tokens`, `difference_english`, ...
        seconds: Training time of each.
    """
    best = min(rows, key=lambda row: float(row["difference"]))
    sure = best["interval"][1] is not None and best["interval"][1] < 0
    size, change = f"{best['num_new']:,}", f"{best['difference']:+.3f}"
    low, high = best["interval"]
    interval = "no interval" if low is None or high is None else f"95 % interval {low:+.3f} to {high:+.3f}"
    measured = (
        f"after {_minutes(seconds)} of training each, +{size} tokens differ from the vocabulary as it is by {change} "
        f"bits per byte ({interval}, {counted(best['num_documents'], 'held-out document')})"
    )
    share, english = f"{1 - best['share_of_tokens']:.0%}", f"{best['difference_english']:+.3f}"
    if sure:
        return best["num_new"], [
            f"Extend by {size} tokens: {measured}.",
            f"The text takes {share} fewer tokens then, and English changed by {english} bits per byte.",
        ]
    worse = best["interval"][0] is not None and best["interval"][0] > 0
    return 0, [
        f"Keep the vocabulary{'' if worse else ', for want of a clear difference'}: {measured}.",
        f"With {share} fewer tokens the extended one reads more text in the same time, so what is to be trained for "
        "longer is worth trying with a longer --time_budget.",
    ]


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
