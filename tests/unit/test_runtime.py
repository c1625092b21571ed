"""The machine and its disk: no emulated dtype, clear refusals, and writes that a reader never sees half done."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cartilha import runtime
from cartilha.errors import UserError
from cartilha.runtime import (
    choose_device,
    choose_dtype,
    cpu_has_bfloat16,
    file_sha256,
    hardware_dtypes,
    has_cxx_compiler,
    new_directory,
    peak_memory_bytes,
    seed_everything,
    to_json,
    versions,
    write_atomically,
    write_json,
)

# Device and dtype


@pytest.mark.parametrize(
    ("device", "capability", "bf16_cpu", "expected"),
    [
        ("cuda", (7, 5), False, ("float16", "float32")),  # T4: bf16 is emulated there, although torch says yes
        ("cuda", (7, 5), True, ("float16", "float32")),  # the CPU beside it does not matter
        ("cuda", (8, 0), False, ("bfloat16", "float16", "float32")),
        ("cuda", (9, 0), False, ("bfloat16", "float16", "float32")),
        ("cuda", (12, 0), False, ("bfloat16", "float16", "float32")),
        ("mps", None, False, ("float32",)),
        ("mps", None, True, ("float32",)),
        ("cpu", None, True, ("bfloat16", "float32")),
        ("cpu", None, False, ("float32",)),
    ],
)
def test_only_dtypes_that_the_hardware_has(device, capability, bf16_cpu, expected):
    assert hardware_dtypes(device, capability, bf16_cpu) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_bf16", True),
        ("fpu avx512f amx_bf16", True),
        ("asimd fphp bf16", True),  # ARM
        ("fpu avx2 avx512f avx512_vnni", False),
        ("", False),
    ],
)
def test_bfloat16_of_a_cpu_by_its_flags(flags, expected):
    assert cpu_has_bfloat16(frozenset(flags.split())) is expected


@pytest.fixture
def devices(monkeypatch):
    """Pretend that these kinds of devices are there."""

    def pretend(*kinds: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)

    return pretend


def test_auto_takes_the_best_device_and_says_when_it_is_the_cpu(devices, caplog):
    caplog.set_level("INFO", logger="cartilha")
    for kinds, expected in ((("cuda", "mps"), "cuda"), (("cuda",), "cuda"), (("mps",), "mps")):
        devices(*kinds)
        assert choose_device("auto").type == expected
        assert choose_device("cpu").type == "cpu"
    assert caplog.text == ""
    devices()
    assert choose_device("auto").type == "cpu" and "No GPU was found" in caplog.text


def test_a_device_that_is_not_there_is_refused_with_those_that_are(devices):
    devices("mps")
    with pytest.raises(UserError, match=r"device cuda is not available .* one of: cpu, mps\."):
        choose_device("cuda")
    devices()
    with pytest.raises(UserError, match=r"device mps is not available .* one of: cpu\."):
        choose_device("mps")


def test_a_t4_is_given_float16_and_refused_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    device = torch.device("cuda")
    for capability, best in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert choose_dtype("auto", device) == best
        assert choose_dtype("float32", device) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(UserError, match=r"no bfloat16 in hardware; use --dtype auto or one of: float16, float32\."):
        choose_dtype("bfloat16", device)


@pytest.mark.parametrize("bf16", [True, False])
def test_dtypes_of_a_cpu(monkeypatch, bf16):
    monkeypatch.setattr(runtime, "cpu_has_bfloat16", lambda: bf16)
    cpu = torch.device("cpu")
    assert str(choose_dtype("auto", cpu)).removeprefix("torch.") in hardware_dtypes("cpu", None, bf16)
    assert choose_dtype("float32", cpu) == torch.float32
    with pytest.raises(UserError, match="no float16 in hardware"):
        choose_dtype("float16", cpu)
    if bf16:
        assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    else:
        with pytest.raises(UserError, match="no bfloat16 in hardware"):
            choose_dtype("bfloat16", cpu)


@pytest.mark.skipif(sys.platform == "win32", reason="executables are found by their ending there")
@pytest.mark.parametrize(
    ("platform", "there", "cxx", "expected"),
    [
        ("linux", ["g++"], None, True),
        ("linux", ["c++", "clang++"], None, False),  # torch looks for g++ alone
        ("linux", ["clang++"], "clang++", True),
        ("linux", ["g++"], "icpx", False),  # and for $CXX alone where it is set
        ("linux", [], None, False),
        ("darwin", ["clang++"], None, True),
        ("darwin", ["g++"], None, False),
        ("win32", ["cl"], None, True),
        ("win32", ["g++"], None, False),
    ],
)
def test_a_compiler_counts_where_torch_finds_it(monkeypatch, tmp_path, platform, there, cxx, expected):
    for name in there:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if cxx:
        monkeypatch.setenv("CXX", cxx)
    # shutil.which would look for Windows's endings, too: the platform is changed for our module alone.
    monkeypatch.setattr(runtime, "sys", type("sys", (), {"platform": platform}))
    assert has_cxx_compiler() is expected


def test_tests_take_two_threads():
    assert torch.get_num_threads() == 2


def test_the_seed_decides_what_torch_draws():
    seed_everything(7)
    drawn = torch.rand(3)
    assert not torch.equal(drawn, torch.rand(3))
    seed_everything(7)
    assert torch.equal(drawn, torch.rand(3))


def test_peak_memory_is_in_bytes_and_does_not_fall():
    before = peak_memory_bytes("cpu")
    block = np.ones(200_000_000, np.uint8)
    grown = peak_memory_bytes("cpu")
    del block
    assert 20_000_000 < before <= grown < psutil.virtual_memory().total
    assert peak_memory_bytes("cpu") >= grown >= 200_000_000


def test_versions_name_what_a_number_depends_on():
    found = versions()
    assert found["torch"] == torch.__version__ and found["numpy"] == np.__version__
    assert "not installed" not in found.values()


# Files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_with_the_folders_it_needs(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_atomically(path, "ção\nfim\n")
    assert path.read_bytes() == "ção\nfim\n".encode()  # UTF-8, and no other line ends on Windows
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and names(path.parent) == ["c.txt"]


class Interrupted(BaseException):
    """As KeyboardInterrupt: no `except Exception` stops it."""


def fail(*_):
    raise Interrupted


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, at):
    path = tmp_path / "c.txt"
    write_atomically(path, "velho")
    monkeypatch.setattr(*((os, "fsync", fail) if at == "fsync" else (Path, "replace", fail)))
    with pytest.raises(Interrupted):
        write_atomically(path, "novo")
    with pytest.raises(Interrupted):
        write_atomically(tmp_path / "outro.txt", "novo")
    assert path.read_text() == "velho" and names(tmp_path) == ["c.txt"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync") or real_fsync(file))
    monkeypatch.setattr(Path, "replace", lambda a, b: calls.append("replace") or real_replace(a, b))
    write_atomically(tmp_path / "c.txt", "novo")
    with new_directory(tmp_path / "pasta") as folder:
        (folder / "a").touch()
        (folder / "b").mkdir()
        (folder / "b" / "c").touch()
    assert calls == ["fsync", "replace", "fsync", "fsync", "replace"]


# Directories


def test_a_new_directory_appears_when_it_is_done(tmp_path):
    path = tmp_path / "a" / "pasta"
    with new_directory(path) as folder:
        (folder / "um").write_text("1")
        assert not path.exists() and folder.parent == path.parent  # beside it, so that a rename will do
    assert names(path) == ["um"] and names(path.parent) == ["pasta"]


@pytest.mark.parametrize("replace", [True, False])
def test_an_exception_leaves_no_directory(tmp_path, replace):
    with pytest.raises(Interrupted), new_directory(tmp_path / "pasta", replace=replace) as folder:
        (folder / "um").write_text("1")
        fail()
    assert names(tmp_path) == []


def old_directory(tmp_path: Path) -> Path:
    (tmp_path / "pasta").mkdir()
    (tmp_path / "pasta" / "velho").write_text("velho")
    return tmp_path / "pasta"


def test_an_exception_leaves_the_old_directory(tmp_path):
    path = old_directory(tmp_path)
    with pytest.raises(Interrupted), new_directory(path, replace=True) as folder:
        (folder / "novo").write_text("novo")
        fail()
    assert names(path) == ["velho"] and names(tmp_path) == ["pasta"]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path, monkeypatch):
    path = old_directory(tmp_path)
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: fail() if a.suffix == ".tmp" else real(a, b))
    with pytest.raises(Interrupted), new_directory(path, replace=True) as folder:
        (folder / "novo").write_text("novo")
    assert names(path) == ["velho"] and names(tmp_path) == ["pasta"]


def test_replace_puts_it_in_the_place_of_the_old_one(tmp_path):
    path = old_directory(tmp_path)
    with new_directory(path, replace=True) as folder:
        (folder / "novo").write_text("novo")
        assert names(path) == ["velho"]
    assert names(path) == ["novo"] and names(tmp_path) == ["pasta"]


def test_without_replace_only_an_empty_directory_is_taken(tmp_path):
    path = old_directory(tmp_path)
    with pytest.raises(OSError), new_directory(path) as folder:
        (folder / "novo").write_text("novo")
    assert names(path) == ["velho"] and names(tmp_path) == ["pasta"]
    (path / "velho").unlink()
    with new_directory(path) as folder:
        (folder / "novo").write_text("novo")
    assert names(path) == ["novo"]


def test_what_a_killed_run_of_the_same_process_id_left_is_in_nobodys_way(tmp_path):
    path = old_directory(tmp_path)  # in a container, process ids come again
    for end in ("tmp", "old"):
        left = tmp_path / f".pasta.{os.getpid()}.{end}"
        left.mkdir()
        (left / "resto").write_text("resto")
    with new_directory(path, replace=True) as folder:
        (folder / "novo").write_text("novo")
    assert names(path) == ["novo"] and names(tmp_path) == ["pasta"]


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    data = bytes(range(256)) * 5000  # more than is read at once
    (tmp_path / "a").write_bytes(data)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


# JSON


def strictly(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_number_becomes_null():
    value = {"loss": math.nan, "of": [math.inf, (-math.inf, 1.5)], "numpy": [np.float32("nan"), np.float16("inf")]}
    assert strictly(to_json(value)) == {"loss": None, "of": [None, [None, 1.5]], "numpy": [None, None]}
    with pytest.raises(AssertionError):
        strictly(json.dumps(value["loss"]))  # not vacuous: json itself writes NaN


def test_numpy_scalars_are_plain_values():
    value = {"a": np.float32(0.5), "b": np.int64(3), "c": np.uint16(7), "d": np.bool_(True), "e": np.float64(0.1)}
    assert strictly(to_json(value)) == {"a": 0.5, "b": 3, "c": 7, "d": True, "e": 0.1}
    assert to_json([np.bool_(False), True, None, "ção"]) == '[false, true, null, "ção"]'


def test_what_json_cannot_say_is_refused():
    with pytest.raises(TypeError):
        to_json({"path": Path("x")})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_any_plain_value_comes_back_with_null_for_what_is_no_number(value):
    def expected(value):
        if isinstance(value, dict):
            return {key: expected(item) for key, item in value.items()}
        if isinstance(value, list):
            return [expected(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    assert strictly(to_json(value)) == expected(value)


def test_a_json_file_is_readable_and_ends_with_a_line_end(tmp_path):
    write_json(tmp_path / "a.json", {"nome": "maçã", "n": [1, math.nan]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == '{\n  "nome": "maçã",\n  "n": [\n    1,\n    null\n  ]\n}\n'
