"""Requests to stop, by a signal or a file: the run writes a checkpoint after the current step and ends."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cartilha.machine.processes import is_main_process


class StopRequest:
    """Whether the run is asked to stop: by Ctrl-C, SIGTERM or a file. A second Ctrl-C stops at once."""

    def __init__(self, stop_file: Path | None = None) -> None:
        self._asked = False
        self._stop_file = stop_file
        self._looked = -math.inf

    @property
    def requested(self) -> bool:
        """Whether the run is asked to stop; the file, which may be on a slow drive, is looked for once per second."""
        if not self._asked and self._stop_file is not None and time.monotonic() - self._looked >= 1:
            self._looked = time.monotonic()
            if self._stop_file.exists():
                self._ask()
        return self._asked

    def _ask(self) -> None:
        self._asked = True
        if is_main_process():
            print("Stopping after this step; a checkpoint will be written.", file=sys.stderr)

    def _take(self, signum: int, frame: object) -> None:
        if self._asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._ask()


@contextmanager
def listening_for_stop(stop_file: Path | None = None) -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs; outside the main thread nothing is caught."""
    request = StopRequest(stop_file)
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, request._take) for number in signals}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
