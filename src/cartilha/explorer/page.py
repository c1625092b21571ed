"""The page in gradio's components, one language at a time: what is where, and what each action calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from cartilha.explorer import parts
from cartilha.explorer.choices import Shaping
from cartilha.explorer.reading import MAX_CHARS
from cartilha.explorer.session import MAX_NEW_TOKENS, Answers, DraftView, Explorer, Spot, WalkView
from cartilha.explorer.wording import PageWording
from cartilha.explorer.writing import NUM_BEAMS, Draft
from cartilha.reporting.pages import template_file
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


def theme() -> gr.themes.Base:
    """Plain, with the fonts of the machine: gradio's own themes fetch theirs from a font server."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue, neutral_hue=gr.themes.colors.gray, font=FONTS, font_mono=MONOSPACE
    )


def stylesheet() -> str:
    """The page's own style sheet."""
    return template_file(PageWording.package, "explorer.css")


def script(language: Language) -> str:
    """What the page does by itself: the language of the document, marking a token, keeping the text over a switch."""
    return template_file(PageWording.package, "explorer.js").replace("LANGUAGE", {"en": "en", "pt": "pt-BR"}[language])


def build_page(explorer: Explorer, language: Language) -> gr.Blocks:
    """The page in one language."""
    say = PageWording(language)
    answers = Answers(explorer, say)
    tabs = {"tab_read": _reading_tab, "tab_write": _writing_tab} if explorer.readers else {}
    if explorer.walk is not None:
        tabs["tab_store"] = _store_tab
    with gr.Blocks(title=say("title"), analytics_enabled=False, fill_width=False) as page:
        store = None if explorer.walk is None else explorer.walk.store.path.name
        gr.HTML(parts.header(say, explorer.readers, store))
        with gr.Tabs():
            for name, build in tabs.items():
                with gr.Tab(say(name)):
                    build(page, answers)
    return page


