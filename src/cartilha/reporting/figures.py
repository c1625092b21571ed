"""The drawings of a run: curves over steps and epochs, and the loss by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from cartilha.evaluation.perplexity import perplexity
from cartilha.reporting import tables
from cartilha.reporting.chart import Axis, Series, line_chart, smooth, thin
from cartilha.reporting.results import Evaluation, RunRecord, StepRecord
from cartilha.reporting.wording import Wording

SMALL = (460, 260)  # width and height of the drawings that stand two in a row
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Figure:
    """A drawing with its title and the curves that its legend explains.

    Attributes:
        name: For its file.
        legend: Class of each curve and what it is.
        other_axis: Whether its vertical axis can be shown as perplexity.
    """

    name: str
    title: str
    drawing: Markup
    legend: tuple[tuple[str, str], ...] = ()
    other_axis: bool = False


def run_figures(run: RunRecord, say: Wording) -> list[Figure]:
    """All of which there is something to draw, in the order of the page."""
    found = [
        _loss(run, say),
        _epochs(run, say),
        _positions(run, say),
        _learning_rate(run, say),
        _speed(run, say),
        _memory(run, say),
    ]
    return [figure for figure in found if figure is not None]


def loss_axis(say: Wording) -> Axis:
    """Losses in nats a token, which the page shows as perplexities on request."""

    def as_perplexity(loss: float) -> str:
        return say.perplexity(perplexity(loss))

    return Axis(say("loss_axis"), say.number, other=(say("perplexity_axis"), as_perplexity))


def _steps_axis(say: Wording) -> Axis:
    return Axis(say("step"), say.number, whole=True)


def _loss(run: RunRecord, say: Wording) -> Figure | None:
    series = _loss_series(run, say)
    if not series:
        return None
    drawing = line_chart(series, _steps_axis(say), loss_axis(say), say("loss_chart"))
    kinds = dict.fromkeys(one.css_class for one in series)
    legend = tuple((kind, say(f"legend_{kind}")) for kind in kinds)
    return Figure("loss", say("loss_chart"), drawing, legend, other_axis=True)


def _loss_series(run: RunRecord, say: Wording) -> list[Series]:
    x, y = curve(run.steps, "loss")
    series = []
    if len(y):
        smoothed = smooth(y)
        if not np.array_equal(smoothed, y):
            series.append(Series("raw", thin(x), thin(y)))
        series.append(Series("train", thin(x), thin(smoothed)))
    groups: list[list[Evaluation]] = []
    for evaluation in run.evaluations:
        if evaluation.perplexity is None or evaluation.perplexity <= 0:
            continue
        # A line joins only what may be compared: another protocol begins another line.
        group = next((group for group in groups if group[0].comparable_with(evaluation)), None)
        if group is None:
            groups.append([evaluation])
        else:
            group.append(evaluation)
    for group in groups:
        losses = [math.log(evaluation.perplexity or 1) for evaluation in group]
        tips = [_tip(evaluation, loss, say) for evaluation, loss in zip(group, losses, strict=True)]
        series.append(Series("validation", [one.step or 0 for one in group], losses, tips))
    return series


def _tip(evaluation: Evaluation, loss: float, say: Wording) -> str:
    step, perplexity = say.number(evaluation.step or 0), say.perplexity(evaluation.perplexity)
    protocol = tables.protocol_text(evaluation.protocol, say)
    return say("tip", step=step, loss=say.number(loss, 3), perplexity=perplexity, protocol=protocol)


def _epochs(run: RunRecord, say: Wording) -> Figure | None:
    series = []
    for kind, name in (("train", "train_loss"), ("validation", "validation_loss")):
        points = [
            (e.epoch, value) for e in run.epochs if e.epoch is not None and (value := getattr(e, name)) is not None
        ]
        if points:
            tips = [say("epoch_tip", epoch=epoch, loss=say.number(loss, 4)) for epoch, loss in points]
            series.append(Series(kind, [p[0] for p in points], [p[1] for p in points], tips))
    if not series:
        return None
    drawing = line_chart(
        series, Axis(say("epoch"), say.number, whole=True), loss_axis(say), say("epochs_chart"), *SMALL
    )
    legend = tuple((one.css_class, say(f"legend_epoch_{one.css_class}")) for one in series)
    return Figure("loss-by-epoch", say("epochs_chart"), drawing, legend, other_axis=True)


def _positions(run: RunRecord, say: Wording) -> Figure | None:
    """Loss by the token's position in its document, at even distances: the bins double."""
    pair = [
        (kind, evaluation) for kind, evaluation in (("before", run.before), ("validation", run.after)) if evaluation
    ]
    begins = sorted({row.begin for _, evaluation in pair for row in evaluation.positions})
    if not begins:
        return None
    place = {begin: number for number, begin in enumerate(begins)}
    series = [
        Series(
            kind,
            [place[r.begin] for r in e.positions],
            [r.loss for r in e.positions],
            [_at(r.begin, r.loss, say) for r in e.positions],
        )
        for kind, e in pair
        if e.positions
    ]
    axis = Axis(say("position_axis"), say.number, names=[(place[begin], say.number(begin)) for begin in begins])
    drawing = line_chart(series, axis, loss_axis(say), say("positions_chart"), *SMALL)
    legend = tuple((kind, say("before" if kind == "before" else "after")) for kind in (one.css_class for one in series))
    return Figure("loss-by-position", say("positions_chart"), drawing, legend, other_axis=True)


def _at(begin: int, loss: float, say: Wording) -> str:
    return say("position_tip", position=say.number(begin), loss=say.number(loss, 3))


def _learning_rate(run: RunRecord, say: Wording) -> Figure | None:
    x, y = curve(run.steps, "lr")
    if not len(y):
        return None
    power = math.floor(math.log10(y.max())) if y.max() > 0 else 0
    label = say("lr_axis", power=str(power).translate(SUPERSCRIPTS))
    return _simple("learning-rate", "lr_chart", label, x, y / 10.0**power, None, say)


def _speed(run: RunRecord, say: Wording) -> Figure | None:
    x, y = curve(run.steps, "tokens_per_second")
    planned = run.plan.tokens_per_second if run.plan else None
    return _simple("speed", "rate_chart", say("rate_axis"), x, y, planned, say) if len(y) else None


def _memory(run: RunRecord, say: Wording) -> Figure | None:
    x, y = curve(run.steps, "memory_bytes")
    planned = run.plan.memory_bytes / 1e9 if run.plan and run.plan.memory_bytes else None
    return _simple("memory", "memory_chart", say("memory_axis"), x, y / 1e9, planned, say) if len(y) else None


def _simple(
    name: str,
    title: str,
    label: str,
    x: np.ndarray[Any, Any],
    y: np.ndarray[Any, Any],
    planned: float | None,
    say: Wording,
) -> Figure:
    """One measured curve from zero, with what was planned as a level line."""
    series = [Series("train", thin(x), thin(y))]
    if planned is not None:
        series.append(Series("plan", [x[0], x[-1]], [planned, planned]))
    drawing = line_chart(series, _steps_axis(say), Axis(label, say.number, from_zero=True), say(title), *SMALL)
    legend = (("train", say("legend_measured")), ("plan", say("legend_plan"))) if planned is not None else ()
    return Figure(name, say(title), drawing, legend)


def curve(steps: Sequence[StepRecord], name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Steps, and that value of their records, where it was recorded."""
    points = [(step.step, value) for step in steps if (value := getattr(step, name)) is not None]
    both = np.array(points, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]
