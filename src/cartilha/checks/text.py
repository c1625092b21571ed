"""Checks of the text and its tokenizer: nothing here needs the model's weights."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, zip_longest

import numpy as np

from cartilha.checks.outcome import CheckResult, Judgement, Subject
from cartilha.corpus.english import english_sample
from cartilha.corpus.near_duplicates import has_near_duplicate
from cartilha.errors import UserError, counted
from cartilha.evaluation.questions import questions_in
from cartilha.evaluation.scorer import unused_ids
from cartilha.model.embeddings import input_rows
from cartilha.model.head import head_of
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import TextTokenizer

MAX_LOST_SHARE = 0.01  # of the bytes: beyond it the byte figures are refused (docs/measures.md)
MAX_UNKNOWN_SHARE = 0.001
MAX_NEAR_SHARE = 0.05
MAX_KNOWN_SHARE = 0.01
IDS_A_READ = 1 << 22
NEAR_SAMPLE = 200  # held-out documents whose near-duplicates are looked for
NEAR_SECONDS, NEAR_SECONDS_QUICK = 60.0, 5.0  # how long the training side is searched for them


def round_trip(subject: Subject) -> CheckResult:
    """decode(encode(text)) = text, and the store's tokens still say the text they were made from.

    Catches a tokenizer that normalises, drops or replaces characters; unknown tokens; a store whose tokens belong to
    another tokenizer or have been damaged. The fertility (tokens per word) tells what this language costs.
    """
    words = Judgement(
        f"texts come back whole (at most {MAX_LOST_SHARE:.0%} of the bytes lost), no unknown tokens",
        "The tokenizer does not keep this text, so that the model would read, and be scored on, another one.",
        "Use the model's own tokenizer and look at the documents named; `cartilha prepare --overwrite` makes the store "
        "anew.",
    )
    tokenizer = subject.tokenizer
    texts = [document.text for document in subject.held_out]
    ids = tokenizer.encode(texts)
    pairs = zip(subject.held_out, tokenizer.decode_batch(ids), strict=True)
    changed = [(document, decoded) for document, decoded in pairs if decoded != document.text]
    lost = [document for document, _ in changed]
    if lost and all(unicodedata.normalize("NFC", document.text) == decoded for document, decoded in changed):
        words = replace(
            words,
            meaning="The text writes letters and accents apart (NFD) and this tokenizer puts them together (NFC), so"
            " that the model would be scored on text with other bytes.",
            remedy="Prepare the text with --clean nfc, which puts letters and accents together.",
        )
    lost_share = _num_bytes(document.text for document in lost) / max(1, _num_bytes(texts))
    damaged = _damaged_share(subject)
    num_tokens, unknown = sum(map(len, ids)), _unknown_id(tokenizer)
    unknown_share = sum(int((tokens == unknown).sum()) for tokens in ids) / max(1, num_tokens)
    here, english = _fertility(tokenizer, texts), _fertility(tokenizer, english_sample())
    names = ("tokens_per_word", "bytes_per_token", "english_tokens_per_word", "english_bytes_per_token")
    measured = (
        f"{lost_share:.2%} of the bytes lost, {unknown_share:.2%} unknown tokens; {here[0]:.2f} tokens per word and "
        f"{here[1]:.2f} bytes per token (English {english[0]:.2f} and {english[1]:.2f})"
    )
    if lost:
        measured += f"; not kept: {', '.join(document.id for document in lost[:3])}"
    if damaged:
        measured += f"; {damaged:.1%} of the store's training documents do not say what they were made from"
    passed = lost_share <= MAX_LOST_SHARE and damaged <= MAX_LOST_SHARE and unknown_share <= MAX_UNKNOWN_SHARE
    figures = {"lost_share": lost_share, "damaged_share": damaged, "unknown_share": unknown_share}
    return words.judge(passed, measured, **figures, **dict(zip(names, (*here, *english), strict=True)))


def _damaged_share(subject: Subject) -> float:
    """Share of the training sample whose tokens decode to another text than the one that was hashed."""
    if subject.store is None or not subject.training:
        return 0.0
    known = subject.store.labels("train")["text_hash"][: len(subject.training)]
    return float(np.mean([own.text_hash != text_hash for own, text_hash in zip(subject.training, known, strict=True)]))


def _unknown_id(tokenizer: TextTokenizer) -> int:
    """The id of the unknown token, or -1 where the tokenizer has none."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    found = tokenizer.backend.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    return -1 if found is None else found


def _fertility(tokenizer: TextTokenizer, texts: list[str]) -> tuple[float, float]:
    """Tokens per word (split at white space), bytes per token."""
    num_tokens = sum(map(len, tokenizer.encode(texts)))
    num_words = sum(len(text.split()) for text in texts)
    return num_tokens / max(1, num_words), _num_bytes(texts) / max(1, num_tokens)


