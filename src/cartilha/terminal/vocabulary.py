"""What a vocabulary costs, as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from cartilha.errors import counted
from cartilha.terminal.tables import show_table

Values = Mapping[str, Any]

MAX_PIECES = 20  # of a word; a line without a space is one, too


def show_vocabulary(console: Console, result: Values) -> None:
    """The report on a vocabulary, what an extension changed, or the advice."""
    if result["advice"] is not None:
        rows = []
        for row in result["advice"]["tried"]:
            change, english = f"{row['difference']:+.4f}", f"{row['difference_english']:+.4f}"
            share = f"{row['share_of_tokens'] - 1:+.0%}"
            rows.append([f"+{row['num_new']:,}", f"{row['bits_per_byte']:.4f}", change, share, english])
        show_table(console, ("vocabulary", "bits/byte", "against keep", "tokens", "English"), rows)
        for sentence in result["advice"]["sentences"]:
            console.print(sentence, markup=False)
        return
    report = result["report"]
    rows = []
    for name, row in {**report["domains"], "all": report["total"], "(English)": report["english"]}.items():
        figures = [f"{row['tokens_per_word']:.2f}", f"{row['bytes_per_token']:.2f}", f"{row['share_in_pieces']:.1%}"]
        rows.append([name, f"{row['num_words']:,}", *figures])
    show_table(console, ("text", "words", "tokens/word", "bytes/token", "words in 3 or more pieces"), rows)
    spare = "" if report["num_rows"] is None else f", {counted(report['num_spare_rows'], 'spare row')} in the model"
    used = f"{report['share_of_ids_used']:.0%} of them in this text"
    console.print(f"{report['num_ids']:,} ids, {used}{spare}.", markup=False)
    words = ", ".join(f"{_pieces(row['pieces'])} ({row['count']:,})" for row in report["words"][:10])
    letters = ", ".join(f"{row['letter']} {row['share_apart']:.0%}" for row in report["letters"][:10])
    console.print(f"Words that cost most: {words}", markup=False)
    console.print(f"Letters cut or on their own: {letters}", markup=False)
    if report["sizes"]:
        _show_sizes(console, report["sizes"])
    if report["not_extendable"]:
        console.print(report["not_extendable"], markup=False)
    if result["extension"] is not None:
        row = result["extension"]
        change = f"{row['tokens_after'] / row['tokens_before'] - 1:+.1%}"
        console.print(
            f"Extended by {counted(row['num_new'], 'token')} ({change} tokens of this text): {row['output']}",
            markup=False,
        )


def _show_sizes(console: Console, sizes: Sequence[Values]) -> None:
    rows = []
    for row in sizes:
        costs = ["", "", ""]
        if "new_parameters" in row:
            more = f"+{row['new_parameters'] / 1e6:.1f} M ({row['share_of_parameters']:+.1%})"
            costs = [f"{row['words_in_context']:,.0f}", f"{row['share_of_time'] - 1:+.0%}", more]
        fertility, tokens = f"{row['tokens_per_word']:.2f}", f"{row['share_of_tokens'] - 1:+.0%}"
        rows.append([f"+{row['num_new']:,}", fertility, tokens, *costs])
    title = "Extended, on documents that the new tokens were not learnt on"
    show_table(
        console, ("new tokens", "tokens/word", "tokens", "words in context", "time", "parameters"), rows, title=title
    )


def _pieces(pieces: Sequence[str]) -> str:
    """A word's pieces with marks between; of a line without a space the beginning."""
    return "|".join([*pieces[:MAX_PIECES], *(["..."] if len(pieces) > MAX_PIECES else [])]).strip()
