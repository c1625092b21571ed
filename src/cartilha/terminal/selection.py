"""What a selection of documents took, as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from cartilha.terminal.tables import FittingTable, Parts, Values

MAX_SHARES = 8
BAR = 30


def selection(facts: Values) -> Parts:
    """The amounts; with a target also weights, documents, words and shares of domains and sources."""
    yield (
        f"Chosen: {facts['num_documents']:,} of {facts['pool_documents']:,} documents,"
        f" {facts['num_tokens']:,} of {facts['pool_tokens']:,} tokens"
    )
    if "divergence" not in facts:
        return
    at_random, chosen = facts["divergence"]["random"], facts["divergence"]["chosen"]
    yield (
        f"Divergence from the target ({facts['target_documents']:,} documents, {facts['target_tokens']:,} tokens):"
        f" {at_random:.3f} nats per n-gram in as much text drawn at random, {chosen:.3f} in what was chosen"
    )
    yield f"Two halves of the target agree on the weights with a correlation of {facts['reliability']:.2f}"
    histogram = facts["histogram"]
    bins = zip(pairwise(histogram["edges"]), histogram["pool"], histogram["chosen"], strict=True)
    most = max(1, *histogram["pool"])
    rows = [
        [f"{round(low)} to {round(high)}", of_pool, of_chosen, "█" * round(BAR * of_pool / most)]
        for (low, high), of_pool, of_chosen in bins
    ]
    yield FittingTable(("weight", "pool", "chosen", "documents of the pool"), rows, words=(0, 3))
    for name in ("highest", "lowest"):
        documents = [[row["doc_id"], f"{row['weight']:.0f}", row["begins"]] for row in facts[name]]
        yield FittingTable((f"{name} weight", "weight", "begins"), documents, words=(0, 2))
    yield from _shares("words that gained", facts["words"]["gained"], "word")
    yield from _shares("words that lost", facts["words"]["lost"], "word")
    for kind, found in facts["shares"].items():
        if len(found) > 1:
            yield from _shares(kind, found[:MAX_SHARES], "name")


def _shares(title: str, found: list[Values], key: str) -> Parts:
    rows = [[row[key] or "-", f"{100 * row['pool']:.2f} %", f"{100 * row['chosen']:.2f} %"] for row in found]
    yield FittingTable((title, "of the pool", "of the chosen"), rows)


def quality(signals: Sequence[Values]) -> Parts:
    """The scores by which documents are kept or left out, and the documents at both ends."""
    for facts in signals:
        low, high = facts["kept"]
        limits = [f"from {low:.4g}"] * (low is not None) + [f"up to {high:.4g}"] * (high is not None)
        points = ", ".join(f"{float(share):.0%} below {value:.4g}" for share, value in facts["quantiles"].items())
        yield (
            f"{facts['signal'].capitalize()} of {facts['num_scored']:,} documents under {facts['model']}: {points};"
            f" kept {' '.join(limits) or 'all'}"
        )
        for name in ("lowest", "highest"):
            rows = [[row["doc_id"], f"{row['score']:.4g}", row["begins"]] for row in facts[name]]
            yield FittingTable((f"{name} {facts['signal']}", facts["signal"], "begins"), rows, words=(0, 2))