def _num_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def vocabulary(subject: Subject) -> CheckResult:
    """Every id has a row, and the store's ids are this tokenizer's: "do I have to adjust vocab_size?", answered.

    Catches a store of another model's tokenizer, ids beyond the embedding, and special tokens without a row.
    """
    tokenizer, model = subject.tokenizer, subject.model
    head, embedding = head_of(model).weight, input_rows(model)
    rows, num_input_rows, tied = len(head), len(embedding), head is embedding
    special = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    num_unused = len(unused_ids(subject.loaded, tokenizer))
    store_largest = -1 if subject.store is None else _largest_id(subject.store)
    same = subject.store is None or subject.store.fingerprint == tokenizer.fingerprint
    passed = max(tokenizer.num_reachable_ids - 1, store_largest) < min(rows, num_input_rows) and same
    named = ", ".join(f"{name} {value}" for name, value in special.items() if value is not None)
    measured = (
        f"{tokenizer.num_ids:,} ids, {num_input_rows:,} embedding rows, head "
        f"{'tied' if tied else f'of {rows:,} rows'}; {num_unused:,} rows that no token uses; {named}"
    )
    if subject.store is not None:
        measured += f"; largest id in the store {store_largest:,}"
    if not same:
        measured += "; the store was made with another tokenizer"
    expected = "every id has a row"
    if subject.store is not None:
        expected += ", and the store was made with this tokenizer"
    if passed and num_unused:
        expected += f" (do not adjust vocab_size: the {num_unused} spare rows do no harm and stay)"
    words = Judgement(
        expected,
        "Model and tokens do not belong together: training would fail, or teach the model noise.",
        "Prepare the store with this model's own tokenizer (cartilha prepare --model MODEL); never resize the "
        "embedding to make the error go away.",
    )
    figures = {"num_ids": tokenizer.num_ids, "num_rows": rows, "num_unused_rows": num_unused, "tied_head": tied}
    largest = None if subject.store is None else store_largest
    return words.judge(passed, measured, **figures, special_ids=special, largest_store_id=largest, same_tokenizer=same)


def _largest_id(store: TokenStore) -> int:
    """Of both sides, read a few MB at a time; -1 where there is no token."""
    sides = (store.tokens("train"), store.tokens("validation"))
    parts = (tokens[begin : begin + IDS_A_READ] for tokens in sides for begin in range(0, len(tokens), IDS_A_READ))
    return max((int(part.max()) for part in parts), default=-1)


def leak(subject: Subject) -> CheckResult:
    """No evaluation document is in training, word for word or nearly.

    Catches a store whose sides were made by hand, or whose text holds copies: its held-out figures would flatter.
    """
    words = Judgement(
        f"no held-out document in training, at most {MAX_NEAR_SHARE:.0%} near-duplicates",
        "The model is scored on text that it was trained on; the figures would be too good.",
        "Prepare the store anew with --near_duplicates, which keeps copies on one side.",
    )
    store = subject.store
    if store is None:
        return words.skip("there is no store with a training side")
    known, held_out = set(store.labels("train")["text_hash"]), store.labels("validation")["text_hash"]
    exact = sum(text_hash in known for text_hash in held_out)
    measured = f"{exact:,} of {counted(len(held_out), 'held-out document')} in training"
    scored = [document.text for document in subject.held_out[:NEAR_SAMPLE]]
    near: float | None = None
    seen = 0
    deadline = time.monotonic() + (NEAR_SECONDS_QUICK if subject.quick else NEAR_SECONDS)

    def training() -> Iterator[str]:
        nonlocal seen
        texts = chain.from_iterable(zip_longest(store.texts("train"), *subject.mixed))
        for text in texts:  # of all stores in turn
            if text is not None:
                yield text
                seen += 1
            if time.monotonic() > deadline:
                return

    try:
        near = float(np.mean(has_near_duplicate(scored, training())))
        of_stores = f" of {1 + len(subject.mixed)} stores" if subject.mixed else ""
        measured += f"; {near:.1%} of {len(scored)} have a near-duplicate among {seen:,} training documents{of_stores}"
    except UserError as error:  # the extra is missing, and its sentence names it
        measured += f"; near-duplicates not looked for ({error})"
    passed = exact == 0 and (near or 0.0) <= MAX_NEAR_SHARE
    return words.judge(passed, measured, num_exact=exact, near_duplicate_share=near)


def benchmark(subject: Subject) -> CheckResult:
    """Hardly a question of the benchmarks that are named is in the training text.

    Catches a crawl that holds the pages of a benchmark: its figures would say what the model remembers.
    """
    words = Judgement(
        f"at most {MAX_KNOWN_SHARE:.0%} of a benchmark's questions in the training text",
        "The benchmark would measure what the model remembers of it.",
        "Prepare the store anew with --decontaminate and the names of the benchmarks.",
    )
    if subject.store is None or subject.questions is None:
        return words.skip("no benchmark is named (--questions), or no store")
    found = questions_in(subject.store, subject.questions)
    shares = [row["num_found"] / row["num_questions"] for row in found["benchmarks"]]
    rows = zip(found["benchmarks"], shares, strict=True)
    parts = [f"{row['name']}: {row['num_found']:,} of {row['num_questions']:,} ({share:.1%})" for row, share in rows]
    measured = "; ".join(parts)
    if found["num_searched"] < found["num_documents"]:
        measured += f"; in its first {found['num_searched']:,} of {found['num_documents']:,} training documents"
    return words.judge(max(shares) <= MAX_KNOWN_SHARE, measured, **found)
