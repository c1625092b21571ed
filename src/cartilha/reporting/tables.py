"""The results table: one row a run, whatever became of it, as rows, Markdown or CSV.

Perplexities that were measured differently look alike, and that is how wrong tables come about. So figures of another
protocol or validation text (and perplexities of another tokenizer) never stand in one column: each group of comparable
runs has columns of its own, with a letter, in every form of the table, and footnotes say what differs.
"""

from __future__ import annotations

import csv
import io
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cartilha.reporting.results import Protocol, RunRecord
from cartilha.reporting.wording import Language, Wording

SETTINGS = ("run", "seq_length", "epochs", "batch", "device", "time_per_epoch")
FIGURES = ("perplexity", "bits_per_byte")
TEXT_COLUMNS = ("run", "device", "status")


@dataclass(frozen=True)
class Column:
    """A column of the table; `marks` are the letters of the rows that have figures in it, none where all may."""

    key: str
    marks: tuple[str, ...] = ()

    def title(self, say: Wording) -> str:
        """Its heading."""
        title = say(f"column_{self.key}")
        return f"{title} ({', '.join(self.marks)})" if self.marks else title

    @property
    def is_text(self) -> bool:
        """Whether it holds words rather than numbers."""
        return self.key in TEXT_COLUMNS


@dataclass(frozen=True)
class Row:
    """A run in the results table; None where there is no figure.

    Attributes:
        epochs: None where `max_steps` set the length.
        batch: Blocks an optimizer step.
        seconds_per_epoch: Mean over the epochs that were completed.
        step: The step that the figures are of.
        mark: A letter; only perplexities with the same one may be compared. Empty where all of the table's may be.
    """

    name: str
    status: str
    block_size: int | None = None
    epochs: int | None = None
    max_steps: int | None = None
    num_steps: int | None = None
    batch: int | None = None
    device: str | None = None
    seconds_per_epoch: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    step: int | None = None
    protocol: Protocol = field(default_factory=Protocol)
    num_bytes: int | None = None
    validation_hash: str | None = None
    tokenizer_fingerprint: str | None = None
    mark: str = ""

    @property
    def has_figures(self) -> bool:
        """Whether there is anything to compare."""
        return self.perplexity is not None or self.bits_per_byte is not None


