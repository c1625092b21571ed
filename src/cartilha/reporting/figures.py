"""The drawings of a run: curves over steps and epochs, and the loss by position."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from cartilha.evaluation.sums import perplexity
from cartilha.reporting import tables
from cartilha.reporting.chart import Axis, Figure, Floats, Series, smooth, thin
from cartilha.reporting.lenient import Record
from cartilha.reporting.results import RecordedRun, grouped
from cartilha.reporting.wording import Wording

SMALL = (460, 260)  # width and height of the drawings that stand two in a row
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def run_figures(run: RecordedRun, say: Wording) -> list[Figure]:
    """The figures for which the run recorded something, in the order of the page."""
    found = [
        _loss(run, say),
        _epochs(run, say),
        _positions(run, say),
        _learning_rate(run, say),
        _measured(run, say, "speed", "tokens_per_second"),
        _measured(run, say, "memory", "memory_bytes", unit=1e9),
    ]
    return [figure for figure in found if figure is not None]


def curve(records: Iterable[object], name: str, over: str = "step") -> tuple[Floats, Floats]:
    """Two arrays: the steps (or epochs) and the value `name`, of the records that have both."""
    points = [(getattr(record, over), getattr(record, name)) for record in records]
    both = np.array([point for point in points if None not in point], dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def loss_axis(say: Wording) -> Axis:
    """An axis of losses in nats per token, which the page shows as perplexities on request."""
    other = (say("perplexity_axis"), lambda loss: say.perplexity(perplexity(loss)))
    return Axis(say("loss_axis"), say.number, other=other)


def count_axis(label: str, say: Wording) -> Axis:
    """An axis of steps, epochs or tokens."""
    return Axis(label, say.number, whole=True)


def _loss(run: RecordedRun, say: Wording) -> Figure | None:
    x, y = curve(run.steps, "loss")
    series = []
    if len(y):
        smoothed = smooth(y)
        if not np.array_equal(smoothed, y):
            series.append(Series("raw", thin(x), thin(y)))
        series.append(Series("train", thin(x), thin(smoothed)))
    measured = [one for one in run.evaluations if (one.perplexity or 0) > 0]
    # A line joins only evaluations that may be compared.
    series += [_validation(group, say) for group in grouped(measured, lambda one: one.measured_on)]
    if not series:
        return None
    legend = [(kind, say(f"legend_{kind}")) for kind in dict.fromkeys(one.css_class for one in series)]
    return Figure("loss", say("loss_chart"), series, count_axis(say("step"), say), loss_axis(say), legend)


def _validation(group: Sequence[Record], say: Wording) -> Series:
    steps, losses = [one.step or 0 for one in group], [math.log(one.perplexity) for one in group]
    tips = []
    for one, step, loss in zip(group, steps, losses, strict=True):
        texts = {"step": say.number(step), "loss": say.number(loss, 3), "perplexity": say.perplexity(one.perplexity)}
        tips.append(say("tip", **texts, protocol=tables.protocol_text(one.protocol, say)))
    return Series("validation", steps, losses, tips)


def _epochs(run: RecordedRun, say: Wording) -> Figure | None:
    series = []
    for kind in ("train", "validation"):
        epochs, losses = curve(run.epochs, f"{kind}_loss", over="epoch")
        if len(losses):
            points = zip(epochs, losses, strict=True)
            tips = [say("epoch_tip", epoch=int(epoch), loss=say.number(loss, 4)) for epoch, loss in points]
            series.append(Series(kind, epochs, losses, tips))
    if not series:
        return None
    legend = [(one.css_class, say(f"legend_epoch_{one.css_class}")) for one in series]
    x, y = count_axis(say("epoch"), say), loss_axis(say)
    return Figure("loss-by-epoch", say("epochs_chart"), series, x, y, legend, SMALL)


def _positions(run: RecordedRun, say: Wording) -> Figure | None:
    """Loss by the token's position in its document; the bins double in size and are drawn at even distances."""
    lines = [("before", "before", run.before), ("validation", "after", run.after)]
    found = [(kind, word, one.positions) for kind, word, one in lines if one and one.positions]
    begins = sorted({begin for _, _, losses in found for begin in losses})
    if not begins:
        return None
    series = []
    for kind, _, losses in found:
        tips = [say("position_tip", position=say.number(at), loss=say.number(loss, 3)) for at, loss in losses.items()]
        series.append(Series(kind, [begins.index(begin) for begin in losses], list(losses.values()), tips))
    names = [(place, say.number(begin)) for place, begin in enumerate(begins)]
    x, y = Axis(say("position_axis"), say.number, names=names), loss_axis(say)
    legend = [(kind, say(word)) for kind, word, _ in found]
    return Figure("loss-by-position", say("positions_chart"), series, x, y, legend, SMALL)


def _learning_rate(run: RecordedRun, say: Wording) -> Figure | None:
    highest = curve(run.steps, "lr")[1].max(initial=0.0)
    power = math.floor(math.log10(highest)) if highest > 0 else 0
    return _measured(run, say, "learning-rate", "lr", unit=10.0**power, power=str(power).translate(SUPERSCRIPTS))


def _measured(run: RecordedRun, say: Wording, name: str, field: str, unit: float = 1.0, **label: str) -> Figure | None:
    """One value of the steps on an axis from zero, with the planned value as a level line."""
    x, y = curve(run.steps, field)
    if not len(y):
        return None
    series, legend = [Series("train", thin(x), thin(y / unit))], []
    if planned := vars(run.plan).get(field):
        series.append(Series("plan", [x[0], x[-1]], [planned / unit, planned / unit]))
        legend = [("train", say("legend_measured")), ("plan", say("legend_plan"))]
    y_axis = Axis(say(f"{field}_axis", **label), say.number, from_zero=True)
    return Figure(name, say(f"{field}_chart"), series, count_axis(say("step"), say), y_axis, legend, SMALL)
