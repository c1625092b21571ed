"""Results as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cartilha.errors import counted
from cartilha.reporting.terminal_measures import MAX_DOMAINS, bits, protocol_line, show_comparison, show_evaluations
from cartilha.reporting.terminal_vocabulary import show_vocabulary

Values = Mapping[str, Any]


def show(command: str, result: Values) -> None:
    """Print a command's result (its `to_dict()`) to standard output."""
    console = Console(highlight=False, soft_wrap=True)
    {
        "prepare": _prepare,
        "inspect": _inspect,
        "check": _check,
        "plan": _plan,
        "train": _train,
        "evaluate": show_evaluations,
        "compare": show_comparison,
        "generate": _generate,
        "report": _report,
        "explore": lambda console, result: None,  # everything was said while the page was there
        "vocab": show_vocabulary,
        "push": _push,
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
    if result.get("leaks"):
        shares = (100 * result["leaks"][name] for name in ("leak_rate", "plain_leak_rate"))
        console.print("Held out with a near-duplicate in training: {:.2f} %; a plain split: {:.2f} %".format(*shares))
    if result["store"]:
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
    if "document" in result or "block" in result:
        _look(console, result)
        return
    store, summary = result["store"], result["summary"]
    _prepare(console, {**store, "store": "", "was_ready": False})
    chosen = {name: value for name, value in store["settings"].items() if value not in (None, False, [], ["none"])}
    settings = ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in chosen.items()
    )
    console.print(
        f"Tokenizer: {store['tokenizer_fingerprint'][:12]}, {store['num_ids']:,} ids, {store['dtype']}", markup=False
    )
    console.print(f"Inputs: {', '.join(item['name'] for item in store['inputs'])}", markup=False)
    console.print(f"Settings: {settings}", markup=False)
    _summary(console, summary)
    for row in result["first_documents"]:
        console.print(
            f"[{row['split']}] {row['doc_id']} ({counted(row['num_tokens'], 'token')}): {row['begins']}", markup=False
        )


def _summary(console: Console, summary: Values) -> None:
    console.print(
        f"{summary['tokens_per_word']:.2f} tokens a word, {summary['bytes_per_token']:.2f} bytes a token", markup=False
    )
    lengths = Table("tokens of a document", "documents", "share of the tokens")
    total = max(1, sum(row["tokens"] for row in summary["lengths"]))
    for row in summary["lengths"]:
        share = row["tokens"] / total
        name = f"{row['from_tokens']:,} to {row['to_tokens']:,}"
        lengths.add_row(name, f"{row['documents']:,}", f"{100 * share:5.1f} % {'█' * round(40 * share)}")
    console.print(lengths)
    domains = Table("domain", "documents", "held out", "tokens", "tokens/word")
    for row in summary["domains"][:MAX_DOMAINS]:
        numbers = [f"{row[f'num_{name}']:,}" for name in ("documents", "validation_documents", "tokens")]
        domains.add_row(escape(row["domain"]), *numbers, f"{row['num_tokens'] / max(1, row['num_words']):.2f}")
    console.print(domains)
    if len(summary["domains"]) > MAX_DOMAINS:
        console.print(f"... and {len(summary['domains']) - MAX_DOMAINS:,} more (--json has all)", markup=False)
    kept = ", ".join(f"{100 * share:.1f} % at {length}" for length, share in summary["kept_by_truncation"].items())
    console.print(f"Left of the tokens if documents were truncated: {kept}. Packing keeps all of them.", markup=False)
    clusters = summary["clusters"]
    if clusters["clusters"]:
        console.print(
            f"{counted(clusters['clusters'], 'cluster')} of near-duplicates, of {clusters['documents']:,} documents"
        )


def _look(console: Console, result: Values) -> None:
    """A document or a block, as a person reads it."""
    if "document" in result:
        row = result["document"]
        numbers = ", ".join(counted(row[f"num_{unit}s"], unit) for unit in ("token", "word", "char", "byte"))
        console.print(f"[{row['split']} {row['number']}] {row['doc_id']} ({row['domain']}): {numbers}", markup=False)
        console.print(row["text"], markup=False)
        console.print(f"Tokens: {'|'.join(row['tokens'])}", markup=False)
    if "block" in result:
        block = result["block"]
        console.print(
            f"Block {block['block']} of {block['num_blocks']:,} ({block['block_size']} inputs, {block['split']},"
            f" seed {block['seed']})",
            markup=False,
        )
        for row in block["segments"]:
            if "padding" in row:
                console.print(f"--- padding: {row['padding']} inputs", markup=False)
                continue
            begins = "begins" if row["from_the_beginning"] else "goes on"
            ends = "ends" if row["to_the_end"] else "is cut"
            title = f"--- {row['doc_id']}: {row['num_inputs']} inputs; {begins} here and {ends} here"
            console.print(title, row["text"], sep="\n", markup=False)


_MARKS = {"passed": "[green]passed[/]", "failed": "[bold red]FAILED[/]", "not applicable": "[dim]n/a[/]"}


def _check(console: Console, result: Values) -> None:
    table = Table("check", "outcome", Column("measured", overflow="fold"), Column("s", justify="right"))
    for row in result["checks"]:
        table.add_row(row["name"], _MARKS[row["outcome"]], escape(row["measured"]), f"{row['seconds']:.1f}")
    console.print(table)
    for row in result["checks"]:
        if row["outcome"] == "failed":
            console.print(f"{row['name']}: expected {row['expected']}.", markup=False)
            console.print(f"  {row['meaning']}", markup=False)
            console.print(f"  What to do: {row['remedy']}", markup=False)
    failed = result["num_failed"]
    verdict = f"{failed} of {len(result['checks'])} checks failed" if failed else "All checks that apply passed"
    console.print(f"{verdict}: {result['model']} on {result['store'] or 'the primer'}, {result['seconds']:.0f} s.")


