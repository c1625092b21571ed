"""What a selection took, in words and numbers that a person can judge it by."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cartilha.corpus.pieces import at_the_ends, evenly
from cartilha.errors import UserError
from cartilha.preparation.index import DocumentIndex, first_ids, read_documents
from cartilha.preparation.selection import Chosen
from cartilha.preparation.threshold import log_weights
from cartilha.tokens import ngrams
from cartilha.tokens.store import TokenStore
from cartilha.tokens.tokenizer import TextTokenizer

WEIGHTS_FILE = "selection.parquet"  # one row per document of the pool
RATIOS_FILE = "selection_ratios.npy"
NUM_SHOWN = 10
NUM_SHARES = 20
SHOWN_TOKENS = 24
SAMPLED_DOCUMENTS = 1000
SAMPLED_TOKENS = 250  # of each document
RARE = 1e-5  # added to both shares of a word
WORD = re.compile(r"[^\W\d_]+")

_LABELS = [("doc_id", pa.string()), ("text_hash", pa.string())]
_WEIGHTS_SCHEMA = pa.schema([*_LABELS, ("num_tokens", pa.int64()), ("weight", pa.float32()), ("chosen", pa.bool_())])


def report(index: DocumentIndex, chosen: Chosen, tokenizer: TextTokenizer) -> dict[str, Any]:
    """What the store's record says of a selection.

    Besides the facts of `Chosen`: `shares` of domains and sources in the tokens of the pool and of what was chosen;
    and with a target, the documents of the highest and lowest weight, and the words whose share rose and fell most in a
    sample of documents.
    """
    facts = {**chosen.facts, "shares": _shares(index, chosen)}
    if chosen.ratios is None:
        return facts
    lowest, highest = at_the_ends(chosen.weights, chosen.pool, NUM_SHOWN)
    return {
        **facts,
        "highest": list(_documents(index, chosen, tokenizer, highest)),
        "lowest": list(_documents(index, chosen, tokenizer, lowest)),
        "words": _words(index, chosen, tokenizer),
    }


def write_weights(directory: Path, index: DocumentIndex, chosen: Chosen) -> None:
    """Write the weight of each document of the pool, and the log ratios that it came from, among the store's files."""
    if chosen.ratios is None:
        return
    np.save(directory / RATIOS_FILE, np.rint(chosen.ratios).astype(np.int32), allow_pickle=False)
    with pq.ParquetWriter(directory / WEIGHTS_FILE, _WEIGHTS_SCHEMA, compression="zstd") as writer:
        for task, begin, end in index.shards():
            own = begin + np.flatnonzero(chosen.pool[begin:end])
            columns = [
                read_documents(task)["doc_id"].filter(pa.array(chosen.pool[begin:end])).combine_chunks(),
                pa.array(index.hex_hashes(own).astype("U32").tolist(), pa.string()),
                pa.array(index.num_tokens[own]),
                pa.array(chosen.weights[own], pa.float32()),
                pa.array(chosen.mask[own]),
            ]
            writer.write_batch(pa.record_batch(columns, schema=_WEIGHTS_SCHEMA))


def _shares(index: DocumentIndex, chosen: Chosen) -> dict[str, list[dict[str, Any]]]:
    """The largest domains and sources, each with its share of the pool's tokens and of the chosen ones."""
    sums: dict[str, tuple[Counter[str], Counter[str]]] = {name: (Counter(), Counter()) for name in ("domain", "source")}
    for task, begin, end in index.shards():
        table = read_documents(task)
        for name, both in sums.items():
            for counter, mask in zip(both, (chosen.pool, chosen.mask), strict=True):
                own = table.select([name, "num_tokens"]).filter(pa.array(mask[begin:end]))
                for row in own.group_by(name).aggregate([("num_tokens", "sum")]).to_pylist():
                    counter[row[name] or ""] += row["num_tokens_sum"]
    rows = {}
    for name, (pool, taken) in sums.items():
        totals = max(1, pool.total()), max(1, taken.total())
        rows[name] = [
            {"name": key, "pool": tokens / totals[0], "chosen": taken[key] / totals[1]}
            for key, tokens in pool.most_common(NUM_SHARES)
        ]
    return rows


