"""`vocab --advise`: trains a model with its vocabulary as it is and extended, for the same time, and recommends one.

Each trial runs the pipeline's own commands: prepare, train, evaluate, compare. All trials hold out the same documents,
chosen by hash, and the new tokens are learnt on the training side alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cartilha.config import CompareConfig, EvaluateConfig, PrepareConfig, Rate, TrainConfig, VocabConfig
from cartilha.corpus.english import english_sample
from cartilha.corpus.readers import first_documents, input_documents
from cartilha.errors import UserError, counted, log
from cartilha.pipeline.compare import compare
from cartilha.pipeline.evaluate import evaluate
from cartilha.pipeline.prepare import prepare
from cartilha.pipeline.train import train
from cartilha.pipeline.vocab_extension import write_extension
from cartilha.storage import to_json
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import load_tokenizer
from cartilha.tokens.vocabulary import check_extendable, count_words, extend, learn_merges
from cartilha.units import parse_duration

TRIED = (4000, 8000)
SAMPLE_CHARS = 20_000_000  # more than a training of an hour reads
HELD_OUT = 0.1
LEAST_HELD_OUT = 5  # documents; with fewer, the sign-flip test cannot find anything
HELD_OUT_BYTES = 100_000  # scored with each model after its training
BATCH_TOKENS = 1024  # small steps, so that a short budget has many
BLOCK_SIZE = 512
EMBEDDINGS_FIRST = "5%"
MANY_EPOCHS = 100_000  # the time budget ends the training

Texts = dict[str, dict[str, Any]]  # by name: options of `evaluate` that say what to score


@dataclass(frozen=True)
class _Tried:
    """One vocabulary after its training: the run's results, and the directory with an evaluation for each text."""

    num_new: int
    trained: dict[str, Any]
    place: Path


def advise(config: VocabConfig) -> dict[str, Any]:
    """Try, compare and recommend; a UserError says that the tokenizer cannot be extended, or the text is too small."""
    budget = parse_duration(config.time_budget)
    assert budget is not None
    tokenizer = load_tokenizer(config.model)
    check_extendable(tokenizer, config.model)
    temporary = TemporaryDirectory(prefix="cartilha-vocab-", ignore_cleanup_errors=True)
    with nullcontext(config.output) if config.output else temporary as place:  # the runs stay in an --output
        work = Path(place)
        sample, keep = _sample(config, work), work / "keep"
        store = _prepare(config, config.model, keep, sample)
        num_held_out = store.counts["validation"].num_documents
        if num_held_out < LEAST_HELD_OUT:  # refused before the time is spent
            raise UserError(
                f"The text is too small to compare on: {counted(num_held_out, 'document')} would be held out, and "
                f"{LEAST_HELD_OUT} are needed; give more documents."
            )
        words = count_words(tokenizer, (document.text for document in store.read_documents("train")))
        learnt = learn_merges(tokenizer, words, max(TRIED))
        if not learnt.num_new:
            raise UserError("The text is too small to learn new tokens from: no pair occurs twice; give more text.")
        if learnt.num_new < max(TRIED):
            log.warning("The text is enough for %s only.", counted(learnt.num_new, "new token"))
        sizes = sorted({min(size, learnt.num_new) for size in TRIED})
        seconds, texts = budget / (1 + len(sizes)), _scored_texts(store, work)
        tried = [_try(config, seconds, texts, keep, 0)]
        for size in sizes:
            plus = work / f"plus-{size}"
            origin = {"input": list(config.input)}
            write_extension(config.model, tokenizer, extend(learnt, size), plus / "model", origin)
            _prepare(config, str(plus / "model"), plus, sample)
            tried.append(_try(config, seconds, texts, plus, size, tried[0].trained["settings"]["lr"]))
        return _advice(tried, seconds)


def _sample(config: VocabConfig, work: Path) -> Path:
    """A file with the first documents, up to `SAMPLE_CHARS`, so that the input is read once."""
    documents, path = input_documents(config), work / "sample.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    num_documents = 0
    with path.open("w", encoding="utf-8") as file:
        for document in first_documents(documents, SAMPLE_CHARS):
            file.write(to_json({"text": document.text, "domain": document.domain}) + "\n")
            num_documents += 1
    if next(documents, None) is not None:
        log.info("The sample is the first %s.", counted(num_documents, "document"))
    return path


