"""The report page: one file, offline, its body once in English and once in Portuguese, drawn from run records.

Texts and surprisal over the steps are in the page once, as data that its script draws. Everything is escaped, and a
content security policy forbids the page to load anything or to run any other script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cartilha.reporting import tables
from cartilha.reporting.chart import run_styles
from cartilha.reporting.figures import run_figures
from cartilha.reporting.lenient import Record
from cartilha.reporting.pages import PACKAGE, environment, template_file
from cartilha.reporting.results import DOMAIN, RecordedRun
from cartilha.reporting.samples import SampleSeries, sample_series, steps_of
from cartilha.reporting.several import load_runs, overlaid_figures
from cartilha.reporting.surprisal import MAX_STEPS, page_data
from cartilha.reporting.wording import ABSENT, LANGUAGES, Wording, choose_language
from cartilha.storage import write_atomically

MAX_PROMPTS = 24
MAX_DOMAINS = 24
MAX_SURPRISAL_BYTES = 2_000_000  # of all runs together; a page has 5 MB at most
MAX_SAMPLE_BYTES = 1_000_000
SCRIPT_WORDS = re.compile(r"\bwords(?:\[[\w.]+\])?\.(\w+)")  # keys of the texts that the page's script writes


def render_report(run_paths: Sequence[str | Path], output: str | Path, language: str = "auto") -> Path:
    """Write the page about the runs in these directories, in this order, atomically; returns its path.

    It opens in `language`: `en`, `pt`, or `auto` for that of the reader's browser (without scripts, of this machine).
    A UserError says that there is no path, or one that is no run directory.
    """
    runs, opening = load_runs(run_paths), Wording(choose_language(language))
    of_a_run = (run_figures, overlaid_figures, steps_of, domain_rows, plan_rows, provenance)
    of_the_table = (tables.columns, tables.footnotes, tables.to_csv, tables.to_markdown, tables.protocol_text)
    rows = tables.results_table(runs)
    series = [sample_series(run.samples) for run in runs]
    script = template_file(PACKAGE, "report.js")
    template = environment().get_template("report.html.j2")
    page = template.render(
        {function.__name__: function for function in (*of_a_run, *of_the_table)},
        wordings=list(map(Wording, LANGUAGES)),
        opening=opening,
        fixed=language != "auto",
        runs=runs,
        series=series,
        max_prompts=MAX_PROMPTS,
        rows=rows,
        data=_script_data(runs, series, sorted(set(SCRIPT_WORDS.findall(script)))),
        # Style and script are ours: the only texts that are not escaped.
        style=Markup(template_file(PACKAGE, "report.css") + run_styles(len(runs))),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_atomically(Path(output), page.encode("utf-8", errors="replace"))  # JSON may hold half a surrogate pair
    return Path(output)


def _script_data(runs: Sequence[RecordedRun], series: Sequence[list[SampleSeries]], words: Sequence[str]) -> Markup:
    """What the page's script draws, as JSON that cannot end its `<script>` element: `<` is escaped."""
    values = {
        "words": {say.code: {word: say.template(word) for word in words} for say in map(Wording, LANGUAGES)},
        "runs": [
            {
                "samples": _sample_data(found[:MAX_PROMPTS], MAX_SAMPLE_BYTES // len(runs)),
                "surprisal": _surprisal_data(run, MAX_SURPRISAL_BYTES // len(runs)),
            }
            for run, found in zip(runs, series, strict=True)
        ],
    }
    return Markup(_to_json(values).replace("<", "\\u003c").replace("&", "\\u0026"))


def _to_json(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def _fits(values: Any, max_bytes: int) -> bool:
    return len(_to_json(values).encode("utf-8", errors="replace")) <= max_bytes


def _surprisal_data(run: RecordedRun, max_bytes: int) -> dict[str, Any] | None:
    """The shown documents; fewer of them, and fewer steps, if they exceed their share of the page's size."""
    if run.surprisal is None or not run.surprisal.documents:
        return None
    sizes = ((4, MAX_STEPS), (3, 8), (2, 6), (1, 4), (1, 2))
    found = (page_data(run.surprisal, num_documents, max_steps) for num_documents, max_steps in sizes)
    return next((data for data in found if _fits(data, max_bytes)), None)


def _sample_data(series: Sequence[SampleSeries], max_bytes: int) -> dict[str, Any]:
    """Each prompt's text at each step, for the slider; empty if only the first and the last can be shown."""
    steps = steps_of(series)
    by_step = [{text.step or 0: [text.prompt, text.rest] for text in one.texts} for one in series]
    found = {"steps": steps, "texts": [[texts.get(step) for step in steps] for texts in by_step]}
    return found if len(steps) > 1 and _fits(found, max_bytes) else {"steps": [], "texts": []}


def domain_rows(run: RecordedRun) -> list[tuple[str, Record, Record]]:
    """Each domain's name, its figures before training where they may be compared, and the last ones."""
    before, after = run.before, run.after
    known = before.domains if before and after and before.measured_on == after.measured_on else {}
    last = after or before
    shown = list(last.domains.items())[:MAX_DOMAINS] if last else []
    return [(name, known.get(name, DOMAIN({})), figures) for name, figures in shown]


def plan_rows(run: RecordedRun, say: Wording) -> list[tuple[str, str, str]]:
    """What, planned, measured; empty where nothing was planned."""
    planned, found = run.plan.utilization, run.utilization
    speed = run.tokens_per_second_after_first_step or run.tokens_per_second

    def _tera(flops: float | None) -> str:
        return say.number(None if flops is None else flops / 1e12, 1)

    rows = (
        ("plan_memory", say.size, run.plan.memory_bytes, run.memory_bytes),
        ("plan_speed", say.number, run.plan.tokens_per_second, speed),
        ("plan_mfu", say.percent, planned.mfu, found.mfu),
        ("plan_mfu_6n", say.percent, planned.mfu_without_attention, found.mfu_without_attention),
        ("plan_peak", _tera, planned.peak_flops, None),
        ("plan_micro_batch", say.number, run.plan.micro_batch_size, run.settings.micro_batch_size),
        ("plan_available", say.size, run.plan.available_bytes, None),
    )
    return [(say(key), write(plan), write(measured)) for key, write, plan, measured in rows if plan is not None]


def provenance(run: RecordedRun, say: Wording) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titled groups of keys and values; the keys are those of the records, so that a reader can search for them."""
    last = run.after or run.before
    groups: dict[str, Mapping[str, Any]] = {
        "group_settings": vars(run.settings),
        "group_corpus": {**vars(run.corpus), **vars(run.packing)},
        "group_protocol": vars(last.protocol) if last else {},
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
        return ABSENT
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value_text(key, each, say)}" for name, each in value.items())
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if key.endswith("_bytes"):
            return say.size(value)
        if key.endswith("_share"):
            return say.percent(value, 2)
        if key.endswith("_gflops"):
            return say.number(value, 1)
        if key.startswith("num_") or key.endswith("_tokens"):
            return say.number(value)
    return str(value)