def _documents(
    index: DocumentIndex, chosen: Chosen, tokenizer: TextTokenizer, numbers: np.ndarray
) -> Iterator[dict[str, Any]]:
    for number, ids in zip(numbers.tolist(), first_ids(index, numbers.tolist(), SHOWN_TOKENS), strict=True):
        yield {
            "doc_id": index.label(number, "doc_id"),
            "weight": float(chosen.weights[number]),
            "chosen": bool(chosen.mask[number]),
            "begins": tokenizer.decode(ids),
        }


def _words(index: DocumentIndex, chosen: Chosen, tokenizer: TextTokenizer) -> dict[str, list[dict[str, Any]]]:
    """The words that add most to the divergence of both texts, in the beginnings of evenly spaced documents."""
    counts = []
    for mask in (chosen.pool, chosen.mask):
        sample = evenly(mask, SAMPLED_DOCUMENTS)
        texts = tokenizer.decode_batch(list(first_ids(index, sample.tolist(), SAMPLED_TOKENS)))
        counts.append(Counter(word for text in texts for word in WORD.findall(text.lower())))
    words = sorted(counts[0] | counts[1])
    of_pool, of_chosen = (np.array([count[word] for word in words]) / max(1, count.total()) for count in counts)
    change = np.log((of_chosen + RARE) / (of_pool + RARE))
    rows = pa.table({"word": words, "pool": of_pool, "chosen": of_chosen})
    return {
        name: rows.take(np.argsort(-parts, kind="stable")[:NUM_SHOWN]).to_pylist()
        for name, parts in (("gained", of_chosen * change), ("lost", -of_pool * change))
    }


def explain(store: TokenStore, text_hash: str, ids: np.ndarray) -> dict[str, Any]:
    """The weight of one document of a store, the share of the pool below it, and the n-grams behind it.

    A document that was not in the pool (one of the target) is weighed now. A UserError says that the store was made
    without a target.
    """
    table = _weights_of_pool(store, ("weight", "num_tokens"))
    ratios = np.load(store.path / RATIOS_FILE, allow_pickle=False)
    sums = ngrams.log_likelihood_ratios(ids, np.array([len(ids)]), ratios[None])[0]
    average = float(np.maximum(1, 2 * table["num_tokens"].to_numpy() - 1).mean())
    weight = float(log_weights(sums, [len(ids)], average)[0])
    found = _weights_of_pool(store, ("chosen",), filters=pc.field("text_hash") == text_hash)
    shown = store.tokenizer().decode_each(ids)
    names = [*shown, *map("|".join, pairwise(shown))]
    nats = ratios[np.concatenate([ngrams.token_buckets(ids), ngrams.pair_buckets(ids)])] / ngrams.FIXED_POINT
    times = Counter(zip(names, nats.tolist(), strict=True))
    by_nats = sorted((each * number, name, number) for (name, each), number in times.items())
    rows = [{"ngram": name, "nats": total, "times": number} for total, name, number in by_nats]
    return {
        "weight": weight,
        "above": float((table["weight"].to_numpy() < weight).mean()),
        "chosen": bool(found["chosen"].to_numpy().any()),
        "raised": [row for row in rows[::-1][:NUM_SHOWN] if row["nats"] > 0],
        "lowered": [row for row in rows[:NUM_SHOWN] if row["nats"] < 0],
    }


def not_chosen(store: TokenStore, doc_id: str) -> dict[str, Any] | None:
    """What is known of a document of the pool that a store does not hold: its weight; None if it was not in the pool.

    A UserError says that the store was made without a target.
    """
    names = ("doc_id", "text_hash", "num_tokens", "weight")
    rows = _weights_of_pool(store, names, filters=pc.field("doc_id") == doc_id).to_pylist()
    if not rows:
        return None
    weight = rows[0].pop("weight")
    above = float((_weights_of_pool(store, ("weight",))["weight"].to_numpy() < weight).mean())
    return {**rows[0], "weight": {"weight": weight, "above": above, "chosen": False}}


def _weights_of_pool(store: TokenStore, names: Sequence[str], filters: pc.Expression | None = None) -> pa.Table:
    path = store.path / WEIGHTS_FILE
    if not path.exists():
        raise UserError(f"The store {store.path} was made without --like: its documents have no weights.")
    return pq.read_table(path, columns=list(names), filters=filters)
