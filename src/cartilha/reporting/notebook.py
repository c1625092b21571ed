"""What a notebook shows below a cell: results as tables, with the report's templates and words."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cartilha.errors import UserError
from cartilha.reporting import tables
from cartilha.reporting.chart import Drawing
from cartilha.reporting.figures import run_figures
from cartilha.reporting.pages import PACKAGE, environment, template_file
from cartilha.reporting.results import COMPARISON, evaluation, load_run
from cartilha.reporting.wording import Wording, choose_language

Values = Mapping[str, Any]


def run_html(directory: str | Path) -> str:
    """The result of a run and its curves; a line of text if its directory is gone."""
    try:
        run = load_run(directory)
    except UserError as gone:
        return f"<p>{escape(str(gone))}</p>"
    return _render("of_run", run, curves=run_figures(run, _say()))


def evaluations_html(models: Iterable[Values]) -> str:
    """A row for each model, from the records that `evaluate --json` gives."""
    return _render("of_models", list(map(evaluation, models)))


def comparison_html(values: Values) -> str:
    """Two models, their difference with its interval, and the documents that changed most."""
    return _render("of_two", list(map(evaluation, values["evaluations"])), comparison=COMPARISON(values))


def plan_html(values: Values) -> str:
    """What `plan` recommends for each device and block size."""
    return _render("of_plan", values["recommended"])


def page_html(path: str | Path) -> str:
    """A whole report in a frame of its own, where its style and script cannot touch the notebook's."""
    page = escape(Path(path).read_text(encoding="utf-8"))
    return f'<iframe srcdoc="{page}" style="width: 100%; height: 48rem; border: 1px solid #dcdcd4"></iframe>'


def _say() -> Wording:
    return Wording(choose_language("auto"))


def _render(macro: str, shown: Any, **more: Any) -> str:
    module = (
        environment()
        .get_template("notebook.html.j2")
        .make_module({"say": _say(), "protocol_text": tables.protocol_text, "image": _image})
    )
    style = Markup(template_file(PACKAGE, "notebook.css"))
    return f'<div class="cartilha"><style>{style}</style>{getattr(module, macro)(shown, **more)}</div>'


def _image(drawing: Drawing) -> str:
    """The drawing as an image, whose style is its own, in a page that may have other rules for SVG."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.standalone().encode()).decode()
