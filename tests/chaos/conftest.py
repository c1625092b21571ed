"""What the tests of disks share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cartilha.config import PrepareConfig
from cartilha.pipeline.prepare import prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "textos.txt"
    path.write_text("".join(f"Texto {n}: a fazenda, {'o café ' * (n % 5)}ontem.\n" for n in range(20)), "utf-8")
    return path


@pytest.fixture(scope="module")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    prepare(PrepareConfig(input=(str(corpus),), model="random:tiny", output=str(path)))
    return path


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait for what another thread does; on a busy machine it may take its time."""

    def wait(happened: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return wait
