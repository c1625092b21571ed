"""The results table: one row per run, whatever became of it, for the page, as Markdown and as CSV.

Figures of another protocol or validation text (and perplexities of another tokenizer) never share a column: each group
of comparable runs has columns of its own, with a letter, and footnotes say what differs.
"""

from __future__ import annotations

import csv
import io
import re
import string
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cartilha.reporting.lenient import Record
from cartilha.reporting.results import RecordedRun, evaluation
from cartilha.reporting.wording import ABSENT, Language, Wording


@dataclass(frozen=True)
class Row:
    """A run in the results table; only figures with the same letter `mark` may be compared, or all if it is empty."""

    run: RecordedRun
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the results table, in every form of it."""

    key: str  # its name in CSV files
    read: Callable[[RecordedRun], Any]  # the value that it shows of a run, or None
    heading: Mapping[Language, str] = field(default_factory=dict)  # a column without one is in CSV files only
    write: Callable[[Wording, Any], str] = Wording.number  # the value, for people
    plain: Callable[[Any], object] = lambda value: value  # and for programs in CSV files
    words: bool = False  # rather than numbers
    # For a measure: what must be equal, besides protocol and text, for the figures of two runs to be compared.
    alike: Callable[[RecordedRun], Hashable] | None = None
    footnote: str = ""  # key of the text that stands below the table if runs differ in `alike`
    marks: tuple[str, ...] = ()  # the letters of the rows that have figures in it; empty if every row may

    def title(self, say: Wording) -> str:
        """Its heading."""
        title = self.heading[say.language]
        return f"{title} ({', '.join(self.marks)})" if self.marks else title

    def text(self, row: Row, say: Wording) -> str:
        """The row's cell; empty in the columns of runs that it may not be compared with."""
        return self.write(say, self.read(row.run)) if self._holds(row) else ""

    def value(self, row: Row) -> object:
        """The row's field in a CSV file."""
        found = self.read(row.run) if self._holds(row) else None
        return None if found is None else self.plain(found)

    def group(self, run: RecordedRun) -> Hashable:
        """What two runs must share for their figures to stand in one column; None if all may."""
        return (measured_on(run), self.alike(run)) if self.alike else None

    def _holds(self, row: Row) -> bool:
        return not self.marks or row.mark in self.marks


def last(run: RecordedRun) -> Record:
    """The evaluation that gives the run's figures, an empty one if there is none: never the one before training."""
    return run.after or evaluation({})


def measured_on(run: RecordedRun) -> Hashable:
    """Protocol and text, which two runs must share to be compared; a run that recorded none shares them with no run."""
    protocol, text = last(run).protocol.hash, run.corpus.validation_hash
    return run.path if protocol is None or text is None else (protocol, text, last(run).num_bytes)


def _length(say: Wording, settings: Record) -> str:
    steps = settings.max_steps
    return say("num_steps", steps=say.number(steps)) if steps else say.number(settings.epochs)


