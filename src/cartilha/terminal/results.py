"""A command's result as a person reads it in a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cartilha.config import AUTO_BATCH
from cartilha.errors import counted
from cartilha.runs.best import evaluation_of_model
from cartilha.terminal.measures import MAX_DOMAINS, bits, comparison, evaluations, protocol_line
from cartilha.terminal.selection import quality, selection
from cartilha.terminal.tables import FittingTable, Parts, Values, markdown_table
from cartilha.terminal.vocabulary import vocabulary
from cartilha.units import show_duration

GIB = 2**30


def show(command: str, result: Values) -> None:
    """Print a command's result (its `to_dict()`) to standard output."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for part in DISPLAYS[command](result):
        console.print(part)


def _prepare(result: Values) -> Parts:
    units = ("documents", "tokens", "bytes", "words")
    splits = result["splits"].items()
    rows = [[split, *(counts[f"num_{unit}"] for unit in units), _tokens_per_word(counts)] for split, counts in splits]
    yield FittingTable(("split", *units, "tokens/word"), rows)
    dropped = [_left_out(reason, count) for reason, count in result["dropped"].items() if count]
    yield f"Left out: {', '.join(dropped) or 'nothing'}."
    if result.get("leaks"):
        shares = (100 * result["leaks"][name] for name in ("leak_rate", "plain_leak_rate"))
        yield "Held out with a near-duplicate in training: {:.2f} %; a plain split: {:.2f} %".format(*shares)
    if result.get("selection"):
        yield from selection(result["selection"])
    yield from quality(result.get("quality") or ())
    for one in (result.get("decontamination") or {"benchmarks": []})["benchmarks"]:
        questions = counted(one["num_questions"], "question")
        share = one["num_found"] / one["num_questions"]
        yield f"In the text, and left out of it: {one['num_found']:,} of {questions} of {one['name']} ({share:.1%})"
    if result["store"]:
        yield f"Store: {result['store']}{' (it was ready)' if result['was_ready'] else ''}"


def _left_out(reason: str, count: int) -> str:
    kind, *detail = reason.split(":", 1)  # a language or a benchmark, by its name
    what = ":".join([kind.replace("_", " "), *detail])
    return f"{count:,} {what}" if count != 1 else "1 " + re.sub(r"(duplicate|file)s", r"\1", what)


def _tokens_per_word(counts: Values) -> str:
    return f"{counts['num_tokens'] / max(1, counts['num_words']):.2f}"


def _parameters(model: Values) -> str:
    total, active = (model[name] / 1e6 for name in ("num_parameters", "num_active_parameters"))
    return f"{total:,.1f} M parameters" + (f" ({active:,.1f} M of them compute a token)" if active < total else "")


def _other_parts(model: Values) -> Parts:
    if number := model["num_other_parameters"]:
        yield f"Other parts than that for text: {number / 1e6:,.1f} M parameters more, which stay as they are"


def _inspect(result: Values) -> Parts:
    if "primer" in result:
        rows = [[row["genre"], row["variety"], row["num_texts"], row["num_words"]] for row in result["primer"]]
        totals = [sum(row[i] for row in rows) for i in (2, 3)]
        yield FittingTable(("genre", "variety", "texts", "words"), [*rows, [], ["all", "", *totals]], words=(0, 1))
    elif "model" in result:
        model = result["model"]
        size = f"{_parameters(model)}, {model['context_length']:,} positions"
        yield f"{model['model']} ({model['type']}): {size}"
        yield f"Runs: {model['runs']}"
        yield from _other_parts(model)
    elif "document" in result or "block" in result:
        yield from _document(result["document"]) if "document" in result else ()
        yield from _block(result["block"]) if "block" in result else ()
    else:
        yield from _store(result)


