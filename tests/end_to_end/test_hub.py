"""The hub over HTTP: the real clients, in a process of their own, speak to a hub of ours (tests/local_hub.py)."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest

from local_hub import LocalHub

TOKEN = "hf_um_segredo_que_ninguem_escreve"
SENTENCE = "a fazenda o café de manhã lia devagar menina água roça e cartilha não sabia ler"


@dataclass(frozen=True)
class Outcome:
    """What a command did in the client's process: exit code, output, and how long it wanted to wait each time."""

    code: int
    out: str
    err: str
    waits: list[float] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        """The one sentence of a refusal."""
        sentences = [line for line in self.err.splitlines() if line.startswith("cartilha:")]
        assert self.code == 2 and len(sentences) == 1 and "Traceback" not in self.err, self
        return sentences[0]


Cartilha = Callable[..., Outcome]


def run_command(arguments: list[str]) -> Outcome:
    """Run the command line; both streams are caught below Python, and nobody sleeps."""
    from cartilha.cli import main

    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        real(0.001)

    real = time.sleep
    kept = [os.dup(stream) for stream in (1, 2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, patch("time.sleep", wait):
        for stream, file in ((1, out), (2, err)):
            os.dup2(file.fileno(), stream)
        try:
            code = main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, before in zip((1, 2), kept, strict=True):
                os.dup2(before, stream)
                os.close(before)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return Outcome(code, *texts, waits)


@contextmanager
def client(endpoint: str, home: Path, **environment: str) -> Iterator[Cartilha]:
    """The command line in a process whose clients know this hub, and a token for it."""
    values = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    values |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in values.items():
            patched.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda *arguments: pool.submit(run_command, [str(it) for it in arguments]).result()


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    with LocalHub().running() as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture(scope="module")
def cartilha(hub: LocalHub, home: Path) -> Iterator[Cartilha]:
    with client(hub.endpoint, home) as command:
        yield command


@pytest.fixture(autouse=True)
def quiet_hub(hub: LocalHub) -> None:
    hub.refusals.clear()
    hub.cuts.clear()
    hub.requests.clear()


def model_files(folder: Path, seed: int) -> dict[str, bytes | str]:
    """A model of the shape `random:tiny` as it lies on the hub, with its tokenizer and a card."""
    import torch

    from cartilha.model.load import load_model
    from cartilha.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("random:tiny")
    load_model("random:tiny", torch.device("cpu"), tokenizer=tokenizer, seed=seed).model.save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [pt]\n---\n# Pequeno\n", encoding="utf-8")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts(version: int, file: int) -> str:
    """A data file of 40 records."""
    words = SENTENCE.split()
    lines = []
    for row in range(40):
        chosen = (words[(version + file + row * i + i * i) % len(words)] for i in range(20))
        lines.append(json.dumps({"text": f"{version}.{file}.{row} {' '.join(chosen)}."}) + "\n")
    return "".join(lines)


@dataclass(frozen=True)
class Commits:
    """Two of each repository, the first with the tag v1."""

    models: tuple[str, str]
    datasets: tuple[str, str]


@pytest.fixture(scope="module")
def commits(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Commits:
    def dataset(version: int) -> str:
        files = {f"data/train-0000{file}-of-00003.jsonl": texts(version, file) for file in range(3)}
        return hub.add(
            "datasets/org/textos",
            {"README.md": "---\nlicense: cc-by-4.0\n---\n# Textos\n", **files},
            "v1" if version == 1 else "",
        )

    models = [
        hub.add("models/org/pequeno", model_files(tmp_path_factory.mktemp("model"), seed), "v1" if seed == 1 else "")
        for seed in (1, 2)
    ]
    return Commits((models[0], models[1]), (dataset(1), dataset(2)))


def prepare(ref: str, store: Path, *more: object) -> list[object]:
    return ["prepare", "--input", ref, "--model", "random:tiny", "--output", store, *more]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def contents(store: Path) -> dict[str, bytes]:
    """A store's files, without the record of how it was made."""
    return {path.name: path.read_bytes() for path in store.iterdir() if path.is_file() and path.name != "store.json"}


def written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_whole_job_from_the_hub_and_back(cartilha: Cartilha, hub: LocalHub, commits: Commits, home: Path, tmp_path):
    store, run = tmp_path / "store", tmp_path / "run"
    model = ("--model", "org/pequeno@v1")
    made = cartilha("prepare", "--input", "hf:org/textos@v1", *model, "--output", store, "--workers", 1)
    assert made.code == 0, made
    (entry,) = read(store / "store.json")["inputs"]
    assert entry == {"name": "hf:org/textos@v1", "commit": commits.datasets[0]}
    assert f"hf:org/textos@v1 (commit {commits.datasets[0]})" in cartilha("inspect", store).out
    size = ("--block_size", 32, "--batch_tokens", 128, "--max_steps", 2, "--skip_checks", "--device", "cpu")
    trained = cartilha("train", *model, "--store", store, "--output", run, *size)
    assert trained.code == 0, trained
    results = read(run / "results.json")
    assert results["settings"]["model_commit"] == commits.models[0]
    assert results["corpus"]["datasets"] == [entry]
    assert str(home).encode() not in (run / "model" / "config.json").read_bytes()
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "base_model: org/pequeno\n" in card and "license: apache-2.0\n" in card and "- org/textos\n" in card
    assert f"`org/pequeno@v1` (commit `{commits.models[0]}`)" in card
    assert f"`hf:org/textos@v1` (commit `{commits.datasets[0]}`)" in card
    assert "That of the base model: apache-2.0. The texts: `hf:org/textos@v1`: cc-by-4.0." in card
    # Once more with what is the main branch: another model, and the store is ready without a question to the hub.
    other = cartilha("train", "--model", "org/pequeno", "--store", store, "--output", tmp_path / "other", *size)
    assert other.code == 0, other
    newer = read(tmp_path / "other" / "results.json")["settings"]
    assert newer["model_commit"] == commits.models[1] and newer["weights"] != results["settings"]["weights"]
    pushed = cartilha("push", run, "ana/resultado", "--json")
    assert pushed.code == 0, pushed
    (_, files) = hub.find("models/ana/resultado", json.loads(pushed.out)["commit"])
    assert files == {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert hub.private["models/ana/resultado"]
    scored = cartilha("evaluate", "--model", "ana/resultado", "--store", store, "--json", "--device", "cpu")
    assert scored.code == 0, scored
    before, (found,) = results["evaluations"][-1]["perplexity"], json.loads(scored.out)["models"]
    assert found["perplexity"] == pytest.approx(before, rel=1e-6)
    assert found["model_commit"] == json.loads(pushed.out)["commit"]
    of_hub = ("--input", "hf:org/textos@v1", "--limit_documents", 2, "--json", "--device", "cpu")
    assert json.loads(cartilha("evaluate", "--model", "random:tiny", *of_hub).out)["datasets"] == [entry]
    # The token went to the hub with every question and nowhere else.
    assert f"Bearer {TOKEN}" in hub.tokens
    said = "".join(outcome.out + outcome.err for outcome in (made, trained, other, pushed, scored))
    assert TOKEN.encode() not in written(tmp_path) + written(home) + said.encode()
    # The clients' own bars and warnings are not seen.
    assert not [word for word in ("it/s", "%|", "Fetching", "Resolving", "card metadata", "Warning") if word in said]


def test_a_dataset_is_opened_once_for_all_processes(cartilha: Cartilha, hub: LocalHub, commits: Commits, tmp_path):
    done = cartilha(*prepare("hf:org/textos", tmp_path / "two", "--workers", 2))
    assert done.code == 0, done
    assert hub.fetched("api/datasets/org/textos/tree/" + commits.datasets[1]) <= 1
    assert sum("README.md" in line for line in hub.requests) <= 2
    fetched = [hub.fetched(f"train-0000{file}-of-00003.jsonl") for file in range(3)]
    assert fetched[0] <= 3 and fetched[1:] == [2, 2], fetched  # its columns, the proof's sample, the work
    assert cartilha(*prepare("hf:org/textos", tmp_path / "one", "--workers", 1)).code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    hub.requests.clear()
    again = cartilha(*prepare("hf:org/textos", tmp_path / "one", "--workers", 1))
    assert "nothing to do" in again.err and not hub.requests


def test_names_revisions_configurations_and_splits_that_are_not_there(cartilha: Cartilha, hub, commits, tmp_path):
    store = tmp_path / "store"
    files = {f"{name}/train.jsonl": texts(1, 0) for name in ("pt", "pt-br", "en")}
    configs = [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in ("pt", "pt-br", "en")]
    hub.add("datasets/org/linguas", {"README.md": f"---\nconfigs: {json.dumps(configs)}\n---\n", **files})
    refused = {
        "hf:mc4:pt": ("two parts", "hf:allenai/c4:pt is meant"),
        "hf:mc4:pt:validation": ("hf:allenai/c4:pt:validation is meant",),
        "hf:Wikipedia": ("two parts", "hf:wikimedia/wikipedia is meant"),
        "hf:meutexto": ("two parts", "look meutexto up"),
        "hf:org/linguas:ptbr": ("no configuration 'ptbr'", "choose from pt-br, pt, en (hf:org/linguas:CONFIG)."),
        "hf:org/linguas": ("several configurations", "pt, pt-br, en"),
        "hf:org/linguas:pt:treino": ("no split 'treino'", "choose from train (hf:org/linguas:pt:SPLIT)."),
        "hf:org/textos@v9": ("org/textos", "Revision 'v9' doesn't exist"),
        "hf:org/nada": ("org/nada", "doesn't exist"),
    }
    for ref, words in refused.items():
        sentence = cartilha(*prepare(ref, store)).sentence
        assert all(word in sentence for word in words), sentence
        assert not store.exists()
    assert "no revision v9" in cartilha("vocab", "--model", "org/pequeno@v9", "--input", "primer").sentence
    assert "check the spelling" in cartilha("vocab", "--model", "org/nada", "--input", "primer").sentence
    hub.gated.add("models/org/fechado")
    hub.add("models/org/fechado", {"config.json": "{}"})
    assert "accept its terms" in cartilha("vocab", "--model", "org/fechado", "--input", "primer").sentence


def test_a_busy_hub_is_waited_for_as_it_asks_and_then_named(cartilha: Cartilha, hub: LocalHub, commits, tmp_path):
    asked = {429: {"RateLimit": '"api";r=0;t=7'}, 503: {"Retry-After": "9"}}
    for status, headers in asked.items():
        name = f"org/ocupado-{status}"
        hub.add(f"models/{name}", hub.find("models/org/pequeno", "main")[1])
        hub.refusals[:] = [(name, status, headers)]
        done = cartilha("vocab", "--model", name, "--input", "primer", "--limit_documents", 2)
        assert done.code == 0 and not hub.refusals, done
        assert 7 <= max(done.waits) <= 10 and f"The hub is busy ({status})" in done.err
    hub.add("models/org/cheio", hub.find("models/org/pequeno", "main")[1])
    hub.refusals[:] = [("org/cheio", 429, {"RateLimit": '"api";r=0;t=2'})] * 50
    sentence = cartilha("vocab", "--model", "org/cheio", "--input", "primer").sentence
    assert "the hub is busy (429)" in sentence and "reached" not in sentence
    for status, headers in asked.items():
        hub.refusals[:] = [("org/textos", status, headers)] * 2
        store = tmp_path / f"store-{status}"
        assert cartilha(*prepare("hf:org/textos", store, "--workers", 1)).code == 0
    hub.refusals[:] = [("org/textos", 503, {})] * 500
    assert "the hub is busy (503)" in cartilha(*prepare("hf:org/textos", tmp_path / "none", "--workers", 1)).sentence
    run = tmp_path / "run" / "model"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run.parent / "results.json").write_text("{}")
    hub.refusals[:] = [("repos/create", 429, {"Retry-After": "4"})]
    done = cartilha("push", run.parent, "ana/depois")
    assert done.code == 0 and 4 in done.waits, done
    hub.refusals[:] = [("repos/create", 429, {})] * 50
    assert "the hub is busy (429)" in cartilha("push", run.parent, "ana/depois").sentence
    hub.refusals[:] = [("repos/create", 429, {"Retry-After": "7200"})] * 50
    done = cartilha("push", run.parent, "ana/depois")
    assert "the hub is busy (429)" in done.sentence and not done.waits


def test_connections_that_break_change_no_byte(cartilha: Cartilha, hub: LocalHub, commits: Commits, tmp_path):
    whole = hub.find("models/org/pequeno", "main")[1]
    hub.add("models/org/cortado", whole)
    hub.cuts[:] = [("org/cortado", 50_000)] * 3
    scored = [
        cartilha("evaluate", "--model", name, "--input", "primer", "--limit_documents", 2, "--json", "--device", "cpu")
        for name in ("org/cortado", "org/pequeno")
    ]
    assert [outcome.code for outcome in scored] == [0, 0] and not hub.cuts, scored
    first, second = (json.loads(outcome.out)["models"][0]["perplexity"] for outcome in scored)
    assert first == second
    assert cartilha(*prepare("hf:org/textos", tmp_path / "whole", "--workers", 1)).code == 0
    # More cuts than the clients put up with: the rest of the file is read when it is opened again.
    hub.cuts[:] = [("train-00001", 2000)] * 30
    done = cartilha(*prepare("hf:org/textos", tmp_path / "cut", "--workers", 1))
    assert done.code == 0, done
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_connection_that_stays_broken_is_named_with_its_row_and_the_same_command_goes_on(
    cartilha: Cartilha, hub: LocalHub, commits: Commits, tmp_path
):
    hub.add("datasets/org/longo", {f"train-{file}.jsonl": texts(3, file) * 20 for file in range(2)})
    command = prepare("hf:org/longo", tmp_path / "store", "--workers", 1)
    hub.cuts[:] = [("train-1.jsonl", 0)] * 100_000
    sentence = cartilha(*command).sentence
    assert "hf:org/longo" in sentence and "same command" in sentence
    begun = hub.add("datasets/org/longo", {"train-0.jsonl": texts(4, 0)})
    hub.cuts.clear()
    done = cartilha(*command)
    assert done.code == 0 and "Going on with what an earlier run" in done.err, done
    (entry,) = read(tmp_path / "store" / "store.json")["inputs"]
    assert entry["commit"] != begun  # that of the first attempt


def test_a_stream_is_read_until_enough_is_held_also_after_a_broken_connection(
    cartilha: Cartilha, hub: LocalHub, commits: Commits, tmp_path
):
    hub.add("datasets/org/corrente", {f"train-{file}.jsonl": texts(5, file) for file in range(4)})
    enough = ["--workers", 1, "--select_tokens", 300, "--stream_best", "50%", "--like", "primer"]
    whole = cartilha(*prepare("hf:org/corrente", tmp_path / "whole", *enough))
    assert whole.code == 0 and "Reading ended after" in whole.err, whole
    assert hub.fetched("train-0.jsonl") > hub.fetched("train-3.jsonl")  # which is read for the sample alone
    hub.cuts[:] = [("train-2.jsonl", 0)] * 100_000
    command = prepare("hf:org/corrente", tmp_path / "cut", *enough)
    assert "same command" in cartilha(*command).sentence
    hub.cuts.clear()
    hub.requests.clear()
    done = cartilha(*command)
    assert done.code == 0 and contents(tmp_path / "cut") == contents(tmp_path / "whole"), done


def test_a_certificate_that_is_not_trusted_is_named(hub: LocalHub, tmp_path):
    import ssl
    import subprocess
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from shutil import which

    if which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    asked = ["-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", "req", "-x509", *map(str, asked)], check=True, capture_output=True)
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with client(f"https://localhost:{server.server_port}", tmp_path / "home") as command:
            sentences = [
                command(
                    "prepare", "--input", "primer", "--model", "org/pequeno", "--output", tmp_path / "store"
                ).sentence,
                command(*prepare("hf:org/textos", tmp_path / "store")).sentence,
            ]
    finally:
        server.shutdown()
    for sentence in sentences:
        assert "certificate" in sentence and "SSL_CERT_FILE" in sentence and "self-signed" in sentence, sentence
