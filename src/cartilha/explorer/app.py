"""The explorer's web server: on this machine only, serving the page in two languages and no file besides."""

from __future__ import annotations

import os
import re
import socket as sockets
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

# Before gradio is imported: it would report its use, look for new versions, and count each event in a table.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000")

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, RedirectResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cartilha.errors import log
from cartilha.explorer.page import build_page, script, stylesheet, theme
from cartilha.explorer.port import HOST
from cartilha.explorer.session import Explorer
from cartilha.explorer.wording import preferred_language
from cartilha.reporting.wording import LANGUAGES, Language

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# gradio builds templates from strings and styles from attributes; everything else comes from this server alone.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
# gradio's ways to read files, to take them and to fetch from elsewhere: the page uses none of them.
FILE_ROUTES = re.compile(r"(^|/)(file|file=.*|proxy=.*|upload|upload_progress|stream|component_server|deep_link)(/|$)")


class _Guard:
    """Refuses gradio's file routes, and sends the page with a policy that lets it load from nowhere else.

    gradio's page calls its server by the address that it was asked for. Not every proxy passes that on, so with a
    `proxy` every request is said to come through it.
    """

    def __init__(self, app: ASGIApp, proxy: str | None = None) -> None:
        self.app = app
        address = urlsplit(proxy or "")
        named = {b"x-forwarded-host": address.netloc, b"x-forwarded-proto": address.scheme} if proxy else {}
        self.forwarded = {name: value.encode("ascii") for name, value in named.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if FILE_ROUTES.search(scope["path"]):
            await PlainTextResponse("The explorer serves no files.", 403)(scope, receive, send)
            return
        sent = [header for header in scope["headers"] if header[0] not in self.forwarded]
        scope = {**scope, "headers": [*sent, *self.forwarded.items()]}

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = [(b"content-security-policy", POLICY.encode("ascii")), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message.get("headers", ()), *policy]
            await send(message)

        await self.app(scope, receive, with_policy)


def create_app(explorer: Explorer, default: Language, proxy: str | None = None) -> FastAPI:
    """The page at /en and /pt; / leads to the one that the browser asks for, or to `default` if it asks for neither.

    Requests must be for this machine, or for the `proxy`: the address by which browsers reach the page through one.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # A name that points at this machine must not open it to other sites (DNS rebinding).
    hosts = [HOST, "localhost", urlsplit(proxy or "").hostname or HOST]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    app.add_middleware(_Guard, proxy=proxy)

    @app.get("/")
    def choose(request: Request) -> RedirectResponse:
        return RedirectResponse(f"/{preferred_language(request.headers.get('accept-language', ''), default)}/")

    @app.get("/favicon.ico")
    def no_icon() -> Response:
        return Response(status_code=204)

    for language in LANGUAGES:
        gr.mount_gradio_app(
            app,
            build_page(explorer, language),
            path=f"/{language}",
            server_name=HOST,
            allowed_paths=[],
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            show_error=False,
            max_file_size=1,
            theme=theme(),
            css=stylesheet(),
            js=script(language),
        )
    return app


class _Server(uvicorn.Server):
    """Says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[sockets.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def make_server(app: Any, ready: Callable[[], None] = lambda: None) -> uvicorn.Server:
    """A server for the app; it closes within a second of being asked to."""
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1, ws="none")
    return _Server(config, ready)


def serve(
    explorer: Explorer, socket: sockets.socket, *, default: Language, open_browser: bool, proxy: str | None = None
) -> str:
    """Serve the page until Ctrl-C; returns the address where it was."""
    address = f"http://{HOST}:{socket.getsockname()[1]}/"

    def ready() -> None:
        log.info("The explorer is at %s on this machine; Ctrl-C ends it.", address)
        if open_browser and not webbrowser.open(address):
            log.warning("No browser could be opened; open %s yourself.", address)

    with suppress(KeyboardInterrupt):  # uvicorn closes first and raises it then, as a rule; else it just returns
        make_server(create_app(explorer, default, proxy), ready).run(sockets=[socket])
    log.info("The explorer is closed.")
    return address