def _prepare(config: VocabConfig, model: str, place: Path, sample: Path) -> TokenStore:
    settings = PrepareConfig(
        input=(str(sample),),
        model=model,
        output=str(place / "store"),
        validation_fraction=HELD_OUT,
        seed=config.seed,
    )
    return TokenStore(prepare(settings).store)


def _scored_texts(store: TokenStore, work: Path) -> Texts:
    """Two texts as `evaluate` takes them: the first held-out documents, up to `HELD_OUT_BYTES`, and English."""
    sizes = store.documents("validation").num_bytes.cumsum()
    num_documents = min(len(sizes), 1 + int((sizes < HELD_OUT_BYTES).sum()))
    english = work / "english.txt"
    english.write_text("\n".join(english_sample()) + "\n", encoding="utf-8")
    return {
        "held_out": {"store": str(store.path), "limit_documents": num_documents},
        "english": {"input": (str(english),)},
    }


def _try(config: VocabConfig, seconds: float, texts: Texts, place: Path, num_new: int, lr: Rate = "auto") -> _Tried:
    """Train a model on the store in `place` for so many seconds, and score it on each text."""
    run = place / "run"
    settings = TrainConfig(
        model=str(place / "model") if num_new else config.model,
        store=str(place / "store"),
        output=str(run),
        time_budget=f"{seconds}s",
        epochs=MANY_EPOCHS,
        block_size=BLOCK_SIZE,
        batch_tokens=BATCH_TOKENS,
        lr=lr,
        embeddings_first=EMBEDDINGS_FIRST if num_new else "0%",
        seed=config.seed,
        device=config.device,
        validation_tokens=1,
        skip_english=True,  # it is compared in detail below
    )
    trained = train(settings).results
    for name, text in texts.items():
        saved = str(place / f"{name}.parquet")
        evaluate(EvaluateConfig(model=(str(run / "model"),), save=saved, device=config.device, **text))
    return _Tried(num_new, trained, place)


def _advice(tried: list[_Tried], seconds: float) -> dict[str, Any]:
    keep, *extended = tried
    rows = []
    for one in extended:
        held_out, english = (
            compare(CompareConfig(evaluations=tuple(str(each.place / name) for each in (keep, one)))).to_dict()
            for name in ("held_out.parquet", "english.parquet")
        )
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
                "difference_english": english["bits_per_byte_difference"],
                "tokens_trained": one.trained["tokens"],
                "tokens_trained_keep": keep.trained["tokens"],
            }
        )
    recommended, sentences = recommend(rows, seconds)
    return {"seconds_each": seconds, "tried": rows, "recommended": recommended, "sentences": sentences}


def recommend(rows: list[dict[str, Any]], seconds: float) -> tuple[int, list[str]]:
    """The number of new tokens to take (0: keep the vocabulary), and two sentences that say why.

    The best extension is recommended if it is better by more than chance: the interval of its paired difference must
    lie below zero. Each has been trained for `seconds`; a row is one of the advice's `tried`.
    """
    best = min(rows, key=lambda row: float(row["difference"]))
    low, high = best["interval"] or (None, None)
    interval = "no interval" if low is None or high is None else f"95 % interval {low:+.3f} to {high:+.3f}"
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    measured = (
        f"after {time} of training each, +{best['num_new']:,} tokens differ from the vocabulary as it is by "
        f"{best['difference']:+.3f} bits per byte ({interval}, {counted(best['num_documents'], 'held-out document')})"
    )
    share = f"{1 - best['share_of_tokens']:.0%}"
    if high is not None and high < 0:
        return best["num_new"], [
            f"Extend by {best['num_new']:,} tokens: {measured}.",
            f"The text then takes {share} fewer tokens, and English changed by {best['difference_english']:+.3f} bits "
            "per byte.",
        ]
    is_worse = low is not None and low > 0
    return 0, [
        f"Keep the vocabulary{'' if is_worse else ', for want of a clear difference'}: {measured}.",
        f"With {share} fewer tokens the extended one reads more text in the same time; for a longer training, try "
        "again with a longer --time_budget.",
    ]
