"""The Hugging Face hub: it is asked again while it is busy, and what keeps it from answering is put into words."""

from __future__ import annotations

import errno
import functools
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from cartilha.console import Advance
from cartilha.errors import log

WAITS_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # before the hub is asked again, where it does not say when
LONGEST_WAIT_S = 600.0
CLIENTS = ("aiohttp", "httpcore", "httpx", "httpx2", "requests", "urllib3")  # whose exceptions mean a broken connection

Answer = TypeVar("Answer")


def ask(call: Callable[[], Answer]) -> Answer:
    """What a call of the hub's clients returns; while the hub is busy, it is asked again when it says, or a bit later.

    The clients' exception passes if that does not help, or if the hub is not busy.
    """
    _tell_waits()
    for wait in WAITS_S:
        try:
            return call()
        except Exception as error:
            response = next(filter(_is_busy, map(_response, _causes(error))), None)
            if response is None:
                raise
            seconds = _asked_wait(response.headers) or wait
            if seconds > LONGEST_WAIT_S:
                raise
            log.info("The hub is busy (%d): it is asked again in %.0f s.", response.status_code, seconds)
            time.sleep(seconds)
    return call()


def fault(error: BaseException) -> str | None:
    """What keeps the hub from giving something, with the remedy; None if it is not known that it could be reached."""
    for cause in _causes(error):
        response, text = _response(cause), str(cause)
        if _is_busy(response):
            return f"the hub is busy ({response.status_code}); try again later"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            place = cause.filename or "the hub's cache (HF_HOME)"
            return f"the disk of {place} is full; free some space, or name another place in HF_HOME"
        if "CERTIFICATE_VERIFY_FAILED" in text:
            reason = text.rpartition("CERTIFICATE_VERIFY_FAILED] ")[2].partition(" (_ssl")[0]
            return (
                f"the certificate shown for the hub is not trusted on this machine ({reason}); check the clock,"
                " and where a company's proxy reads along, name its certificate in SSL_CERT_FILE"
            )
        if type(cause).__name__ in ("RemoteProtocolError", "ReadError", "IncompleteRead", "ClientPayloadError") or (
            "onsistency check failed" in text
        ):
            return "the download broke off; run the same command again"
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: the hub was busy, or the connection broke."""
    causes = list(_causes(error))
    responses = [response for response in map(_response, causes) if response is not None]
    if responses:
        return any(map(_is_busy, responses))
    if any("CERTIFICATE_VERIFY_FAILED" in str(cause) for cause in causes):
        return False
    return any(
        isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.partition(".")[0] in CLIENTS
        for cause in causes
    )


def silent_bar(advance: Advance) -> type[Any]:
    """A class of progress bars for the hub's client, which shows nothing and reports the bytes that come."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            # One bar counts what comes over the wire, another one what becomes of it.
            self._counts = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts:
                advance(n or 0, of=self.total or None)  # the sizes of all files that have begun
            return None

    return Bar


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _response(error: BaseException) -> Any:
    """The hub's answer that an exception of its clients carries, or None."""
    response = getattr(error, "response", None)
    return response if isinstance(getattr(response, "status_code", None), int) else None


def _is_busy(response: Any) -> bool:
    return response is not None and (response.status_code == 429 or response.status_code >= 500)


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds after which the hub wants to be asked again, by `Retry-After: 30` or `RateLimit: "api";r=0;t=30`."""
    texts = {name.lower(): text for name, text in headers.items()}
    found = re.match(r"\s*(\d+)\s*$", texts.get("retry-after", "")) or re.search(
        r";\s*t=(\d+)", texts.get("ratelimit", "")
    )
    return float(found[1]) if found else None


@functools.cache
def _tell_waits() -> None:
    """Replace the lines in which the hub's clients say that they wait by ours."""

    def replace(record: logging.LogRecord) -> bool:
        if found := re.search(r"(?:Retrying in|Waiting) ([\d.]+) ?s", record.getMessage()):
            log.info("The hub is busy or cannot be reached: it is asked again in %.0f s.", float(found[1]))
        return record.levelno >= logging.ERROR

    for name in ("huggingface_hub.utils._http", "datasets.utils.file_utils"):
        clients = logging.getLogger(name)
        clients.setLevel(logging.WARNING)
        clients.addFilter(replace)
