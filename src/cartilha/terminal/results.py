"""Results as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cartilha.errors import counted
from cartilha.terminal.measures import MAX_DOMAINS, bits, protocol_line, show_comparison, show_evaluations
from cartilha.terminal.tables import show_markdown_table, show_table
from cartilha.terminal.vocabulary import show_vocabulary

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


# Of the reasons for which documents are left out, those that are nouns.
_ONE = {
    "exact duplicates": "exact duplicate",
    "near duplicates of validation": "near duplicate of validation",
    "files": "file",
}


def _prepare(console: Console, result: Values) -> None:
    units, rows = ("documents", "tokens", "bytes", "words"), []
    for split, counts in result["splits"].items():
        numbers = [f"{counts[f'num_{unit}']:,}" for unit in units]
        rows.append([split, *numbers, f"{counts['num_tokens'] / max(1, counts['num_words']):.2f}"])
    show_table(console, ("split", *units, "tokens/word"), rows)
    left_out = {reason.replace("_", " "): count for reason, count in result["dropped"].items() if count}
    dropped = ", ".join(f"{count:,} {_ONE.get(what, what) if count == 1 else what}" for what, count in left_out.items())
    console.print(f"Left out: {dropped or 'nothing'}.", markup=False)
    if result.get("leaks"):
        shares = (100 * result["leaks"][name] for name in ("leak_rate", "plain_leak_rate"))
        console.print("Held out with a near-duplicate in training: {:.2f} %; a plain split: {:.2f} %".format(*shares))
    if result["store"]:
        console.print(f"Store: {result['store']}{' (it was ready)' if result['was_ready'] else ''}", markup=False)


def _inspect(console: Console, result: Values) -> None:
    if "primer" in result:
        rows = [[row["genre"], row["variety"], row["num_texts"], row["num_words"]] for row in result["primer"]]
        totals = ["all", "", *(sum(row[i] for row in rows) for i in (2, 3))]
        shown = [[*row[:2], *(f"{number:,}" for number in row[2:])] for row in (*rows, totals)]
        show_table(console, ("genre", "variety", "texts", "words"), [*shown[:-1], [], shown[-1]], words=(0, 1))
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
    lengths = []
    total = max(1, sum(row["tokens"] for row in summary["lengths"]))
    for row in summary["lengths"]:
        share = row["tokens"] / total
        name = f"{row['from_tokens']:,} to {row['to_tokens']:,}"
        lengths.append([name, f"{row['documents']:,}", f"{100 * share:5.1f} % {'█' * round(30 * share)}"])
    show_table(console, ("tokens of a document", "documents", "share of the tokens"), lengths, words=(0, 2))
    domains = []
    for row in summary["domains"][:MAX_DOMAINS]:
        numbers = [f"{row[f'num_{name}']:,}" for name in ("documents", "validation_documents", "tokens")]
        domains.append([row["domain"], *numbers, f"{row['num_tokens'] / max(1, row['num_words']):.2f}"])
    show_table(console, ("domain", "documents", "held out", "tokens", "tokens/word"), domains)
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
            f"Block {block['block']} of {block['num_blocks']:,} ({counted(block['block_size'], 'input')},"
            f" {block['split']}, seed {block['seed']})",
            markup=False,
        )
        for row in block["segments"]:
            if "padding" in row:
                console.print(f"--- padding: {counted(row['padding'], 'input')}", markup=False)
                continue
            begins = "begins" if row["from_the_beginning"] else "goes on"
            ends = "ends" if row["to_the_end"] else "is cut"
            title = f"--- {row['doc_id']}: {counted(row['num_inputs'], 'input')}; {begins} here and {ends} here"
            console.print(title, row["text"], sep="\n", markup=False)


_MARKS = {"passed": ("passed", "green"), "failed": ("FAILED", "bold red"), "not applicable": ("n/a", "dim")}


def _check(console: Console, result: Values) -> None:
    rows = [
        [row["name"], Text(*_MARKS[row["outcome"]]), row["measured"], f"{row['seconds']:.1f}"]
        for row in result["checks"]
    ]
    show_table(console, ("check", "outcome", "measured", "s"), rows, words=(0, 1, 2))
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
    places: dict[tuple[str, int], list[str]] = {}
    for row in result["rows"]:
        cells = places.setdefault((row["device"], row["block_size"]), [row["device"], str(row["block_size"])])
        cells.append(f"{row['memory_bytes'] / gib:.1f}" if row["fits"] else "-")
    sizes = dict.fromkeys(f"x {row['micro_batch_size']}" for row in result["rows"])
    show_table(console, ("GiB by micro-batch", "block", *sizes), places.values())
    steps = []
    for row in result["recommended"]:
        rate = row["tokens_per_second"]
        about = "~" if row["estimated"] else ""
        epoch = f"{row['seconds_per_epoch'] / 60:,.0f} min" if row["seconds_per_epoch"] else ""
        cells = [str(row["block_size"]), str(row["micro_batch_size"]) if row["fits"] else "-"]
        cells += [f"{about}{rate:,.0f}" if rate else "", epoch]
        cells += [f"{row[name]:,.2f}" if row[name] is not None else "" for name in ("hours", "price")]
        steps.append([row["device"], *cells])
    titles = ("device", "block", "micro-batch", "tokens/s", "an epoch", "hours", "price")
    show_table(console, titles, steps, title=f"Steps of {counted(result['batch_tokens'], 'token')}")
    parts = {"weights": "weights", "gradients": "gradients", "optimizer_states": "AdamW", "activations": "activations"}
    parts |= {"logits_chunk": "logits", "overhead": "overhead", "checkpoint_copy": "checkpoint"}
    shown: dict[str, Values] = {}
    for row in result["recommended"]:
        if row["block_size"] <= 512:
            shown.setdefault(row["device"], row)
    memory = [[title, *(f"{row['memory'][part] / gib:.2f}" for row in shown.values())] for part, title in parts.items()]
    blocks = ["block", *(str(row["block_size"]) for row in shown.values())]
    show_table(console, ("GiB of it", *shown), [blocks, [], *memory])
    console.print(
        "~: an estimate, from the device's peak and the share of it that is expected. -: does not fit.", markup=False
    )


def _train(console: Console, result: Values) -> None:
    before, after = result["evaluations"][0], result["evaluations"][-1]
    rows = [
        [name, f"{row['perplexity']:,.2f}", bits(row["bits_per_byte"], 4)]
        for name, row in (("before", before), ("after", after))
    ]
    change = after["perplexity"] / before["perplexity"] - 1
    rows.append(["change", f"{change:+.1%}", _difference(before["bits_per_byte"], after["bits_per_byte"])])
    title = f"{result['settings']['model']}: {result['status']}"
    show_table(console, ("", "perplexity", "bits/byte"), rows, title=title)
    console.print(
        f"Protocol: {protocol_line(after['protocol'])}; {counted(after['num_tokens'], 'held-out token')}.", markup=False
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
    show_markdown_table(console, result["table"])
    console.print(f"Report: {result['report']}", markup=False)


def _generate(console: Console, result: Values) -> None:
    for row in result["continuations"]:
        console.print(f"[{row['mode']}] {row['text']}\n", markup=False)


def _report(console: Console, result: Values) -> None:
    show_markdown_table(console, result["table"])
    console.print(f"Report: {result['report']}", markup=False)
    if result["figures"]:
        console.print(
            f"Figures: {counted(len(result['figures']), 'file')} in {Path(result['figures'][0]).parent}", markup=False
        )


def _push(console: Console, result: Values) -> None:
    console.print(f"Model: {result['url']} ({'private' if result['private'] else 'public'})", markup=False)


def _difference(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{after - before:+.4f}"
