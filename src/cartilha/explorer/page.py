"""The page in gradio's components, one language at a time: what is where, and what each action calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, cast

import gradio as gr

from cartilha.explorer import parts, session
from cartilha.explorer.choices import Shaping
from cartilha.explorer.session import DraftView, Explorer, Spot, What
from cartilha.explorer.wording import PageWording
from cartilha.explorer.writing import Draft
from cartilha.reporting.wording import Language

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONOSPACE = ("ui-monospace", "SF Mono", "Cascadia Mono", "Menlo", "Consolas", "Liberation Mono", "monospace")

COLUMN = 340  # pixels, below which the two models stand one above the other

# A click, or Enter or the space bar, on a token; the chosen one is marked in both models' texts.
PICK_TOKEN = """
const pick = (event) => {
  if (event.type === 'keydown' && event.key !== 'Enter' && event.key !== ' ') return;
  const token = event.target.closest('.tok[data-char]');
  if (!token) return;
  event.preventDefault();
  window.cartilhaMark(Number(token.dataset.char), Number(token.dataset.end));
  trigger('click', {token: Number(token.dataset.token), char: Number(token.dataset.char)});
};
element.addEventListener('click', pick);
element.addEventListener('keydown', pick);
"""
PICK_CHOICE = """
element.addEventListener('click', (event) => {
  const choice = event.target.closest('.choice');
  if (choice) trigger('click', {token: Number(choice.dataset.token)});
});
"""


@dataclass(frozen=True)
class _Sliders:
    """Temperature, top-k and top-p."""

    temperature: gr.Slider
    top_k: gr.Slider
    top_p: gr.Slider

    @property
    def all(self) -> list[gr.Slider]:
        return [self.temperature, self.top_k, self.top_p]


def theme() -> gr.themes.Base:
    """Plain, with the fonts of the machine: gradio's own themes fetch theirs from a font server."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue, neutral_hue=gr.themes.colors.gray, font=FONTS, font_mono=MONOSPACE
    )


def stylesheet() -> str:
    """The page's own style sheet."""
    return (resources.files(__package__) / "templates" / "explorer.css").read_text(encoding="utf-8")


def script(language: Language) -> str:
    """What the page does by itself: the language of the document, marking a token, keeping the text over a switch."""
    text = (resources.files(__package__) / "templates" / "explorer.js").read_text(encoding="utf-8")
    return text.replace("LANGUAGE", {"en": "en", "pt": "pt-BR"}[language])


def build_page(explorer: Explorer, language: Language) -> gr.Blocks:
    """The page in one language."""
    say = PageWording(language)
    with gr.Blocks(title=say("title"), analytics_enabled=False, fill_width=False) as page:
        store = None if explorer.walk is None else explorer.walk.store.path.name
        gr.HTML(parts.header(say, explorer.readers, store))
        with gr.Tabs():
            if explorer.readers:
                with gr.Tab(say("tab_read")):
                    _reading_tab(page, explorer, say)
                with gr.Tab(say("tab_write")):
                    _writing_tab(page, explorer, say)
            if explorer.walk is not None:
                with gr.Tab(say("tab_store")):
                    _store_tab(page, explorer, say)
    return page


