"""Several runs on one page: the names that tell them apart, and their curves in one drawing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cartilha.errors import UserError
from cartilha.reporting import tables
from cartilha.reporting.chart import Axis, Figure, Series, run_class, smooth, thin
from cartilha.reporting.figures import count_axis, curve, loss_axis
from cartilha.reporting.results import RecordedRun, grouped, load_run
from cartilha.reporting.wording import Wording

Member = tuple[int, RecordedRun]  # its number on the page, which decides its colour


def load_runs(paths: Sequence[str | Path]) -> list[RecordedRun]:
    """Read run directories, each once, or a UserError says what is wrong with them.

    Runs of the same name are called by as much of their path as distinguishes them.
    """
    if not paths:
        raise UserError("There is nothing to report on; give one or more run directories.")
    given = {Path(path).resolve(): path for path in reversed(paths)}  # a link to a run is the run
    runs = {path: load_run(given[path]) for path in dict.fromkeys(Path(path).resolve() for path in paths)}
    depth = 0
    while shared := {name for name, count in Counter(run.name for run in runs.values()).items() if count > 1}:
        depth += 1
        for path, run in runs.items():
            if run.name in shared:
                run.name = "/".join(path.parts[-depth:])
    return list(runs.values())


def overlaid_figures(runs: Sequence[RecordedRun], say: Wording) -> list[Figure]:
    """A drawing of the training losses and one of the validation for each group of two or more comparable runs."""
    members = list(enumerate(runs))
    found = [_losses(group, say) for group in grouped(members, lambda of: of[1].corpus.tokenizer_fingerprint or of[0])]
    found += [_validations(group, say) for group in grouped(members, lambda of: tables.measured_on(of[1]))]
    figures = [figure for figure in found if figure is not None]
    return [replace(figure, name=f"all-{number}-{figure.name}") for number, figure in enumerate(figures, 1)]


def _losses(group: Sequence[Member], say: Wording) -> Figure | None:
    """The smoothed training losses in nats per token, which only runs with the same tokenizer share."""
    series, (scale, axis) = [], _advance(group, say)
    for number, run in group:
        x, y = curve(run.steps, "loss")
        series.append(Series(run_class(number), thin(x * scale(run)), thin(smooth(y))))
    return _overlaid(Figure("train-loss", say("overlaid_train_loss"), series, axis, loss_axis(say)), group)


def _validations(group: Sequence[Member], say: Wording) -> Figure | None:
    """Bits per byte of runs that were measured by the same protocol on the same text."""
    series, (scale, axis) = [], _advance(group, say)
    for number, run in group:
        measured = [one for one in run.evaluations if one.measured_on == tables.last(run).measured_on]
        points = [(one.step or 0, one.bits_per_byte) for one in measured if one.bits_per_byte is not None]
        tips = [say("run_tip", run=run.name, step=say.number(step), bits=say.bits(bits)) for step, bits in points]
        xs, ys = [step * scale(run) for step, _ in points], [bits for _, bits in points]
        series.append(Series(run_class(number), xs, ys, tips))
    bits_axis = Axis(say("bits_per_byte").lower(), say.number)
    return _overlaid(Figure("validation", say("overlaid_validation"), series, axis, bits_axis), group)


def _overlaid(figure: Figure, group: Sequence[Member]) -> Figure | None:
    """The figure with the runs that have a curve; None if fewer than two have one."""
    drawn = [(one, run.name) for one, (_, run) in zip(figure.series, group, strict=True) if len(one.xs)]
    if len(drawn) < 2:
        return None
    legend = [(one.css_class, name) for one, name in drawn]
    return replace(figure, series=[one for one, _ in drawn], legend=legend)


def _advance(group: Sequence[Member], say: Wording) -> tuple[Callable[[RecordedRun], int], Axis]:
    """What a step counts on the horizontal axis: 1, or its tokens if the runs' steps differ in size."""
    sizes = {run.path: (run.batch or 0) * (run.settings.block_size or 0) for _, run in group}
    if len(set(sizes.values())) == 1 or 0 in sizes.values():
        return (lambda run: 1), count_axis(say("step"), say)
    return (lambda run: sizes[run.path]), count_axis(say("tokens_axis"), say)