def _store(result: Values) -> Parts:
    store = result["store"]
    yield from _prepare({**store, "store": ""})
    chosen = {name: value for name, value in store["settings"].items() if value not in (None, False, [], ["none"])}
    settings = ", ".join(f"{name} {' '.join(v) if isinstance(v, list) else v}" for name, v in chosen.items())
    yield f"Tokenizer: {store['tokenizer_fingerprint'][:12]}, {store['num_ids']:,} ids, {store['dtype']}"
    commits = [f" (commit {item['commit']})" if "commit" in item else "" for item in store["inputs"]]
    yield f"Inputs: {', '.join(item['name'] + commit for item, commit in zip(store['inputs'], commits, strict=True))}"
    yield f"Settings: {settings}"
    yield from _summary(result["summary"])
    for row in result["first_documents"]:
        yield f"[{row['split']}] {row['doc_id']} ({counted(row['num_tokens'], 'token')}): {row['begins']}"


def _summary(summary: Values) -> Parts:
    yield f"{summary['tokens_per_word']:.2f} tokens per word, {summary['bytes_per_token']:.2f} bytes per token"
    lengths, total = [], max(1, sum(row["tokens"] for row in summary["lengths"]))
    for row in summary["lengths"]:
        name, share = f"{row['from_tokens']:,} to {row['to_tokens']:,}", row["tokens"] / total
        lengths.append([name, row["documents"], f"{100 * share:5.1f} % {'█' * round(30 * share)}"])
    yield FittingTable(("tokens of a document", "documents", "share of the tokens"), lengths, words=(0, 2))
    names = ("domain", "num_documents", "num_validation_documents", "num_tokens")
    domains = [[*(row[name] for name in names), _tokens_per_word(row)] for row in summary["domains"][:MAX_DOMAINS]]
    yield FittingTable(("domain", "documents", "held out", "tokens", "tokens/word"), domains)
    if len(summary["domains"]) > MAX_DOMAINS:
        yield f"... and {len(summary['domains']) - MAX_DOMAINS:,} more (--json has all)"
    kept = ", ".join(f"{100 * share:.1f} % at {length}" for length, share in summary["kept_by_truncation"].items())
    yield f"Left of the tokens if documents were truncated: {kept}. Packing keeps all of them."
    clusters = summary["clusters"]
    if clusters["clusters"]:
        yield f"{counted(clusters['clusters'], 'cluster')} of near-duplicates, of {clusters['documents']:,} documents"


def _document(row: Values) -> Parts:
    if "text" in row:
        numbers = ", ".join(counted(row[f"num_{unit}s"], unit) for unit in ("token", "word", "char", "byte"))
        yield f"[{row['split']} {row['number']}] {row['doc_id']} ({row['domain']}): {numbers}"
        yield row["text"]
        yield f"Tokens: {'|'.join(row['tokens'])}"
    else:
        yield f"{row['doc_id']}: {counted(row['num_tokens'], 'token')}; the store does not hold what was not chosen"
    if weight := row.get("weight"):
        chosen = "chosen" if weight["chosen"] else "not chosen"
        yield f"Weight {weight['weight']:.1f}, above {weight['above']:.1%} of the pool ({chosen})"
        for title, name in (("raises it most", "raised"), ("lowers it most", "lowered")):
            pairs = [[part["ngram"], f"{part['nats']:+.2f}", part["times"]] for part in weight.get(name, ())]
            if pairs:
                yield FittingTable((title, "nats", "times"), pairs)


def _block(block: Values) -> Parts:
    size = counted(block["block_size"], "input")
    yield f"Block {block['block']} of {block['num_blocks']:,} ({size}, {block['split']}, seed {block['seed']})"
    for row in block["segments"]:
        if "padding" in row:
            yield f"--- padding: {counted(row['padding'], 'input')}"
            continue
        begins = "begins" if row["from_the_beginning"] else "goes on"
        ends = "ends" if row["to_the_end"] else "is cut"
        yield f"--- {row['doc_id']}: {counted(row['num_inputs'], 'input')}; {begins} here and {ends} here"
        yield row["text"]


_MARKS = {"passed": ("passed", "green"), "failed": ("FAILED", "bold red"), "not applicable": ("n/a", "dim")}