def results_table(runs: Sequence[RunRecord]) -> list[Row]:
    """One row a run, in the order given, with the marks that say which figures may be compared."""
    rows = [_row(run) for run in runs]
    groups: dict[tuple[object, ...], str] = {}
    for index, row in enumerate(rows):
        if row.has_figures:
            key = (measured_on(row, index), row.tokenizer_fingerprint)
            groups.setdefault(key, string.ascii_lowercase[len(groups) % 26] * (len(groups) // 26 + 1))
    if len(groups) < 2:
        return rows
    return [
        replace(row, mark=groups[measured_on(row, index), row.tokenizer_fingerprint]) if row.has_figures else row
        for index, row in enumerate(rows)
    ]


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that the rows need: perplexity and bits per byte once for each group that may be compared."""
    return [
        *(Column(key) for key in SETTINGS),
        *(Column("perplexity", marks) for marks in _groups(rows, by_tokenizer=True)),
        *(Column("bits_per_byte", marks) for marks in _groups(rows, by_tokenizer=False)),
        Column("status"),
    ]


def _groups(rows: Sequence[Row], *, by_tokenizer: bool) -> list[tuple[str, ...]]:
    """The marks that share a column; one group without marks where all do."""
    found: dict[object, dict[str, None]] = {}
    for index, row in enumerate(rows):
        if row.mark:
            found.setdefault(row.mark if by_tokenizer else measured_on(row, index), {})[row.mark] = None
    return [tuple(marks) for marks in found.values()] if len(found) > 1 else [()]


def _row(run: RunRecord) -> Row:
    settings, after = run.settings, run.after
    row = Row(
        name=run.name,
        status=run.status,
        block_size=settings.block_size,
        epochs=None if settings.max_steps else settings.epochs,
        max_steps=settings.max_steps,
        num_steps=settings.num_steps,
        batch=settings.batch,
        device=run.device_name,
        seconds_per_epoch=_seconds_per_epoch(run),
        validation_hash=run.corpus.validation_hash,
        tokenizer_fingerprint=run.corpus.tokenizer_fingerprint,
    )
    if after is None:  # the figures before training are not the run's: a run that failed at once has none
        return row
    return replace(
        row,
        perplexity=after.perplexity,
        bits_per_byte=after.bits_per_byte,
        step=after.step,
        protocol=after.protocol,
        num_bytes=after.num_bytes,
    )


def _seconds_per_epoch(run: RunRecord) -> float | None:
    epochs = run.epochs
    if run.settings.max_steps:  # the last epoch may be a part of one, whose time would look like a fast machine
        blocks = (run.settings.num_steps or 0) * (run.settings.batch or 0)
        epochs = epochs[: blocks // run.packing.num_blocks] if run.packing.num_blocks else ()
    seconds = [epoch.seconds for epoch in epochs if epoch.seconds is not None]
    return sum(seconds) / len(seconds) if seconds else None


def measured_on(row: Row, index: int) -> tuple[object, ...]:
    """What has to be equal for two rows to be compared; a row that does not record it is comparable with none."""
    if row.protocol.hash is None or row.validation_hash is None:
        return ("unknown", index)
    return (row.protocol.hash, row.validation_hash, row.num_bytes)


def cells(row: Row, wanted: Sequence[Column], language: Language) -> list[str]:
    """The row's text for each column; nothing in the columns of runs that it may not be compared with."""
    say = Wording(language)
    steps = say("num_steps", steps=say.number(row.max_steps))
    epochs = steps if row.max_steps else say.number(row.epochs)
    texts = {
        "run": row.name,
        "seq_length": say.number(row.block_size),
        "epochs": epochs,
        "batch": say.number(row.batch),
        "device": row.device or "-",
        "time_per_epoch": say.duration(row.seconds_per_epoch),
        "perplexity": say.perplexity(row.perplexity),
        "bits_per_byte": say.bits(row.bits_per_byte),
        "status": status_text(row, say),
    }
    return ["" if column.marks and row.mark not in column.marks else texts[column.key] for column in wanted]


def status_text(row: Row, say: Wording) -> str:
    """The status in words, and the step of the figures where that is not the last."""
    status = say(f"status_{row.status}")
    if row.has_figures and row.step is not None and row.step != row.num_steps:
        return f"{status} ({say('figures_of_step', step=say.number(row.step))})"
    return status


def footnotes(rows: Sequence[Row], language: Language) -> list[tuple[str, str]]:
    """Mark and text of each footnote; those without a mark say why there are letters."""
    say = Wording(language)
    notes = {row.mark: _measured_text(row, say) for row in rows if row.mark}
    if not notes:
        return []
    different = len({row.tokenizer_fingerprint for row in rows if row.mark}) > 1
    sorted_notes = sorted(notes.items(), key=lambda note: (len(note[0]), note[0]))
    why = [("", say("not_comparable")), *([("", say("different_tokenizers"))] if different else [])]
    return [*why, *sorted_notes]


def _measured_text(row: Row, say: Wording) -> str:
    validation = (row.validation_hash or say("not_recorded"))[:16]
    return say(
        "measured_on",
        protocol=protocol_text(row.protocol, say),
        validation=validation,
        bytes=say.number(row.num_bytes),
        tokenizer=(row.tokenizer_fingerprint or say("not_recorded"))[:12],
    )


def protocol_text(protocol: Protocol, say: Wording) -> str:
    """A protocol in one line: `full, window 2048, stride 1024, prefix 0, bfloat16, hash ab12`."""
    values = {key: say("not_recorded") if value is None else value for key, value in vars(protocol).items()}
    return say("protocol_line", **values)


def to_markdown(rows: Sequence[Row], language: Language) -> str:
    """A GitHub-flavoured Markdown table with its footnotes below; numbers as the language writes them."""
    say = Wording(language)
    wanted = columns(rows)
    lines = [[column.title(say) for column in wanted], ["---" if column.is_text else "---:" for column in wanted]]
    lines += [[_escape(text) for text in cells(row, wanted, language)] for row in rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    notes = footnotes(rows, language)
    if not notes:
        return table
    return table + "\n" + "".join(f"- ({mark}) {_escape(text)}\n" if mark else f"{text}\n\n" for mark, text in notes)


def _escape(text: str) -> str:
    """Text that Markdown leaves as it is and that cannot end its cell."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def to_csv(rows: Sequence[Row]) -> str:
    """The table for programs: decimal points, seconds, an empty field where there is no figure.

    Where not all runs may be compared, each group has columns of its own: `val_perplexity_a`, `val_perplexity_b`.
    """
    wanted = columns(rows)
    records = [_csv_fields(row, wanted) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(_csv_fields(Row("", ""), wanted)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _csv_fields(row: Row, wanted: Sequence[Column]) -> dict[str, object]:
    perplexity = None if row.perplexity is None else Wording("en").perplexity(row.perplexity).replace(",", "")
    texts = {
        "perplexity": perplexity,
        "bits_per_byte": None if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}",
    }
    figures = {
        "_".join([f"val_{column.key}", *column.marks]): (
            None if column.marks and row.mark not in column.marks else texts[column.key]
        )
        for column in wanted
        if column.key in FIGURES
    }
    return {
        "run": row.name,
        "seq_length": row.block_size,
        "epochs": row.epochs,
        "max_steps": row.max_steps,
        "batch": row.batch,
        "device": row.device,
        "seconds_per_epoch": None if row.seconds_per_epoch is None else round(row.seconds_per_epoch, 1),
        **figures,
        "status": row.status,
        "step": row.step,
        "protocol": row.protocol.name,
        "protocol_hash": row.protocol.hash,
        "validation_hash": row.validation_hash,
        "num_bytes": row.num_bytes,
        "tokenizer_fingerprint": row.tokenizer_fingerprint,
        "comparable_group": row.mark,
    }
