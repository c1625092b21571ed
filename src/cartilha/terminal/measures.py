"""Evaluations and comparisons as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from cartilha.errors import counted
from cartilha.evaluation.sums import MEASURES, Measure
from cartilha.terminal.tables import FittingTable, Parts, Values

MAX_DOMAINS = 20


def evaluations(result: Values) -> Parts:
    """One column per model and one row per figure; below, what goes with a single model."""
    models = result["models"]
    if "protocol" not in models[0]:
        for row in models:
            yield row["model"]
            yield from (f"  {line}" for line in _tasks(row))
        return
    rows = [[title, *map(cell, models)] for title, cell in _FIGURES]
    yield FittingTable(("", *(row["model"] for row in models)), [row for row in rows if any(row[1:])])
    protocols = [protocol_line(row["protocol"]) for row in models]
    alike = len(set(protocols)) == 1
    if alike:
        yield f"Protocol: {protocols[0]}"
    for row, protocol in zip(models, protocols, strict=True):
        if len(models) > 1:
            yield row["model"] if alike else f"{row['model']}: {protocol}"
        yield from (f"  {line}" for line in _of_one_model(row))
    yield from _task_questions(result.get("task_questions"))
    if "wall_seconds" in result:
        scoring = sum(row["seconds"] for row in models)
        yield f"Took {result['wall_seconds']:.1f} s in all, {scoring:.1f} s of them scoring."
    if len({row["num_tokens"] for row in models}) > 1:
        yield "Models with different tokenizers compare by bits per byte, not by perplexity."


def _task_questions(found: Values | None) -> Iterator[str]:
    if found is None:
        return
    is_all = found["num_searched"] == found["num_documents"]
    part = "" if is_all else f" (in its first {counted(found['num_searched'], 'document')})"
    for one in found["benchmarks"]:
        share = one["num_found"] / one["num_questions"]
        questions = counted(one["num_questions"], "question")
        yield f"{one['name']}: {one['num_found']:,} of {questions} ({share:.1%}) are in the store's training side{part}"


def _of_one_model(row: Values) -> Iterator[str]:
    if row.get("contamination") is not None:
        yield f"{row['contamination']:.1%} of the documents are in the store's training side, word for word"
    if drift := row.get("dtype_drift"):
        yield f"{row['protocol']['dtype']} against float32: {drift['nats_per_token']:+.1e} nats per token"
    if row.get("near_duplicates") is not None:
        yield f"{row['near_duplicates']:.1%} of the documents have a near-duplicate there"
    shown = list(row["domains"].items())[:MAX_DOMAINS] if len(row["domains"]) > 1 else []
    for name, domain in shown:
        figures = f"perplexity {domain['perplexity']:,.2f}, bits per byte {bits(domain['bits_per_byte'], 4)}"
        yield f"{name}: {figures} ({counted(domain['num_documents'], 'document')})"
    if shown and row.get("num_domains", 0) > len(shown):
        yield f"... and {counted(row['num_domains'] - len(shown), 'other domain')}, all smaller"
    yield from _tasks(row)


def _tasks(row: Values) -> Iterator[str]:
    for score in row.get("tasks") or ():
        interval = "" if score["interval"] is None else ", 95 % interval [{:.3f}, {:.3f}]".format(*score["interval"])
        questions = "" if score["num_questions"] is None else f" ({counted(score['num_questions'], 'question')})"
        yield f"{score['task']}: {score['metric']} {score['value']:.3f}{interval}{questions}"


def _interval(row: Values) -> str:
    low, high = row.get("bits_per_byte_interval") or (None, None)
    return "" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def _baseline(name: str, row: Values) -> str:
    """A baseline's bits per byte, and its perplexity if it has one."""
    found = row["baselines"].get(name)
    if found is None or found["bits_per_byte"] is None:
        return ""
    perplexity = f" (perplexity {found['perplexity']:,.0f})" if found.get("perplexity") else ""
    return f"{found['bits_per_byte']:.4f}{perplexity}"


def _continuation(name: str, digits: int, row: Values) -> str:
    """A measure of the continuations beside its floor (another document's continuation)."""
    found = row.get("continuations")
    if not found or found[name] is None:
        return ""
    floor = found["floor"][name] if found["floor"] else None
    return f"{found[name]:.{digits}f}" + ("" if floor is None else f" (floor {floor:.{digits}f})")


def _measures() -> Iterator[tuple[str, Callable[[Values], str]]]:
    for measure in MEASURES:
        yield measure.title, partial(_measured, measure)
        if measure.key == "bits_per_byte":
            yield "  95 % interval", _interval


def _measured(measure: Measure, row: Values) -> str:
    return bits(row[measure.key], measure.decimals)


_FIGURES: tuple[tuple[str, Callable[[Values], str]], ...] = (
    *_measures(),
    ("macro bits per byte", lambda row: bits(row["macro"]["bits_per_byte"], 4)),
    ("tokens", lambda row: f"{row['num_tokens']:,}"),
    ("documents", lambda row: f"{row['num_documents']:,}"),
    ("mass on unused rows", lambda row: f"{row['unused_rows_mass']:.1e}" if row["unused_rows_mass"] else ""),
    *((f"{name} model", partial(_baseline, name)) for name in ("uniform", "unigram")),
    *((name.replace("_", ", "), partial(_baseline, name)) for name in ("xz", "xz_primed", "zstd", "zstd_primed")),
    ("chrF", partial(_continuation, "chrf", 1)),
    ("BLEU", partial(_continuation, "bleu", 2)),
    ("ROUGE-L", partial(_continuation, "rouge_l", 3)),
    ("distinct-2", partial(_continuation, "distinct_2", 3)),
    ("repeated 4-grams", partial(_continuation, "repeated_4grams", 3)),
    ("tokens/s", lambda row: f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else ""),
)


def comparison(result: Values) -> Parts:
    """Two models on the same documents."""
    figures = (f"{result[name]:.4f}" for name in ("bits_per_byte_first", "bits_per_byte_second"))
    rows = list(zip(result["models"], figures, map(protocol_line, result["protocols"]), strict=True))
    yield FittingTable(("model", "bits per byte", "protocol"), rows, words=(0, 2))
    low, high = result["bits_per_byte_difference_interval"] or (None, None)
    has_none = low is None or high is None
    interval = "no interval with one document" if has_none else f"95 % interval [{low:+.4f}, {high:+.4f}]"
    yield (
        f"Second minus first: {result['bits_per_byte_difference']:+.4f} bits per byte, {interval}, "
        f"p = {result['p_value']:.4g}; {result['share_improved']:.0%} of "
        f"{counted(result['num_documents'], 'document')} improved."
    )
    for title, rows in (("Gained most", result["gained_most"]), ("Lost most", result["lost_most"])):
        for row in rows[:3]:
            change = f"{row['bits_per_byte_first']:.3f} -> {row['bits_per_byte_second']:.3f}"
            yield f"{title}: {row['doc_id']} ({counted(row['num_bytes'], 'byte')}): {change}"


def protocol_line(protocol: Values) -> str:
    """The protocol in a few words."""
    return f"{protocol['name']}, {protocol['window']}/{protocol['stride']}, {protocol['dtype']}, {protocol['hash']}"


def bits(value: float | None, digits: int) -> str:
    """A measure, or `refused` if there is none."""
    if value is None:
        return "refused"
    return f"{value:,.{digits}f}" if value < 1e7 else f"{value:.3g}"