def _seconds_per_epoch(run: RecordedRun) -> float | None:
    """The mean over the epochs that were completed."""
    epochs = run.epochs
    if run.settings.max_steps:  # the last epoch may be incomplete, and its time too short
        blocks = (run.settings.num_steps or 0) * (run.batch or 0)
        epochs = epochs[: blocks // run.packing.num_blocks] if run.packing.num_blocks else ()
    seconds = [epoch.seconds for epoch in epochs if epoch.seconds is not None]
    return sum(seconds) / len(seconds) if seconds else None


def _words(_: Wording, text: str | None) -> str:
    return text or ABSENT


def _status(say: Wording, run: RecordedRun) -> str:
    """The status in words, with the step of the figures if that is not the last."""
    status, step = say(f"status_{run.status}"), last(run).step
    if step is None or step == run.settings.num_steps or not _has_figures(run):
        return status
    return f"{status} ({say('figures_of_step', step=say.number(step))})"


COLUMNS = [
    Column("run", lambda run: run.name, {"en": "run", "pt": "treino"}, _words, words=True),
    Column("seq_length", lambda run: run.settings.block_size, {"en": "seq length", "pt": "sequência (tokens)"}),
    Column(
        "epochs",
        lambda run: run.settings,
        {"en": "epochs", "pt": "épocas"},
        _length,
        plain=lambda settings: None if settings.max_steps else settings.epochs,
    ),
    Column("max_steps", lambda run: run.settings.max_steps),
    Column("batch", lambda run: run.batch, {"en": "batch", "pt": "lote"}),
    Column("device", lambda run: run.device_name, {"en": "device", "pt": "dispositivo"}, _words, words=True),
    Column(
        "seconds_per_epoch",
        _seconds_per_epoch,
        {"en": "time/epoch", "pt": "tempo/época"},
        Wording.duration,
        plain=lambda seconds: round(seconds, 1),
    ),
    Column(
        "val_perplexity",
        lambda run: last(run).perplexity,
        {"en": "val perplexity", "pt": "perplexidade de validação"},
        Wording.perplexity,
        plain=lambda value: Wording("en").perplexity(value).replace(",", ""),
        alike=lambda run: run.corpus.tokenizer_fingerprint,
        footnote="different_tokenizers",
    ),
    Column(
        "val_bits_per_byte",
        lambda run: last(run).bits_per_byte,
        {"en": "val bits per byte", "pt": "bits por byte de validação"},
        Wording.bits,
        plain="{:.3f}".format,
        alike=lambda run: None,
    ),
    Column("status", lambda run: run, {"en": "status", "pt": "estado"}, _status, lambda run: run.status, words=True),
    Column("step", lambda run: last(run).step),
    Column("protocol", lambda run: last(run).protocol.name),
    Column("protocol_hash", lambda run: last(run).protocol.hash),
    Column("validation_hash", lambda run: run.corpus.validation_hash),
    Column("num_bytes", lambda run: last(run).num_bytes),
    Column("tokenizer_fingerprint", lambda run: run.corpus.tokenizer_fingerprint),
]


def _has_figures(run: RecordedRun) -> bool:
    return any(column.alike and column.read(run) is not None for column in COLUMNS)


def results_table(runs: Sequence[RecordedRun]) -> list[Row]:
    """One row per run, in the order given, with the marks that say which figures may be compared."""
    groups = [tuple(column.group(run) for column in COLUMNS) if _has_figures(run) else None for run in runs]
    found = list(dict.fromkeys(group for group in groups if group))
    marks = {group: string.ascii_lowercase[i % 26] * (i // 26 + 1) for i, group in enumerate(found)}
    return [Row(run, marks[group] if group and len(found) > 1 else "") for run, group in zip(runs, groups, strict=True)]


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that people read: those with a heading."""
    return [column for column in _all_columns(rows) if column.heading]


def _all_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that the rows need: one for each group of comparable runs."""
    found = []
    for column in COLUMNS:
        groups: dict[Hashable, dict[str, None]] = {}
        for row in rows:
            if row.mark:
                groups.setdefault(column.group(row.run), {})[row.mark] = None
        found += [replace(column, marks=tuple(marks)) for marks in groups.values()] if len(groups) > 1 else [column]
    return found


def footnotes(rows: Sequence[Row], say: Wording) -> list[tuple[str, str]]:
    """Mark and text of each footnote; those without a mark say why there are letters."""
    marked = {row.mark: row.run for row in rows if row.mark}
    if not marked:
        return []
    found = [("", say("not_comparable"))]
    for column in COLUMNS:
        if column.footnote and column.alike and len(set(map(column.alike, marked.values()))) > 1:
            found.append(("", say(column.footnote)))
    for mark, run in sorted(marked.items(), key=lambda item: (len(item[0]), item[0])):
        text = say(
            "measured_on",
            protocol=protocol_text(last(run).protocol, say),
            validation=(run.corpus.validation_hash or say("not_recorded"))[:16],
            bytes=say.number(last(run).num_bytes),
            tokenizer=(run.corpus.tokenizer_fingerprint or say("not_recorded"))[:12],
        )
        found.append((mark, text))
    return found


def protocol_text(protocol: Record, say: Wording) -> str:
    """A protocol in one line: `full, window 2048, stride 1024, prefix 0, bfloat16, hash ab12`."""
    values = {key: say("not_recorded") if value is None else value for key, value in vars(protocol).items()}
    return say("protocol_line", **values)


def to_markdown(rows: Sequence[Row], language: Language) -> str:
    """A GitHub-flavoured Markdown table with its footnotes below; numbers as the language writes them."""
    say, wanted = Wording(language), columns(rows)
    lines = [[column.title(say) for column in wanted], ["---" if column.words else "---:" for column in wanted]]
    lines += [[_escape(column.text(row, say)) for column in wanted] for row in rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    notes = "".join(f"- ({mark}) {_escape(text)}\n" if mark else f"{text}\n\n" for mark, text in footnotes(rows, say))
    return f"{table}\n{notes}" if notes else table


def _escape(text: str) -> str:
    """Text that Markdown shows as it is and that cannot end its cell."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def to_csv(rows: Sequence[Row]) -> str:
    """The table for programs: every column, and the mark as `comparable_group`; a field without a figure is empty.

    If not all runs may be compared, each group has columns of its own: `val_perplexity_a`, `val_perplexity_b`.
    """
    wanted, out = _all_columns(rows), io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*("_".join([column.key, *column.marks]) for column in wanted), "comparable_group"])
    writer.writerows([*(column.value(row) for column in wanted), row.mark] for row in rows)
    return out.getvalue()
