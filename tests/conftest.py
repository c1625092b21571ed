"""What every test shares: two threads, no network, a cache of its own, and what lies beside the checkout."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]

# Before torch and huggingface_hub are imported anywhere, and for the processes that tests start, too.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "2"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of this session (conversions are made once in it); the user's own is never written."""
    directory = tmp_path_factory.mktemp("cartilha-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARTILHA_CACHE", str(directory))
        yield directory
    shutil.rmtree(directory, ignore_errors=True)  # pytest would keep the converted model of the last three sessions


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that runs in this process takes the log to standard error; the next test's `caplog` needs it back."""
    logger = logging.getLogger("cartilha")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: OPT's tokenizer and real text."""
    folder = CHECKOUT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs {folder} (OPT's tokenizer and real text), which lies beside the checkout")
    return folder


@pytest.fixture(scope="session")
def opt_tokenizer(shared: Path) -> Path:
    """The folder with OPT's vocab.json, merges.txt and tokenizer_config.json."""
    folder = shared / "opt_tokenizer"
    if not (folder / "vocab.json").is_file():
        pytest.skip(f"needs OPT's tokenizer in {folder}")
    return folder
