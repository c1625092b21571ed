"""The report page: one file, offline, English and Portuguese, drawn from run records.

The whole body is rendered once a language and a button shows one of the two, so that the template stays plain and a
number is written the way its language writes it. A content security policy forbids the page to load anything, and to
run any script but its own: a `<script>` in a generated text is text twice over.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cartilha.errors import UserError
from cartilha.report import tables
from cartilha.report.chart import Axis, Series, line_chart, smooth, thin
from cartilha.report.results import Evaluation, RunRecord, Sample, StepRecord, load_run
from cartilha.report.wording import LANGUAGES, Wording, choose_language
from cartilha.storage import write_atomically

MAX_PROMPTS = 24
MAX_SAMPLE_CHARS = 8000


def render_report(run_paths: Sequence[str | Path], output: str | Path, language: str = "auto") -> Path:
    """Write the page about one or more runs.

    Args:
        run_paths: Run directories, in the order of the page.
        output: The HTML file to write, atomically.
        language: What the page opens in: `en`, `pt`, or `auto` for the locale's. Both are in the page.

    Returns:
        The path that was written.

    Raises:
        UserError: No path was given, or one of them is no run directory.
    """
    if not run_paths:
        raise UserError("There is nothing to report on; give one or more run directories.")
    runs = [load_run(path) for path in run_paths]
    page = render_page(runs, Wording(choose_language(language)))
    write_atomically(Path(output), page.encode("utf-8", errors="replace"))  # JSON may hold half a surrogate pair
    return Path(output)


def render_page(runs: Sequence[RunRecord], opening: Wording) -> str:
    """The page as text, opening in the language of `opening`."""
    environment = Environment(
        loader=PackageLoader("cartilha.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _template_file("report.js")
    views = [_view(runs, Wording(language)) for language in LANGUAGES]
    return environment.get_template("report.html.j2").render(
        views=views,
        code=opening.code,
        title=next(view["title"] for view in views if view["say"].code == opening.code),
        columns=tables.COLUMNS,
        csv=tables.to_csv(tables.results_table(runs)),
        protocol_text=tables.protocol_text,
        style=Markup(_template_file("report.css")),  # ours, like the script: the only texts that are not escaped
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _template_file(name: str) -> str:
    return (resources.files("cartilha.report") / "templates" / name).read_text(encoding="utf-8")


def _view(runs: Sequence[RunRecord], say: Wording) -> dict[str, Any]:
    """What the template needs for one language."""
    rows = tables.results_table(runs)
    return {
        "say": say,
        "title": f"{say('title')}: {', '.join(run.name for run in runs)}",
        "other": next(Wording(language).code for language in LANGUAGES if language != say.language),
        "rows": [
            [(column, text, tables.marks(row, column)) for column, text in tables.cells(row, say.language).items()]
            for row in rows
        ],
        "footnotes": tables.footnotes(rows, say.language),
        "markdown": tables.to_markdown(rows, say.language),
        "runs": [_run_view(run, say) for run in runs],
    }


def _run_view(run: RunRecord, say: Wording) -> dict[str, Any]:
    pairs = sample_pairs(run.samples)
    return {
        "record": run,
        "figures": _figures(run, say),
        "pairs": pairs[:MAX_PROMPTS],
        "more_pairs": len(pairs[MAX_PROMPTS:]),
        "provenance": _provenance(run, say),
    }


@dataclass(frozen=True)
class ShownSample:
    """A generated text, its prompt apart."""

    step: int | None
    prompt: str
    rest: str


@dataclass(frozen=True)
class SamplePair:
    """What the model wrote for one prompt in one mode before training, and what it wrote last."""

    prompt: str
    mode: str | None
    before: ShownSample | None
    after: ShownSample | None


def sample_pairs(samples: Sequence[Sample]) -> list[SamplePair]:
    """First and last text of each prompt and mode, in the order in which the prompts appear.

    A text counts as one from before training only if it is of step 0; the older one of two later texts would not do.
    """
    grouped: dict[tuple[str, str | None], list[Sample]] = {}
    for sample in samples:
        grouped.setdefault((sample.prompt or "", sample.mode), []).append(sample)
    pairs = []
    for (prompt, mode), texts in grouped.items():
        before = next((sample for sample in texts if not sample.step), None)
        after = max((sample for sample in texts if sample.step), key=lambda sample: sample.step or 0, default=None)
        pairs.append(SamplePair(prompt, mode, _shown(before), _shown(after)))
    return pairs


def _shown(sample: Sample | None) -> ShownSample | None:
    if sample is None:
        return None
    text = sample.text or ""
    prompt = (sample.prompt or "").rstrip()  # generation strips a prompt's last spaces and heals them
    if not text.startswith(prompt):
        prompt = ""
    rest = text[len(prompt) :]
    if len(rest) > MAX_SAMPLE_CHARS:
        rest = rest[:MAX_SAMPLE_CHARS] + " […]"
    return ShownSample(sample.step, prompt, rest)


@dataclass(frozen=True)
class Figure:
    """A drawing with its title and the curves that its legend explains."""

    title: str
    drawing: Markup
    legend: tuple[str, ...] = ()


def _figures(run: RunRecord, say: Wording) -> list[Figure]:
    """Loss, learning rate and throughput over the steps; those of which there is something to draw."""
    steps = Axis(say("step"), say.number, whole=True)
    figures = []
    loss = _loss_series(run, say)
    if loss:
        drawing = line_chart(loss, steps, Axis(say("loss_axis"), say.number), say("loss_chart"))
        legend = tuple(dict.fromkeys(series.css_class for series in loss))
        figures.append(Figure(say("loss_chart"), drawing, legend))
    x, y = _curve(run.steps, "lr")
    if len(y):
        power = math.floor(math.log10(y.max())) if y.max() > 0 else 0
        label = say("lr_axis", power=str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")))
        lr = Series("train", thin(x), thin(y / 10.0**power))
        axis = Axis(label, say.number, from_zero=True)
        figures.append(Figure(say("lr_chart"), line_chart([lr], steps, axis, say("lr_chart"), 460, 260)))
    x, y = _curve(run.steps, "tokens_per_second")
    if len(y):
        rate = Series("train", thin(x), thin(y))
        axis = Axis(say("rate_axis"), say.number, from_zero=True)
        figures.append(Figure(say("rate_chart"), line_chart([rate], steps, axis, say("rate_chart"), 460, 260)))
    return figures


def _curve(steps: Sequence[StepRecord], name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    points = [(step.step, value) for step in steps if (value := getattr(step, name)) is not None]
    both = np.array(points, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _loss_series(run: RunRecord, say: Wording) -> list[Series]:
    x, y = _curve(run.steps, "loss")
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


def _provenance(run: RunRecord, say: Wording) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled groups of keys and values, with the names that the records use: those can be searched for."""
    last = run.after or run.before
    groups: dict[str, Mapping[str, Any]] = {
        "group_settings": asdict(run.settings),
        "group_corpus": {**asdict(run.corpus), **asdict(run.packing)},
        "group_protocol": asdict(last.protocol) if last else {},
        "group_machine": run.machine,
        "group_versions": run.versions,
    }
    return [
        (say(title), [(key, _value_text(key, value, say)) for key, value in pairs.items()])
        for title, pairs in groups.items()
        if any(value is not None for value in pairs.values())
    ]


def _value_text(key: str, value: Any, say: Wording) -> str:
    if value is None:
        return "-"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if key.endswith("_bytes"):
            return say.size(value)
        if key.endswith("_share"):
            return say.percent(value, 2)
        if key.startswith("num_") or key.endswith("_tokens"):
            return say.number(value)
    return str(value)
