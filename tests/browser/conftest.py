"""What the browser tests share: a headless Chromium, and pages that remember what went wrong and what they asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The machine's Chromium or Chrome, headless; without one the browser tests are skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next((path for path in map(shutil.which, names) if path), None)
    if executable is None:
        pytest.skip("needs Chromium or Chrome (apt-get install chromium)")
    # Chromium's sandbox needs what containers and root do not have.
    sandbox = [] if hasattr(os, "geteuid") and os.geteuid() != 0 else ["--no-sandbox"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=sandbox)
        yield browser
        browser.close()


@dataclass
class Visit:
    """An open page.

    Attributes:
        page: Playwright's.
        requests: Addresses that it asked for, data: ones left out.
        errors: Errors of its console and its scripts.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visit]]:
    """Open an address in a window of its own: `visit(address, locale="pt-BR", color_scheme="dark", width=390)`."""
    contexts = []

    def open_page(address: str, *, width: int = 1280, height: int = 900, **settings: Any) -> Visit:
        context = chromium.new_context(viewport={"width": width, "height": height}, **settings)
        context.set_default_timeout(60_000)  # for a busy machine; a page that works answers at once
        contexts.append(context)
        found = Visit(context.new_page())
        found.page.on("request", lambda r: None if r.url.startswith("data:") else found.requests.append(r.url))
        found.page.on("console", lambda m: found.errors.append(m.text) if m.type == "error" else None)
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        found.page.goto(address)
        return found

    yield open_page
    for context in contexts:
        context.close()
