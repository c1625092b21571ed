"""The explorer in a real browser, over random:tiny models."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="needs the extra `explorer`")

from cartilha.config import ExploreConfig, PrepareConfig
from cartilha.explorer.app import create_app, make_server
from cartilha.explorer.port import listen
from cartilha.pipeline.explore import open_explorer
from cartilha.pipeline.prepare import prepare

ATTACK = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'> ${window.broken = 1} {{broken}}"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running explorer of two models and a store in which every document tries to break the page."""
    folder = tmp_path_factory.mktemp("explored")
    lines = [f"Texto {number} da roça. {ATTACK}" for number in range(12)]
    (folder / "textos.txt").write_text("\n".join(lines), encoding="utf-8")
    store = folder / "store"
    prepare(PrepareConfig(input=(str(folder / "textos.txt"),), model="random:tiny", output=str(store)))
    explorer = open_explorer(ExploreConfig(models=("random:tiny", "random:tiny-opt"), store=str(store), device="cpu"))
    with listen(0) as socket:
        server = make_server(create_app(explorer, "en"))
        thread = threading.Thread(target=lambda: server.run(sockets=[socket]))
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{socket.getsockname()[1]}/"
        server.should_exit = True
        thread.join(timeout=120)
        assert not thread.is_alive()


def ready(visited: Any) -> Any:
    visited.page.wait_for_selector("#choices-B table")
    return visited.page


def stays_at_home(visited: Any, address: str) -> None:
    assert visited.errors == []
    assert visited.requests and all(asked.startswith(address) for asked in visited.requests), visited.requests


def test_the_page_opens_in_the_browsers_language_and_asks_only_this_machine(visit: Any, address: str) -> None:
    for locale, title, lang in (("pt-BR", "Explorador da Cartilha", "pt-BR"), ("en-GB", "Cartilha explorer", "en")):
        visited = visit(address, locale=locale)
        page = ready(visited)
        assert page.locator("h1").inner_text() == title
        assert page.evaluate("document.documentElement.lang") == lang
        assert page.locator("#tokens-A .tok.chosen").count() >= 1  # the most surprising one
        stays_at_home(visited, address)


def test_typing_colours_both_models_and_draws_the_perplexity_against_the_uniform_model(
    visit: Any, address: str
) -> None:
    visited = visit(address, locale="en-US")
    page = ready(visited)
    page.locator("#text textarea").fill("A roça 😀.")
    page.wait_for_selector("#tokens-B .tok[title*='part 1 of 4 of 😀']")
    shown = [page.locator(f"#tokens-{letter} .tok").count() for letter in "AB"]
    assert shown == [len("A roça 😀.".encode())] * 2
    assert page.locator("#chart path.curve").count() == 3
    assert page.locator("#chart path.curve.uniform").count() == 1
    stays_at_home(visited, address)


def test_a_click_or_the_keyboard_shows_logits_and_the_sliders_reshape_them(visit: Any, address: str) -> None:
    visited = visit(address, locale="en-US")
    page = ready(visited)
    page.locator("#text textarea").fill("Casa")
    for letter in "AB":  # drawn one after the other
        page.wait_for_selector(f"#tokens-{letter} .tok[title*='“s”']")
    page.locator("#tokens-A .tok").nth(2).click()
    page.wait_for_selector("#choices-A h3:has-text('“Ca”')")
    assert page.locator("#choices-B h3").inner_text() == "B expected, after “Ca”"
    assert "s" in page.locator("#choices-A tr.asked code").inner_text()
    assert page.locator("#tokens-B .tok.chosen").inner_text() == "s"
    assert "259 of 259 tokens" in page.locator("#choices-A").inner_text()
    page.get_by_label("number input for Top-k").first.fill("3")
    page.wait_for_selector("#choices-A :text('3 of 259 tokens')")
    page.locator("#tokens-A .tok").nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#choices-A h3:has-text('“C”')")
    stays_at_home(visited, address)


def test_what_is_written_stays_text(visit: Any, address: str) -> None:
    visited = visit(address, locale="en-US")
    page = ready(visited)
    page.locator("#text textarea").fill(ATTACK)
    page.wait_for_selector("#tokens-A .tok[title*='“{”']")
    # Each character is a token of this model: together they are the text, and no element came of it.
    assert page.locator("#tokens-A .tokens").inner_text() == ATTACK
    page.locator("#tokens-A .tok").last.click()
    page.wait_for_selector("#choices-A h3:has-text('{{broken}')")
    page.get_by_role("tab", name="Write").click()
    page.locator("#prompt textarea").fill(ATTACK)
    page.wait_for_selector("#draft :text('onerror')")
    page.get_by_role("tab", name="Store").click()
    page.wait_for_selector("#stored .stored")
    assert "onerror=" in page.locator("#stored .stored").inner_text()
    assert page.evaluate("window.broken") is None
    assert page.locator("#tokens-A img, #draft img, #stored img, #choices-A img").count() == 0
    stays_at_home(visited, address)


