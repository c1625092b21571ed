"""The report as a reader has it: opened from the disk in a real browser."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cartilha.reporting.html import render_report

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
STEPS = (0, 10, 20)
TEXTS = ("Era", " uma", " vez", "\n", EVIL)


def evaluation(step: int, hash: str) -> dict[str, Any]:
    loss = 4 - step / 10
    protocol = {"name": "full", "window": 64, "stride": 32, "prefix_id": 0, "dtype": "float32", "hash": hash}
    domain = {"perplexity": math.exp(loss), "bits_per_byte": loss / 2, "num_documents": 60, "num_bytes": 900}
    return {
        "step": step,
        "protocol": protocol,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / 2,
        "bits_per_byte_interval": [loss / 2 - 0.1, loss / 2 + 0.1],
        "num_documents": 60,
        "num_bytes": 900,
        "domains": {EVIL: domain},
        "positions": [{"from": edge, "loss": loss, "num_tokens": 9} for edge in (0, 1, 2, 4)],
    }


def make_run(path: Path, hash: str = "aaaa") -> Path:
    path.mkdir()
    change = {"doc_id": EVIL, "domain": EVIL, "begins": EVIL, "bits_per_byte_first": 2.0, "bits_per_byte_second": 1.0}
    results = {
        "name": path.name + EVIL,
        "status": "finished",
        "settings": {"model": EVIL, "block_size": 64, "epochs": 2, "num_steps": 20},
        "corpus": {"validation_hash": "cafe", "tokenizer_fingerprint": "gpt2"},
        "epochs": [{"epoch": e, "train_loss": 4.0 - e, "validation_loss": 4.0 - e, "seconds": 9.0} for e in (1, 2)],
        "evaluations": [evaluation(step, hash) for step in STEPS],
        "comparison": {"steps": [0, 20], "gained_most": [change], "lost_most": [change]},
        "notices": [EVIL],
    }
    (path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    same = {"lr": 1e-3, "tokens_per_second": 100, "memory_bytes": 10**9}
    steps = [{"step": s, "loss": 4 - s / 10, **same} for s in range(1, 21)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps), encoding="utf-8")
    samples = [{"step": s, "prompt": "Era", "text": f"Era {s} {EVIL}", "mode": "greedy"} for s in STEPS]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples), encoding="utf-8")
    rows = [
        {
            "step": step,
            "document": document,
            "doc_id": f"lição-{document}{EVIL}",
            "position": position,
            "text": text,
            "nll": (1 + position) * (2.0 if step == 0 else 0.5),
            "rank": 1 + step,
            "likeliest_texts": [EVIL, " a", " o", "\n", "\ufffd"],
            "likeliest_probabilities": [0.5, 0.2, 0.1, 0.05, 0.01],
        }
        for step in STEPS
        for document in (0, 1)
        for position, text in enumerate(TEXTS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "surprisal.parquet")
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / "primeira"), make_run(folder / "segunda", hash="bbbb")]
    return render_report(runs, folder / "report.html")


@pytest.fixture
def opened(chromium: Any, report: Path) -> Iterator[Any]:
    """Open the page; afterwards there must have been no error, no complaint, and no request but for the page."""
    contexts, faults, requests = [], [], []

    def open_page(locale: str = "en-US", width: int = 1100, **options: Any) -> Any:
        context = chromium.new_context(locale=locale, viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_page
    assert faults == []
    assert requests and set(requests) == {report.as_uri()}
    for context in contexts:
        context.close()


SHOWN = "main:not([hidden])"


def test_tables_and_plots_are_there_and_a_script_in_a_text_stays_text(opened):
    page = opened()
    assert page.title().startswith("Training report: primeira</script>")  # the page's own, with the evil name as text
    main = page.locator(SHOWN)
    assert main.count() == 1 and EVIL in main.inner_text()
    headings = main.locator(".results thead th").all_inner_texts()
    assert [text for text in headings if "(" in text] == [
        *("val perplexity (a)", "val perplexity (b)", "val bits per byte (a)", "val bits per byte (b)")
    ]
    charts = main.locator("svg.chart")
    assert charts.count() == 2 * 6 + 1  # those of each run, and the training losses together
    for i in range(charts.count()):
        box = charts.nth(i).bounding_box()
        assert box["width"] > 200 and box["height"] > 100
        assert charts.nth(i).locator("path.curve").count()
    assert page.locator("img").count() == 0
    assert page.evaluate("document.scripts.length") == 2


def test_the_language_is_the_browsers_and_the_switch_changes_it(opened):
    assert opened("en-US").locator("h1:visible").inner_text() == "Training report"
    page = opened("pt-BR")
    assert page.locator("h1:visible").inner_text() == "Relatório de treino"
    assert page.evaluate("document.documentElement.lang") == "pt-BR"
    page.locator(f"{SHOWN} [data-show]").focus()
    page.keyboard.press("Enter")
    assert page.locator("h1:visible").inner_text() == "Training report" and page.title().startswith("Training report")
    assert page.locator(f"{SHOWN} [data-surprisal] .tokens").first.inner_text().startswith("Era uma vez")


def test_the_sliders_show_texts_and_surprisal_of_each_step(opened):
    page = opened("pt-BR")
    article = page.locator(f"{SHOWN} article").first
    slider = article.locator("[data-slider=samples]")
    after = article.locator("[data-growing='0']")
    assert f"20 {EVIL}" in after.inner_text()
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert "passo 10" in after.inner_text() and f"10 {EVIL}" in after.inner_text()
    page.keyboard.press("Home")
    assert (
        f"Era 0 {EVIL}" in after.inner_text() and "passo 0" in article.locator("label.slider output").last.inner_text()
    )

    view = article.locator("[data-surprisal]")
    levels = view.locator(".tokens").nth(1).locator(".t")
    before = [levels.nth(i).get_attribute("class") for i in range(levels.count())]
    assert before == ["t s0", "t s1", "t s2", "t s2", "t s2"]
    view.locator("input[type=range]").focus()
    page.keyboard.press("Home")
    # 2, 4, 6, 8 and 10 nats are 2.9, 5.8, 8.7, 11.5 and 14.4 bits.
    assert [levels.nth(i).get_attribute("class") for i in range(levels.count())] == [f"t s{n}" for n in (2, 3, 4, 4, 5)]


def test_each_token_tells_its_probability_rank_and_alternatives_by_mouse_and_by_keys(opened):
    page = opened()
    view = page.locator(f"{SHOWN} [data-surprisal]").first
    detail = view.locator(".detail")
    assert "Choose a token" in detail.inner_text()
    view.locator(".tokens").nth(1).locator(".t").nth(1).click()
    table = detail.locator("table")
    assert table.count() == 2
    after = table.nth(1).inner_text()
    assert "36.8%" in after and "1.44 bits" in after and "21" in after  # exp(-1), 1 nat, the rank of step 20
    assert "1.83%" in table.nth(0).inner_text()  # exp(-4)
    alternatives = detail.locator("ol").nth(1).locator("li")
    assert alternatives.count() == 5 and EVIL in alternatives.nth(0).inner_text()
    assert "␣a" in alternatives.nth(1).inner_text() and "part of a character" in alternatives.nth(4).inner_text()
    view.locator(".tokens").nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert "14.3%" not in after and "22.3%" in table.nth(1).inner_text()  # exp(-1.5)
    page.keyboard.press("Home")
    assert view.locator(".on").count() == 2
    page.mouse.move(1, 1)  # else it chooses whatever token is drawn under it
    view.locator("select").select_option("1")
    assert "Choose a token" in detail.inner_text()


def test_the_axis_turns_into_perplexity_on_request(opened):
    figure = opened().locator(f"{SHOWN} figure").first
    assert figure.locator(".other:visible").count() == 0
    figure.locator("[data-axis]").check()
    assert figure.locator(".first:visible").count() == 0
    assert "perplexity (per token, logarithmic)" in figure.locator(".other:visible").all_text_contents()
    figure.locator("[data-axis]").uncheck()
    assert "loss (nats per token)" in figure.locator(".first:visible").all_text_contents()


def test_the_table_is_copied(opened):
    page = opened()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    # The answer stands for a moment, and the page's policy lets Playwright's polling evaluate no string: it is caught.
    page.evaluate("""() => {
        const status = document.querySelector("main:not([hidden]) .actions [role=status]");
        window.said = new Promise((resolve) => {
            new MutationObserver(() => resolve(status.textContent)).observe(status, { childList: true });
        });
    }""")
    page.locator(f"{SHOWN} [data-copy^=csv]").click()
    assert page.evaluate("window.said") == "Copied"
    assert page.evaluate("navigator.clipboard.readText()").startswith("run,seq_length,epochs")


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1100, "dark")])
def test_nothing_is_cut_on_a_phone_and_dark_is_dark(opened, width, scheme):
    page = opened("pt-BR", width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(ground.removeprefix("rgb(").split(",")[0])
    assert red < 60 if scheme == "dark" else red > 200


def test_in_print_the_settings_are_open_and_the_buttons_gone(opened):
    page = opened()
    page.emulate_media(media="print")
    assert page.locator("button:visible").count() == 0 and page.locator("input:visible").count() == 0
    assert page.locator(f"{SHOWN} svg.chart:visible").count() == 13
