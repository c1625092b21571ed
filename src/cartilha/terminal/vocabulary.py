"""What a vocabulary costs, as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from cartilha.errors import counted
from cartilha.terminal.tables import FittingTable, Parts, Values

MAX_PIECES = 20  # of a word, which may be a whole line without spaces


def vocabulary(result: Values) -> Parts:
    """The report on a vocabulary, what an extension changed, or the advice."""
    if result["advice"] is not None:
        tried = map(_tried, result["advice"]["tried"])
        yield FittingTable(("vocabulary", "bits/byte", "against keep", "tokens", "English"), tried)
        yield from result["advice"]["sentences"]
        return
    report = result["report"]
    texts = {**report["domains"], "all": report["total"], "(English)": report["english"]}
    rows = []
    for name, row in texts.items():
        figures = [f"{row[figure]:.2f}" for figure in ("tokens_per_word", "bytes_per_token")]
        rows.append([name, row["num_words"], *figures, f"{row['share_in_pieces']:.1%}"])
    yield FittingTable(("text", "words", "tokens/word", "bytes/token", "words in 3 or more pieces"), rows)
    spare = "" if report["num_rows"] is None else f", {counted(report['num_spare_rows'], 'spare row')} in the model"
    yield f"{report['num_ids']:,} ids, {report['share_of_ids_used']:.0%} of them in this text{spare}."
    words = ", ".join(f"{_pieces(row['pieces'])} ({row['count']:,})" for row in report["words"][:10])
    yield f"Words that cost most: {words}"
    letters = ", ".join(f"{row['letter']} {row['share_apart']:.0%}" for row in report["letters"][:10])
    yield f"Letters cut or on their own: {letters}"
    if report["sizes"]:
        titles = ("new tokens", "tokens/word", "tokens", "words in context", "time", "parameters")
        title = "Extended, on documents that the new tokens were not learnt on"
        yield FittingTable(titles, map(_size, report["sizes"]), title=title)
    if report["not_extendable"]:
        yield report["not_extendable"]
    if result["extension"] is not None:
        row = result["extension"]
        change = f"{row['tokens_after'] / row['tokens_before'] - 1:+.1%}"
        yield f"Extended by {counted(row['num_new'], 'token')} ({change} tokens of this text): {row['output']}"


def _tried(row: Values) -> list[str]:
    change, english = f"{row['difference']:+.4f}", f"{row['difference_english']:+.4f}"
    return [f"+{row['num_new']:,}", f"{row['bits_per_byte']:.4f}", change, _change(row["share_of_tokens"]), english]


def _size(row: Values) -> list[str]:
    costs = ["", "", ""]
    if "new_parameters" in row:
        more = f"+{row['new_parameters'] / 1e6:.1f} M ({row['share_of_parameters']:+.1%})"
        costs = [f"{row['words_in_context']:,.0f}", _change(row["share_of_time"]), more]
    return [f"+{row['num_new']:,}", f"{row['tokens_per_word']:.2f}", _change(row["share_of_tokens"]), *costs]


def _change(share: float) -> str:
    return f"{share - 1:+.0%}"


def _pieces(pieces: Sequence[str]) -> str:
    return "|".join([*pieces[:MAX_PIECES], *(["..."] if len(pieces) > MAX_PIECES else [])]).strip()