def test_a_long_text_is_cut_and_said_and_an_empty_one_asks_for_words(visit: Any, address: str) -> None:
    visited = visit(address, locale="en-US")
    page = ready(visited)
    page.locator("#text textarea").fill("palavra " * 25_000)
    page.wait_for_selector("#notices :text('Only the first 10,000 of 200,000 characters are read.')")
    page.locator("#text textarea").fill("")
    page.wait_for_selector("#notices :text('Write something above')")
    assert page.locator("#tokens-A .tok").count() == 0
    stays_at_home(visited, address)


def test_writing_step_by_step_and_in_three_ways(visit: Any, address: str) -> None:
    visited = visit(address, locale="pt-BR")
    page = ready(visited)
    page.get_by_role("tab", name="Escrever").click()
    page.wait_for_selector("#alternatives .choice")
    assert page.locator("#alternatives .choice").count() == 10
    before = page.locator("#draft .draft").inner_text()
    page.get_by_role("button", name="Aceitar o mais provável").click()
    page.wait_for_function("before => document.querySelector('#draft .draft').innerText !== before", arg=before)
    longer = page.locator("#draft .draft").inner_text()
    page.locator("#alternatives .choice").nth(4).click()
    page.wait_for_function("before => document.querySelector('#draft .draft').innerText !== before", arg=longer)
    for _ in range(2):
        page.get_by_role("button", name="Desfazer").click()
    page.wait_for_function("before => document.querySelector('#draft .draft').innerText === before", arg=before)
    page.get_by_role("button", name="Escrever das três maneiras").click()
    page.wait_for_selector("#three h4")
    assert page.locator("#three h4").all_inner_texts() == ["guloso", "sorteado", "busca em feixe"] * 2
    stays_at_home(visited, address)


def test_walking_through_the_store(visit: Any, address: str) -> None:
    visited = visit(address, locale="en-US")
    page = ready(visited)
    page.get_by_role("tab", name="Store").click()
    page.wait_for_selector("#stored h3:has-text('Document 1 of')")
    page.locator("#next").click()
    page.wait_for_selector("#stored h3:has-text('Document 2 of')")
    page.get_by_label("training blocks").check()
    page.wait_for_selector("#stored .segment")
    assert page.locator("#stored .piece.prefix").first.inner_text() == "<s>"
    assert page.locator("#stored .piece.end").first.inner_text() == "</s>"
    stays_at_home(visited, address)


def test_the_switch_keeps_the_text_and_colours_follow_the_scheme(visit: Any, address: str) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        visited = visit(address, locale="en-US", color_scheme=scheme)
        page = ready(visited)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator("#text textarea").fill("Sertão")
        page.wait_for_selector("#tokens-A .tok[title*='“S”']")
        page.locator("#switch").click()
        page.wait_for_selector("h1:has-text('Explorador')")
        page.wait_for_selector("#choices-B table")
        page.wait_for_timeout(1000)  # an answer to the text's own change would take the table away
        assert page.locator("#choices-B table").count() == 1
        assert page.locator("#text textarea").input_value() == "Sertão"
        assert page.locator("#tokens-A .tokens").inner_text().startswith("Sert")
        stays_at_home(visited, address)
    assert grounds[0] != grounds[1]


def test_a_phone_shows_everything_without_scrolling_sideways(visit: Any, address: str) -> None:
    visited = visit(address, locale="pt-BR", width=390, height=800)
    page = ready(visited)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    first, second = (page.locator(f"#tokens-{letter}").bounding_box() for letter in "AB")
    assert second["y"] >= first["y"] + first["height"]  # one above the other
    assert first["width"] > 300
    table = page.locator("#choices-A .scroll")
    assert table.evaluate("place => place.scrollWidth - place.clientWidth") <= 0
    stays_at_home(visited, address)


def test_no_file_of_the_machine_can_be_read(visit: Any, address: str, tmp_path: Path) -> None:
    page = ready(visit(address, locale="en-US"))
    secret = tmp_path / "secret.txt"
    secret.write_text("secret", encoding="utf-8")
    for path in (
        f"en/gradio_api/file={secret}",
        f"en/file={secret}",
        f"en/file/{secret}",
        f"en/gradio_api/file%3D{secret}",
        "en/gradio_api/file=http://127.0.0.1:9/x",
        "en/gradio_api/proxy=http://127.0.0.1:9/x",
        f"en/static/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{secret}",
    ):
        answer = page.request.get(address + path)
        assert answer.status in (403, 404), (path, answer.status)
        assert "secret" not in answer.text().replace(str(secret), "")
    sent = page.request.post(
        address + "en/gradio_api/upload",
        multipart={"files": {"name": "a.txt", "mimeType": "text/plain", "buffer": b"a"}},
    )
    assert sent.status == 403