def _check(result: Values) -> Parts:
    checks = result["checks"]
    rows = [[row["name"], Text(*_MARKS[row["outcome"]]), row["measured"], f"{row['seconds']:.1f}"] for row in checks]
    yield FittingTable(("check", "outcome", "measured", "s"), rows, words=(0, 1, 2))
    for row in checks:
        if row["outcome"] == "failed":
            yield f"{row['name']}: expected {row['expected']}.\n  {row['meaning']}\n  What to do: {row['remedy']}"
    failed = result["num_failed"]
    verdict = f"{failed} of {len(checks)} checks failed" if failed else "All checks that apply passed"
    yield f"{verdict}: {result['model']} on {result['store'] or 'the primer'}, {result['seconds']:.0f} s."


# Short names for some parts of a step's memory.
_MEMORY = {"optimizer_states": "optimizer", "logits_chunk": "logits", "checkpoint_copy": "checkpoint"}


def _plan(result: Values) -> Parts:
    by_optimizer = {device["optimizer"]: device["state_bytes"] for device in result["devices"]}
    states = ", ".join(f"of {name} {size / GIB:.2f} GiB" for name, size in by_optimizer.items())
    yield (
        f"{result['model']}: {_parameters(result)}; weights, gradients and the states {states}; checkpoints up to "
        f"{result['disk_bytes'] / GIB:.1f} GiB of disk, and while one is written "
        f"{result['checkpoint_bytes'] / GIB:.2f} GiB of the host's memory"
    )
    yield f"Runs: {result['runs']}"
    yield from _other_parts(result)
    places: dict[tuple[str, int], list[str]] = {}
    for row in result["rows"]:
        cells = places.setdefault((row["device"], row["block_size"]), [row["device"], str(row["block_size"])])
        cells.append(f"{row['memory_bytes'] / GIB:.1f}" if row["fits"] else "-")
    sizes = dict.fromkeys(f"x {row['micro_batch_size']}" for row in result["rows"])
    yield FittingTable(("GiB by micro-batch", "block", *sizes), places.values())
    shown_columns = len(_PROFILE_TITLES) - all(row["remedy"] is None for row in result["profiles"])
    profiles = [_profile(row)[:shown_columns] for row in result["profiles"]]
    yield FittingTable(_PROFILE_TITLES[:shown_columns], profiles, words=(0, shown_columns - 1))
    yield _speeds(result)
    shown: dict[str, Values] = {}
    some_shard = any(row["sharded"] for row in result["recommended"])
    for row in result["recommended"]:
        if row["block_size"] <= 512 and row["sharded"] == some_shard:
            shown.setdefault(row["device"], row)
    rows: list[list[str]] = [["block", *(str(row["block_size"]) for row in shown.values())], []]
    for part in result["recommended"][0]["memory"]:
        if part == "gathered" and not some_shard:
            continue
        rows.append([_MEMORY.get(part, part), *(f"{row['memory'][part] / GIB:.2f}" for row in shown.values())])
    yield FittingTable(("GiB of it", *shown), rows)
    if result.get("sources"):
        columns = ("source", "share", "documents", "tokens", "read of it", "passes")
        names = ("source", "share", "num_documents", "num_tokens", "tokens_read", "passes")
        sources = [
            {**one, "share": f"{one['share']:.1%}", "passes": f"{one['passes']:.2f}"} for one in result["sources"]
        ]
        yield FittingTable(columns, [[one[name] for name in names] for one in sources], words=(0,))
    yield (
        "~: an estimate, from the device's peak and the share of it that is expected. -: does not fit. MFU: the share "
        "of the device's peak that training uses, attention included."
    )
    if any(device["keeps_freed_memory"] for device in result["devices"]):
        yield (
            "A CPU that has 1.5 times the planned memory keeps what is freed, which is faster: with an adapter, lean "
            "weights or layers computed twice, training then takes up to 1.3 times the GiB above."
        )
    if (gpus := result["gpus"]) > 1:
        yield (
            f"Of {gpus} cards together, without the time in which they exchange gradients and weights; GiB are of each "
            f"card. A name that ends in /{gpus}: sharded (--shard full), each card holds a part; else replicated, each "
            "holds all."
        )
    if result["expected"] is not None:
        yield from _expected(result["expected"])


