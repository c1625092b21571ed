"""The explorer's server, and the command that starts it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cartilha.cli import main
from cartilha.config import ExploreConfig
from cartilha.errors import UserError
from cartilha.pipeline.explore import explore, open_explorer


def test_other_commands_do_not_import_gradio() -> None:
    program = (
        "import sys; from cartilha.cli import main; main(['--help']); main(['explore', '--help']); "
        "import cartilha.pipeline.explore, cartilha.pipeline.evaluate, cartilha.pipeline.generate; "
        "print([name for name in ('gradio', 'fastapi', 'uvicorn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExploreConfig(), "nothing to explore"),
        (ExploreConfig(models=("a", "b", "c")), "2 models at most, not 3"),
        (ExploreConfig(models=("random:tiny",), port=70_000), "from 0 to 65535"),
        (ExploreConfig(models=("/no/such/model",), port=0), "/no/such/model"),
        (ExploreConfig(store="/no/such/store", port=0), "does not exist"),
        (
            ExploreConfig(models=("random:tiny",), proxy="host.example"),
            "host.example is no address of a proxy; .*--proxy",
        ),
    ],
)
def test_mistakes_are_one_sentence(config: ExploreConfig, message: str) -> None:
    pytest.importorskip("gradio")
    with pytest.raises(UserError, match=message):
        explore(config)


def test_a_model_that_is_gone_ends_the_command_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    assert main(["explore", "--models", str(tmp_path / "gone"), "--port", "0", "--no_browser"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_port_that_is_taken_is_named() -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*--port"):
            explore(ExploreConfig(models=("random:tiny",), port=port))


def test_without_gradio_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name in ("cartilha.explorer.app", "cartilha.explorer.page")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"pip install .*\[explorer\]"):
        explore(ExploreConfig(models=("random:tiny",)))


def test_the_server_answers_this_machine_alone_and_sends_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    asked: list[object] = []
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (asked.append(a[0]), resolve(*a, **k))[1])
    from starlette.testclient import TestClient

    from cartilha.explorer.app import create_app

    app = create_app(open_explorer(ExploreConfig(models=("random:tiny",), device="cpu", dtype="float32")), "pt")
    with TestClient(app, base_url="http://127.0.0.1", follow_redirects=False) as client:
        assert client.get("/").headers["location"] == "/pt/"
        assert client.get("/", headers={"accept-language": "en-GB"}).headers["location"] == "/en/"
        page = client.get("/pt/")
        assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
        assert not re.search(r"(src|href)=.https?://(?!127\.0\.0\.1)", page.text)
        assert "fonts.googleapis" not in page.text + client.get("/pt/theme.css").text
        assert client.get("/pt/", headers={"host": "elsewhere.example"}).status_code == 400
        for path in ("/pt/gradio_api/file=pyproject.toml", "/pt/file=pyproject.toml", "/pt/gradio_api/proxy=http://a"):
            assert client.get(path).status_code == 403, path
        assert client.post("/pt/gradio_api/upload", files={"files": b"a"}).status_code == 403
        assert client.get("/openapi.json").status_code == 404
    assert set(asked) <= {"127.0.0.1", "localhost", None}  # nothing was looked up elsewhere


def test_behind_a_proxy_the_page_is_that_of_the_proxys_address() -> None:
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    from cartilha.explorer.app import create_app

    proxy = "https://7860-abc.colab.example"
    app = create_app(open_explorer(ExploreConfig(models=("random:tiny",), device="cpu", dtype="float32")), "pt", proxy)
    with TestClient(app, base_url="http://127.0.0.1", follow_redirects=False) as client:
        for host in ("127.0.0.1", "7860-abc.colab.example"):  # whether the proxy names itself or this machine
            assert client.get("/pt/config", headers={"host": host}).json()["root"] == f"{proxy}/pt"
        assert client.get("/pt/", headers={"host": "other.colab.example"}).status_code == 400


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_the_command_says_where_it_is_and_ends_at_ctrl_c() -> None:
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "cartilha", "explore", "--models", "random:tiny", "--port", "0", "--no_browser"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        if address is not None:
            break
    assert address is not None, lines
    with urllib.request.urlopen(address[0] + "en/") as answer:
        assert b"Cartilha" in answer.read()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=240)  # a busy machine; a second as a rule
    assert process.returncode == 0, rest
    assert "Traceback" not in "".join(lines) + rest and "closed" in rest
