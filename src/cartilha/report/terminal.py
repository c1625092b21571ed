"""Results as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Values = Mapping[str, Any]


def show(command: str, result: Values) -> None:
    """Print a command's result (its `to_dict()`) to standard output."""
    console = Console(highlight=False, soft_wrap=True)
    {
        "prepare": _prepare,
        "inspect": _inspect,
        "train": _train,
        "evaluate": _evaluate,
        "generate": _generate,
        "report": _report,
        "run": _run,
        "demo": _run,
    }[command](console, result)


def _prepare(console: Console, result: Values) -> None:
    table = Table("split", "documents", "tokens", "bytes", "words", "tokens/word")
    for split, counts in result["splits"].items():
        numbers = [f"{counts[f'num_{unit}']:,}" for unit in ("documents", "tokens", "bytes", "words")]
        table.add_row(split, *numbers, f"{counts['num_tokens'] / max(1, counts['num_words']):.2f}")
    console.print(table)
    dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in result["dropped"].items() if count)
    console.print(f"Left out: {dropped or 'nothing'}.", markup=False)
    console.print(f"Store: {result['store']}{' (it was ready)' if result['was_ready'] else ''}", markup=False)


def _inspect(console: Console, result: Values) -> None:
    if "primer" in result:
        table = Table("genre", "variety", "texts", "words")
        for row in result["primer"]:
            table.add_row(row["genre"], row["variety"], str(row["num_texts"]), f"{row['num_words']:,}")
        totals = (sum(row[name] for row in result["primer"]) for name in ("num_texts", "num_words"))
        table.add_section()
        table.add_row("all", "", *(f"{total:,}" for total in totals))
        console.print(table)
        return
    store = result["store"]
    _prepare(console, {"splits": store["splits"], "dropped": store["dropped"], "store": "", "was_ready": False})
    settings = ", ".join(f"{name} {value}" for name, value in store["settings"].items())
    console.print(
        f"Tokenizer: {store['tokenizer_fingerprint'][:12]}, {store['num_ids']:,} ids, {store['dtype']}", markup=False
    )
    console.print(f"Inputs: {', '.join(item['name'] for item in store['inputs'])}", markup=False)
    console.print(f"Settings: {settings}", markup=False)
    for row in result["first_documents"]:
        console.print(f"[{row['split']}] {row['doc_id']} ({row['num_tokens']} tokens): {row['begins']}", markup=False)


def _evaluate(console: Console, result: Values) -> None:
    table = Table("model", "perplexity", "bits/byte", "word perplexity", "tokens", "documents", "uniform", "protocol")
    for row in result["models"]:
        table.add_row(
            row["model"],
            f"{row['perplexity']:,.2f}",
            _number(row["bits_per_byte"], 4),
            _number(row["word_perplexity"], 1),
            f"{row['num_tokens']:,}",
            f"{row['num_documents']:,}",
            f"{row['baselines']['uniform']['perplexity']:,.0f}",
            protocol_line(row["protocol"]),
        )
    console.print(table)
    if len(result["models"]) > 1:
        console.print("Models with different tokenizers compare by bits per byte, not by perplexity.", markup=False)


def protocol_line(protocol: Values) -> str:
    """The protocol in a few words: it goes with every number."""
    return f"{protocol['name']}, {protocol['window']}/{protocol['stride']}, {protocol['dtype']}, {protocol['hash']}"


def _train(console: Console, result: Values) -> None:
    before, after = result["evaluations"][0], result["evaluations"][-1]
    table = Table("", "perplexity", "bits/byte", title=f"{result['settings']['model']}: {result['status']}")
    for name, row in (("before", before), ("after", after)):
        table.add_row(name, f"{row['perplexity']:,.2f}", _number(row["bits_per_byte"], 4))
    change = after["perplexity"] / before["perplexity"] - 1
    table.add_row("change", f"{change:+.1%}", _difference(before["bits_per_byte"], after["bits_per_byte"]))
    console.print(table)
    console.print(
        f"Protocol: {protocol_line(after['protocol'])}; {after['num_tokens']:,} held-out tokens.", markup=False
    )
    if result.get("tokens_per_second"):
        rate = f"{result['tokens_per_second']:,.0f}"
        console.print(
            f"Trained {result['tokens']:,} tokens in {result['seconds']:.0f} s ({rate} tokens/s).", markup=False
        )
    console.print(f"Model: {result['run']}/model", markup=False)


def _run(console: Console, result: Values) -> None:
    _train(console, result["trained"])
    console.print(result["table"], markup=False)
    console.print(f"Report: {result['report']}", markup=False)


def _generate(console: Console, result: Values) -> None:
    for row in result["continuations"]:
        console.print(f"[{row['mode']}] {row['text']}\n", markup=False)


def _report(console: Console, result: Values) -> None:
    console.print(result["table"], markup=False)
    console.print(f"Report: {result['report']}", markup=False)


def _number(value: float | None, digits: int) -> str:
    return "refused" if value is None else f"{value:,.{digits}f}"


def _difference(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{after - before:+.4f}"