def _plan(console: Console, result: Values) -> None:
    gib = 2**30
    console.print(
        f"{result['model']}: {result['num_parameters'] / 1e6:,.1f} M parameters; weights, gradients and AdamW's states "
        f"{result['state_bytes'] / gib:.2f} GiB; checkpoints up to {result['disk_bytes'] / gib:.1f} GiB of disk, "
        f"and while one is written {result['checkpoint_bytes'] / gib:.2f} GiB of the host's memory",
        markup=False,
    )
    sizes = list(dict.fromkeys(row["micro_batch_size"] for row in result["rows"]))
    right = [Column(title, justify="right") for title in ("block", *(f"x {size}" for size in sizes))]
    table = Table("GiB by micro-batch", *right)
    for device, block in dict.fromkeys((row["device"], row["block_size"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["device"], row["block_size"]) == (device, block)]
        cells = [f"{row['memory_bytes'] / gib:.1f}" if row["fits"] else "-" for row in rows]
        table.add_row(device, str(block), *cells)
    console.print(table)
    titles = ("block", "micro-batch", "tokens/s", "an epoch", "hours", "price")
    right = [Column(name, justify="right") for name in titles]
    table = Table("device", *right, title=f"Steps of {result['batch_tokens']:,} tokens")
    for row in result["recommended"]:
        rate = row["tokens_per_second"]
        about = "~" if row["estimated"] else ""
        epoch = f"{row['seconds_per_epoch'] / 60:,.0f} min" if row["seconds_per_epoch"] else ""
        cells = [str(row["block_size"]), str(row["micro_batch_size"]) if row["fits"] else "does not fit"]
        cells += [f"{about}{rate:,.0f}" if rate else "", epoch]
        cells += [f"{row[name]:,.2f}" if row[name] is not None else "" for name in ("hours", "price")]
        table.add_row(row["device"], *cells)
    console.print(table)
    parts = {"weights": "weights", "gradients": "gradients", "optimizer_states": "AdamW", "activations": "activations"}
    parts |= {"logits_chunk": "logits", "overhead": "overhead", "checkpoint_copy": "checkpoint"}
    # A column per device: one per part would not fit a terminal.
    shown: dict[str, Values] = {}
    for row in result["recommended"]:
        if row["block_size"] <= 512:
            shown.setdefault(row["device"], row)
    table = Table("GiB of it", *(Column(device, justify="right") for device in shown))
    table.add_row("block", *(str(row["block_size"]) for row in shown.values()), end_section=True)
    for part, title in parts.items():
        table.add_row(title, *(f"{row['memory'][part] / gib:.2f}" for row in shown.values()))
    console.print(table)
    console.print(
        "~: an estimate, from the device's peak and the share of it that is expected. -: does not fit.", markup=False
    )


def _train(console: Console, result: Values) -> None:
    before, after = result["evaluations"][0], result["evaluations"][-1]
    table = Table("", "perplexity", "bits/byte", title=f"{escape(result['settings']['model'])}: {result['status']}")
    for name, row in (("before", before), ("after", after)):
        table.add_row(name, f"{row['perplexity']:,.2f}", bits(row["bits_per_byte"], 4))
    change = after["perplexity"] / before["perplexity"] - 1
    table.add_row("change", f"{change:+.1%}", _difference(before["bits_per_byte"], after["bits_per_byte"]))
    console.print(table)
    console.print(
        f"Protocol: {protocol_line(after['protocol'])}; {after['num_tokens']:,} held-out tokens.", markup=False
    )
    if result.get("tokens_per_second"):
        rate = f"{result['tokens_per_second']:,.0f} tokens/s"
        if result.get("tokens_per_second_after_first_step"):
            rate += f"; {result['tokens_per_second_after_first_step']:,.0f} after the first step"
        console.print(
            f"Trained {counted(result['tokens'], 'token')} in {result['seconds']:.0f} s ({rate}).", markup=False
        )
    console.print(f"Model: {result['run']}/model", markup=False)


def _run(console: Console, result: Values) -> None:
    _train(console, result["trained"])
    samples = result["samples"]
    last = max((row["step"] for row in samples), default=0)
    for after in (row for row in samples if row["step"] == last):
        for before in (row for row in samples if row["step"] == 0 and row["prompt"] == after["prompt"]):
            console.print(f"\nbefore: {before['text']}\nafter:  {after['text']}", markup=False)
    console.print()
    console.print(result["table"], markup=False)
    console.print(f"Report: {result['report']}", markup=False)


def _generate(console: Console, result: Values) -> None:
    for row in result["continuations"]:
        console.print(f"[{row['mode']}] {row['text']}\n", markup=False)


def _report(console: Console, result: Values) -> None:
    console.print(result["table"], markup=False)
    console.print(f"Report: {result['report']}", markup=False)
    if result["figures"]:
        console.print(
            f"Figures: {counted(len(result['figures']), 'file')} in {Path(result['figures'][0]).parent}", markup=False
        )


def _push(console: Console, result: Values) -> None:
    console.print(f"Model: {result['url']} ({'private' if result['private'] else 'public'})", markup=False)


def _difference(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{after - before:+.4f}"