def _expected(result: Values) -> Parts:
    rows: list[list[str | int]] = [["none", 0, f"{result['before']:.3f}", "measured"]]
    rows += [
        [f"{one['steps']} steps", one["tokens"], f"{one['bits_per_byte']:.3f}", "measured"] for one in result["trained"]
    ]
    for row in result["rows"]:
        low, high = row["interval"]
        cells = [show_duration(row["seconds"]), row["tokens"], f"{row['bits_per_byte']:.2f}"]
        rows.append([*cells, f"{low:.2f} to {high:.2f}"])
    title = f"What to expect on this machine, {counted(result['num_documents'], 'held-out document')}"
    yield FittingTable(("training", "tokens", "bits/byte", "95 % interval"), rows, words=(0, 3), title=title)
    epoch = counted(result["tokens_per_epoch"], "token")
    if result["rows"] and result["rows"][-1]["tokens"] == result["tokens_per_epoch"]:
        yield f"The last row is the whole training text ({epoch}); what reading it again brings is not foreseen."


_PROFILE_TITLES = ("memory profile", "bytes/parameter", "block", "micro-batch", "GiB", "fits", "otherwise")


def _profile(row: Values) -> list[str]:
    size = str(row["micro_batch_size"]) if row["fits"] else "1"
    numbers = [f"{row['bytes_per_parameter']:.1f}", str(row["block_size"]), size, f"{row['memory_bytes'] / GIB:.1f}"]
    return [f"{row['device']}: {row['profile']}", *numbers, "yes" if row["fits"] else "no", row["remedy"] or ""]


def _speeds(result: Values) -> FittingTable:
    """Speed, time and price with the largest micro-batch that fits; columns without a figure are left out."""
    titles = ("device", "block", "micro-batch", "tokens/s", "MFU", "an epoch", "hours", "price")
    tokens = result["batch_tokens"]
    title = f"Tokens per step: {AUTO_BATCH if tokens == 'auto' else f'{tokens:,}'}"
    recommended = list(map(_recommended, result["recommended"]))
    filled = [place for place in range(len(titles)) if any(row[place] for row in recommended)]
    cells = [[row[place] for place in filled] for row in recommended]
    return FittingTable([titles[place] for place in filled], cells, title=title)


def _recommended(row: Values) -> list[str]:
    rate = used = ""
    if row["tokens_per_second"]:
        sign = "~" if row["estimated"] else ""
        rate, used = f"{sign}{row['tokens_per_second']:,.0f}", f"{sign}{row['mfu']:.0%}"
    epoch = f"{row['seconds_per_epoch'] / 60:,.0f} min" if row["seconds_per_epoch"] else ""
    costs = [f"{row[name]:,.2f}" if row[name] is not None else "" for name in ("hours", "price")]
    size = str(row["micro_batch_size"]) if row["fits"] else "-"
    return [row["device"], str(row["block_size"]), size, rate, used, epoch, *costs]