def _quiet(tab: str) -> dict[str, Any]:
    """How a tab's events are answered: without a spinner, unnamed, and one at a time.

    Two at a time, the answer to an earlier event could arrive over that of a later one.
    """
    return {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": tab, "concurrency_limit": 1}


def _sliders(say: PageWording) -> _Sliders:
    with gr.Row(elem_classes="sliders"):
        temperature = gr.Slider(0.1, 2.0, 1.0, step=0.05, label=say("temperature"), info=say("temperature_info"))
        top_k = gr.Slider(0, 100, 0, step=1, label=say("top_k"), info=say("top_k_info"))
        top_p = gr.Slider(0.05, 1.0, 1.0, step=0.01, label=say("top_p"), info=say("top_p_info"))
    for slider in (temperature, top_k, top_p):
        slider.buttons = []
    return _Sliders(temperature, top_k, top_p)


def _shaping(temperature: float, top_k: float, top_p: float) -> Shaping:
    return Shaping(max(float(temperature), 0.01), max(int(top_k), 0), min(max(float(top_p), 0.0), 1.0))


def _columns(name: str, letters: Sequence[str], **properties: Any) -> dict[str, gr.HTML]:
    """A place for each model's answer, beside each other where the window is wide enough."""
    places = {}
    for letter in letters:
        with gr.Column(min_width=COLUMN):
            places[letter] = gr.HTML(elem_id=f"{name}-{letter}", **properties)
    return places


def _reading_tab(page: gr.Blocks, explorer: Explorer, say: PageWording) -> None:
    letters = list(explorer.readers)
    text = gr.Textbox(
        label=say("text"), info=session.text_info(say), lines=3, max_lines=12, elem_id="text", value=say("example_text")
    )
    shown, spot = gr.State(None), gr.State(None)
    notices = gr.HTML(elem_id="notices")
    gr.HTML(parts.legend(say))
    with gr.Row(equal_height=False):
        texts = _columns("tokens", letters, js_on_load=PICK_TOKEN)
    chart = gr.HTML(elem_id="chart")
    gr.HTML(parts.heading(say("choices_title")) + parts.soft_help(say("choices_help")))
    sliders = _sliders(say)
    with gr.Row(equal_height=False):
        tables = _columns("choices", letters)

    def show(text: str | None, spot: Spot | None = None) -> list[Any]:
        view = session.show_reading(explorer, say, text, spot)
        return [view.notices, *(view.readings[letter] for letter in letters), view.chart]

    def choices(text: str | None, spot: Spot | None, *values: float) -> list[str]:
        shown = session.show_choices(explorer, say, text, spot, _shaping(*values))
        return [shown[letter] for letter in letters]

    def typed(text: str | None, shown: str | None, *values: float) -> list[Any]:
        if text == shown:
            return [gr.skip()] * len(outputs)
        return [text, *show(text), None, *choices(text, None, *values)]

    def opened(text: str | None, *values: float) -> list[Any]:
        spot = session.most_surprising(explorer, text)
        return [text, text, *show(text, spot), spot, *choices(text, spot, *values)]

    def pick(letter: str) -> Any:
        def picked(text: str | None, event: gr.EventData, *values: float) -> list[Any]:
            spot = Spot(letter, int(event._data["token"]), max(0, int(event._data["char"])))
            return [spot, *choices(text, spot, *values)]

        return picked

    outputs = [shown, notices, *texts.values(), chart, spot, *tables.values()]
    quiet = _quiet("reading")
    # gradio's `input` is not told of pasted text; `change` is.
    text.change(typed, [text, shown, *sliders.all], outputs, trigger_mode="always_last", **quiet)
    # The text that was there before the language was switched, if any.
    kept = "(text, ...sliders) => [window.cartilhaKept() ?? text, ...sliders]"
    page.load(opened, [text, *sliders.all], [text, *outputs], js=kept, **quiet)
    for letter, one in texts.items():
        one.click(pick(letter), [text, *sliders.all], [spot, *tables.values()], **quiet)
    for slider in sliders.all:
        slider.change(choices, [text, spot, *sliders.all], list(tables.values()), trigger_mode="always_last", **quiet)


def _writing_tab(page: gr.Blocks, explorer: Explorer, say: PageWording) -> None:
    letters = list(explorer.readers)
    names = [(f"{letter}: {reader.loaded.reference}", letter) for letter, reader in explorer.readers.items()]
    prompt = gr.Textbox(
        label=say("prompt"),
        info=say("prompt_info"),
        lines=2,
        max_lines=8,
        elem_id="prompt",
        value=say("example_prompt"),
    )
    sliders = _sliders(say)
    gr.HTML(parts.heading(say("steps_title")) + parts.soft_help(say("steps_help")))
    letter = gr.Radio(names, value=letters[0], label=say("write_with"), visible=len(letters) > 1)
    draft = gr.State(None)
    text = gr.HTML(elem_id="draft")
    with gr.Row(elem_classes="actions"):
        take = gr.Button(say("take_likeliest"), size="sm")
        draw = gr.Button(say("draw"), size="sm")
        undo = gr.Button(say("undo"), size="sm")
        again = gr.Button(say("begin"), size="sm")
    table = gr.HTML(elem_id="alternatives", js_on_load=PICK_CHOICE)
    gr.HTML(parts.heading(say("three_title")) + parts.three_help(say))
    with gr.Row(equal_height=True, elem_classes="actions"):
        num_tokens = gr.Slider(5, session.MAX_NEW_TOKENS, 30, step=5, label=say("num_tokens"), buttons=[])
        write = gr.Button(say("write_all"), variant="primary")
    three = gr.HTML(elem_id="three")

    def view(found: DraftView) -> tuple[Draft | None, str, str]:
        return found.draft, found.text, found.alternatives

    def begin(letter: str, prompt: str | None, *values: float) -> tuple[Draft | None, str, str]:
        return view(session.begin_draft(explorer, say, _known(letter, letters), prompt, _shaping(*values)))

    def reshape(letter: str, draft: Draft | None, *values: float) -> tuple[Draft | None, str, str]:
        return view(session.show_draft(explorer, say, _known(letter, letters), draft, _shaping(*values)))

    def act(action: str) -> Any:
        def step(letter: str, draft: Draft | None, *values: float) -> tuple[Draft | None, str, str]:
            known = _known(letter, letters)
            return view(session.step(explorer, say, known, draft, _shaping(*values), action))

        return step

    def choose(letter: str, draft: Draft | None, event: gr.EventData, *values: float) -> tuple[Draft | None, str, str]:
        action, known = int(event._data["token"]), _known(letter, letters)
        return view(session.step(explorer, say, known, draft, _shaping(*values), action))

    def three_ways(prompt: str | None, num_tokens: float, *values: float) -> str:
        return session.show_three_ways(explorer, say, prompt, int(num_tokens), _shaping(*values))

    outputs = [draft, text, table]
    quiet = _quiet("writing")
    beginning, going_on = [letter, prompt, *sliders.all], [letter, draft, *sliders.all]
    page.load(begin, beginning, outputs, **quiet)
    prompt.change(begin, beginning, outputs, trigger_mode="always_last", **quiet)
    for trigger in (again.click, letter.change):
        trigger(begin, beginning, outputs, **quiet)
    for slider in sliders.all:
        slider.change(reshape, going_on, outputs, trigger_mode="always_last", **quiet)
    table.click(choose, going_on, outputs, **quiet)
    for button, action in ((take, "likeliest"), (draw, "draw"), (undo, "undo")):
        button.click(act(action), going_on, outputs, **quiet)
    write.click(three_ways, [prompt, num_tokens, *sliders.all], three, api_visibility="private")


def _store_tab(page: gr.Blocks, explorer: Explorer, say: PageWording) -> None:
    kinds = [
        (say("documents_of_train"), "train"),
        (say("documents_of_validation"), "validation"),
        (say("blocks"), "blocks"),
    ]
    what = gr.Radio(kinds, value="train", label=say("what"), elem_id="what")
    with gr.Row(elem_classes="actions"):
        number = gr.Number(1, label=say("number"), precision=0, minimum=1, elem_id="number")
        block_size = gr.Number(512, label=say("block_size"), precision=0, minimum=1, visible=False)
        seed = gr.Number(0, label=say("seed"), precision=0, visible=False)
        epoch = gr.Number(1, label=say("epoch"), precision=0, minimum=1, visible=False)
    with gr.Row(elem_classes="actions"):
        back = gr.Button(say("previous"), size="sm")
        forth = gr.Button(say("next"), size="sm", elem_id="next")
    shown = gr.HTML(elem_id="stored")
    settings: Sequence[Any] = (block_size, seed, epoch)

    def show(what: str, number: float | None, *values: float) -> tuple[int, str]:
        view = session.show_stored(
            explorer, say, cast(What, _known(what, [kind for _, kind in kinds])), number, *values
        )
        return view.number, view.shown

    def move(by: int) -> Any:
        return lambda what, number, *values: show(what, (number or 1) + by, *values)

    def change(what: str, *values: float) -> list[Any]:
        visible = gr.update(visible=what == "blocks")
        return [*show(what, 1, *values), visible, visible, visible]

    inputs, outputs = [what, number, *settings], [number, shown]
    quiet = _quiet("store")
    page.load(show, inputs, outputs, **quiet)
    what.change(change, [what, *settings], [*outputs, *settings], **quiet)
    for one in (number, *settings):
        one.submit(show, inputs, outputs, **quiet)
        one.blur(show, inputs, outputs, **quiet)
    back.click(move(-1), inputs, outputs, **quiet)
    forth.click(move(1), inputs, outputs, **quiet)


def _known(value: str, allowed: Sequence[str]) -> str:
    """A choice of the page; whoever sends another gets the first."""
    return value if value in allowed else allowed[0]