def _quiet(tab: str) -> dict[str, Any]:
    """How a tab's events are answered: without a spinner, unnamed, and one at a time.

    Two at a time, the answer to an earlier event could arrive over that of a later one.
    """
    return {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": tab, "concurrency_limit": 1}


def _sliders(say: PageWording) -> list[gr.Slider]:
    ranges = {"temperature": (0.1, 2.0, 1.0, 0.05), "top_k": (0, 100, 0, 1), "top_p": (0.05, 1.0, 1.0, 0.01)}
    with gr.Row(elem_classes="sliders"):
        return [
            gr.Slider(low, high, value, step=step, label=say(name), info=say(f"{name}_info"), buttons=[])
            for name, (low, high, value, step) in ranges.items()
        ]


def _shaping(temperature: float, top_k: float, top_p: float) -> Shaping:
    return Shaping(max(float(temperature), 0.01), max(int(top_k), 0), min(max(float(top_p), 0.0), 1.0))


def _columns(name: str, letters: Sequence[str], **properties: Any) -> dict[str, gr.HTML]:
    """A place for each model's answer, beside each other where the window is wide enough."""
    places = {}
    for letter in letters:
        with gr.Column(min_width=COLUMN):
            places[letter] = gr.HTML(elem_id=f"{name}-{letter}", **properties)
    return places


def _reading_tab(page: gr.Blocks, answers: Answers) -> None:
    say, letters = answers.say, list(answers.explorer.readers)
    info = say("text_info", limit=say.number(MAX_CHARS))
    text = gr.Textbox(label=say("text"), info=info, lines=3, max_lines=12, elem_id="text", value=say("example_text"))
    shown, spot = gr.State(None), gr.State(None)
    notices = gr.HTML(elem_id="notices")
    gr.HTML(parts.legend(say))
    with gr.Row(equal_height=False):
        texts = _columns("tokens", letters, js_on_load=PICK_TOKEN)
    chart = gr.HTML(elem_id="chart")
    gr.HTML(parts.heading(say("choices_title")) + parts.soft_help(say("choices_help")))
    sliders = _sliders(say)
    with gr.Row(equal_height=False):
        tables = list(_columns("choices", letters).values())

    def show(text: str | None, spot: Spot | None, *values: float) -> list[Any]:
        view = answers.reading(text, spot)
        return [text, view.notices, *view.readings.values(), view.chart, spot, *choices(text, spot, *values)]

    def choices(text: str | None, spot: Spot | None, *values: float) -> list[str]:
        return list(answers.choices(text, spot, _shaping(*values)).values())

    def typed(text: str | None, shown: str | None, *values: float) -> list[Any]:
        return [gr.skip()] * len(outputs) if text == shown else show(text, None, *values)

    def opened(text: str | None, *values: float) -> list[Any]:
        return [text, *show(text, answers.most_surprising(text), *values)]

    def pick(letter: str) -> Any:
        def picked(text: str | None, event: gr.EventData, *values: float) -> list[Any]:
            spot = Spot(letter, int(event._data["token"]), max(0, int(event._data["char"])))
            return [spot, *choices(text, spot, *values)]

        return picked

    outputs = [shown, notices, *texts.values(), chart, spot, *tables]
    quiet = _quiet("reading")
    # gradio's `input` is not told of pasted text; `change` is.
    text.change(typed, [text, shown, *sliders], outputs, trigger_mode="always_last", **quiet)
    # The text that was there before the language was switched, if any.
    kept = "(text, ...sliders) => [window.cartilhaKept() ?? text, ...sliders]"
    page.load(opened, [text, *sliders], [text, *outputs], js=kept, **quiet)
    for letter, one in texts.items():
        one.click(pick(letter), [text, *sliders], [spot, *tables], **quiet)
    for slider in sliders:
        slider.change(choices, [text, spot, *sliders], tables, trigger_mode="always_last", **quiet)


def _writing_tab(page: gr.Blocks, answers: Answers) -> None:
    say = answers.say
    label, info, example = say("prompt"), say("prompt_info"), say("example_prompt")
    prompt = gr.Textbox(label=label, info=info, lines=2, max_lines=8, elem_id="prompt", value=example)
    sliders = _sliders(say)
    gr.HTML(parts.heading(say("steps_title")) + parts.soft_help(say("steps_help")))
    _token_by_token(page, answers, prompt, sliders)
    gr.HTML(parts.heading(say("three_title")) + parts.soft_help(say("three_help", beams=NUM_BEAMS)))
    with gr.Row(equal_height=True, elem_classes="actions"):
        num_tokens = gr.Slider(5, MAX_NEW_TOKENS, 30, step=5, label=say("num_tokens"), buttons=[])
        write = gr.Button(say("write_all"), variant="primary")
    three = gr.HTML(elem_id="three")

    def three_ways(prompt: str | None, num_tokens: float, *values: float) -> str:
        return answers.three_ways(prompt, int(num_tokens), _shaping(*values))

    write.click(three_ways, [prompt, num_tokens, *sliders], three, api_visibility="private")


def _token_by_token(page: gr.Blocks, answers: Answers, prompt: gr.Textbox, sliders: list[gr.Slider]) -> None:
    """A draft with its candidates: each click takes one, and the buttons take, draw or undo one."""
    say, readers = answers.say, answers.explorer.readers
    names = [(f"{letter}: {reader.loaded.reference}", letter) for letter, reader in readers.items()]
    letter = gr.Radio(names, value=names[0][1], label=say("write_with"), visible=len(names) > 1)
    draft = gr.State(None)
    text = gr.HTML(elem_id="draft")
    with gr.Row(elem_classes="actions"):
        words = {"likeliest": "take_likeliest", "draw": "draw", "undo": "undo"}
        buttons = {action: gr.Button(say(word), size="sm") for action, word in words.items()}
        again = gr.Button(say("begin"), size="sm")
    table = gr.HTML(elem_id="alternatives", js_on_load=PICK_CHOICE)

    def begin(letter: str, prompt: str | None, *values: float) -> DraftView:
        return answers.new_draft(letter, prompt, _shaping(*values))

    def reshape(letter: str, draft: Draft | None, *values: float) -> DraftView:
        return answers.draft(letter, draft, _shaping(*values))

    def act(action: str) -> Any:
        return lambda letter, draft, *values: answers.step(letter, draft, _shaping(*values), action)

    def choose(letter: str, draft: Draft | None, event: gr.EventData, *values: float) -> DraftView:
        return answers.step(letter, draft, _shaping(*values), int(event._data["token"]))

    outputs = [draft, text, table]
    quiet = _quiet("writing")
    beginning, going_on = [letter, prompt, *sliders], [letter, draft, *sliders]
    page.load(begin, beginning, outputs, **quiet)
    prompt.change(begin, beginning, outputs, trigger_mode="always_last", **quiet)
    for trigger in (again.click, letter.change):
        trigger(begin, beginning, outputs, **quiet)
    for slider in sliders:
        slider.change(reshape, going_on, outputs, trigger_mode="always_last", **quiet)
    table.click(choose, going_on, outputs, **quiet)
    for action, button in buttons.items():
        button.click(act(action), going_on, outputs, **quiet)


def _store_tab(page: gr.Blocks, answers: Answers) -> None:
    say = answers.say
    kinds = [(say("documents_of_train"), "train"), (say("documents_of_validation"), "validation")]
    what = gr.Radio([*kinds, (say("blocks"), "blocks")], value="train", label=say("what"), elem_id="what")
    with gr.Row(elem_classes="actions"):
        number = gr.Number(1, label=say("number"), precision=0, minimum=1, elem_id="number")
        block_size = gr.Number(512, label=say("block_size"), precision=0, minimum=1, visible=False)
        seed = gr.Number(0, label=say("seed"), precision=0, minimum=0, visible=False)
        epoch = gr.Number(1, label=say("epoch"), precision=0, minimum=1, visible=False)
    with gr.Row(elem_classes="actions"):
        back = gr.Button(say("previous"), size="sm")
        forth = gr.Button(say("next"), size="sm", elem_id="next")
    shown = gr.HTML(elem_id="stored")
    settings = [block_size, seed, epoch]

    def show(what: str, number: float | None, *values: float | None) -> WalkView:
        if what == "blocks":
            block_size, seed, epoch = (int(value or 0) for value in values)
            return answers.block(int(number or 1), block_size, seed, epoch)
        return answers.document("validation" if what == "validation" else "train", int(number or 1))

    def move(by: int) -> Any:
        return lambda what, number, *values: show(what, (number or 1) + by, *values)

    def change(what: str, *values: float | None) -> list[Any]:
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