def _train(result: Values) -> Parts:
    before, after = result["evaluations"][0], evaluation_of_model(result)
    columns = [(f"{row['perplexity']:,.2f}", bits(row["bits_per_byte"], 4)) for row in (before, after)]
    measured = before["bits_per_byte"] is not None and after["bits_per_byte"] is not None
    difference = f"{after['bits_per_byte'] - before['bits_per_byte']:+.4f}" if measured else "-"
    change = (f"{after['perplexity'] / before['perplexity'] - 1:+.1%}", difference)
    rows = [("before", *columns[0]), ("after", *columns[1]), ("change", *change)]
    title = f"{result['settings']['model']}: {result['status']}"
    yield FittingTable(("", "perplexity", "bits/byte"), rows, title=title)
    if result["settings"].get("context"):
        yield FittingTable(("position", "tokens", "nats before", "after"), _by_position(before, after))
    yield f"Protocol: {protocol_line(after['protocol'])}; {counted(after['num_tokens'], 'held-out token')}."
    if rate := result.get("tokens_per_second"):
        speed = f"{rate:,.0f} tokens/s"
        if later := result.get("tokens_per_second_after_first_step"):  # which may compile
            speed = f"{later:,.0f} tokens/s, {rate:,.0f} with the first step"
        yield f"Trained {counted(result['tokens'], 'token')} in {result['seconds']:.0f} s ({speed})."
    if used := result.get("utilization"):
        yield (
            f"That is {used['mfu']:.0%} of the device's {used['peak_flops'] / 1e12:,.3g} TFLOP/s ({used['peak']}; MFU),"
            f" {used['mfu_without_attention']:.0%} by 6N alone."
        )
    if energy := result.get("energy"):
        what = "processors" if energy.get("source") == "RAPL" else "GPU"
        yield f"The {what} counted {energy['joules'] / 3600:,.2f} Wh."
    yield from _english(result.get("english"))
    held = ""
    if result.get("model_step") not in (None, result["steps"]):
        held = f" (the weights of step {result['model_step']} of {result['steps']}, whose validation was the best)"
    yield f"Model: {result['run']}/model{held}"


def _by_position(before: Values, after: Values) -> Iterable[list[str]]:
    """The mean loss of the tokens from each position on, up to the next row's."""
    later = {row["from"]: row["loss"] for row in after["positions"]}
    for row in before["positions"]:
        start = row["from"]
        yield [f"{start:,}", f"{row['num_tokens']:,}", f"{row['loss']:.3f}", f"{later.get(start, math.nan):.3f}"]


def _english(english: Values | None) -> Parts:
    rows = [(english or {}).get(when) for when in ("before", "after")]
    if all(rows) and english is not None:
        before, after = (bits(row["bits_per_byte"], 4) for row in rows if row)
        line = f"English sample: {before} -> {after} bits/byte"
        if interval := english.get("bits_per_byte_difference_interval"):
            low, high = interval
            line += f" ({english['bits_per_byte_difference']:+.4f}; 95 % interval {low:+.4f} to {high:+.4f})"
        yield line


def _run(result: Values) -> Parts:
    yield from _train(result["trained"])
    last = max((row["step"] for row in result["samples"]), default=0)
    for after in (row for row in result["samples"] if row["step"] == last):
        for before in (row for row in result["samples"] if row["step"] == 0 and row["prompt"] == after["prompt"]):
            yield f"\nbefore: {before['text']}\nafter:  {after['text']}"
    yield ""
    yield from _report(result)


def _generate(result: Values) -> Parts:
    for row in result["continuations"]:
        yield f"[{row['mode']}] {row['text']}\n"


def _report(result: Values) -> Parts:
    yield from markdown_table(result["table"])
    yield f"Report: {result['report']}"
    if result.get("figures"):
        yield f"Figures: {counted(len(result['figures']), 'file')} in {Path(result['figures'][0]).parent}"


def _merge(result: Values) -> Parts:
    if result["before"] and result["after"]:
        rows = [(when, bits(result[when]["bits_per_byte"], 4), result[when]["text"]) for when in ("before", "after")]
        title = f"{result['model']} + {result['added']} - {result['base']}"
        yield FittingTable(("", "bits/byte", "text"), rows, words=(2,), title=title)
    yield f"Model: {result['output']}"


def _push(result: Values) -> Parts:
    yield f"Model: {result['url']} ({'private' if result['private'] else 'public'})"


# How each command's result is shown.
DISPLAYS: dict[str, Callable[[Values], Iterable[FittingTable | str]]] = {
    "prepare": _prepare,
    "inspect": _inspect,
    "check": _check,
    "plan": _plan,
    "train": _train,
    "evaluate": evaluations,
    "compare": comparison,
    "generate": _generate,
    "report": _report,
    "explore": lambda result: (),  # the page has shown everything
    "vocab": vocabulary,
    "merge": _merge,
    "push": _push,
    "run": _run,
    "demo": _run,
}
