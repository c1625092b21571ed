"""Durable files: whole or not at all, whoever is killed when; and what others wrote is read within bounds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cartilha.errors import UserError
from cartilha.evaluation.saved import load_evaluation
from cartilha.storage import (
    MAX_JSON_BYTES,
    exclusive,
    file_sha256,
    new_directory,
    new_file,
    read_json,
    read_sealed_json,
    refuse_lfs_pointer,
    sweep_below,
    to_json,
    write_atomically,
    write_json,
    write_sealed_json,
)
from cartilha.tokens.store import TokenStore
from reading import Interrupted, interrupt

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0a" * 32 + "\nsize 1234567\n"

# Files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_with_the_folders_it_needs(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_atomically(path, "ção\nfim\n")
    assert path.read_bytes() == "ção\nfim\n".encode()  # UTF-8, and no other line ends on Windows
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and names(path.parent) == ["c.txt"]


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, at):
    path = tmp_path / "c.txt"
    write_atomically(path, "velho")
    monkeypatch.setattr(*((os, "fsync", interrupt) if at == "fsync" else (Path, "replace", interrupt)))
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
    assert calls == ["fsync", "replace", "fsync", "fsync", "fsync", "replace", "fsync"]  # the folder's own comes last


# Directories


def test_a_new_file_that_others_write_appears_when_it_is_done(tmp_path):
    path = tmp_path / "a" / "tabela.parquet"
    with new_file(path) as temporary:
        temporary.write_bytes(b"old")
        assert not path.exists()
    with pytest.raises(KeyError), new_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and [found.name for found in path.parent.iterdir()] == [path.name]
    with new_file(path) as temporary:
        temporary.write_bytes(b"new")
        with new_file(path.with_name("other")) as other:  # whoever writes there sweeps only what nobody writes
            sweep_below(tmp_path)
            other.write_bytes(b"")
    assert path.read_bytes() == b"new"


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
        interrupt()
    assert names(tmp_path) == []


def old_directory(tmp_path: Path) -> Path:
    (tmp_path / "pasta").mkdir()
    (tmp_path / "pasta" / "velho").write_text("velho")
    return tmp_path / "pasta"


def test_an_exception_leaves_the_old_directory(tmp_path):
    path = old_directory(tmp_path)
    with pytest.raises(Interrupted), new_directory(path, replace=True) as folder:
        (folder / "novo").write_text("novo")
        interrupt()
    assert names(path) == ["velho"] and names(tmp_path) == ["pasta"]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path, monkeypatch):
    path = old_directory(tmp_path)
    monkeypatch.setattr("cartilha.storage._exchange", lambda left, right: False)
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: interrupt() if a.suffix == ".tmp" else real(a, b))
    with pytest.raises(Interrupted), new_directory(path, replace=True) as folder:
        (folder / "novo").write_text("novo")
    assert names(path) == ["velho"] and names(tmp_path) == ["pasta"]


@pytest.mark.parametrize("in_one_go", [True, False])
def test_replace_puts_it_in_the_place_of_the_old_one(tmp_path, monkeypatch, in_one_go):
    if not in_one_go:
        monkeypatch.setattr("cartilha.storage._exchange", lambda left, right: False)
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


def test_what_another_process_put_there_meanwhile_stays_where_both_write_the_same(tmp_path):
    def write(**options: bool) -> None:
        with new_directory(tmp_path / "pasta", **options) as folder:
            (folder / "novo").write_text("novo")
            old_directory(tmp_path)  # the other process is done first

    write(exist_ok=True)
    assert names(tmp_path) == ["pasta"] and names(tmp_path / "pasta") == ["velho"]
    shutil.rmtree(tmp_path / "pasta")
    with pytest.raises(OSError, match="pasta"):
        write()


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


@pytest.mark.parametrize("pointer", [LFS_POINTER, LFS_POINTER.replace("\n", "\r\n"), LFS_POINTER.strip()])
def test_a_git_lfs_pointer_is_refused_and_what_only_looks_like_one_is_not(tmp_path, pointer):
    path = tmp_path / "store.json"
    path.write_bytes(pointer.encode())
    with pytest.raises(UserError, match=r"store\.json is only a Git LFS pointer to the 1,234,567 bytes.*git lfs pull"):
        refuse_lfs_pointer(path)
    for reader in (read_json, load_evaluation, lambda path: TokenStore(path.parent)):
        with pytest.raises(UserError, match="git lfs pull"):
            reader(path)
    for other in ("", "version 2 da lei\n", pointer + "\nOutro texto.", pointer + "\n" * 1025):
        path.write_text(other)
        refuse_lfs_pointer(path)
    refuse_lfs_pointer(tmp_path / "missing")  # whoever opens it says so
    refuse_lfs_pointer(tmp_path)


def strictly(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_lone_surrogates_which_no_file_holds_are_replaced(tmp_path):
    write_sealed_json(tmp_path / "a.json", {"a\ud83d": ["cora\udce7o 😀"]})
    assert read_sealed_json(tmp_path / "a.json") == {"a\ufffd": ["cora\ufffdo 😀"]}


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


# What a killed process leaves


def killed_while(code: str) -> None:
    """Run code in a process of its own that kills itself where it says KILL, as `kill -9` would."""
    script = "import os, signal\nfrom pathlib import Path\nfrom cartilha import storage\n" + code.replace(
        "KILL", "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", script], timeout=300)
    assert ended.returncode == -signal.SIGKILL


needs_kill = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")


@needs_kill
def test_what_a_killed_process_left_is_swept_by_the_next_and_what_a_living_one_writes_is_not(tmp_path):
    path, file = tmp_path / "pasta", tmp_path / "c.txt"
    killed_while(f"with storage.new_directory(Path({str(path)!r})) as t: (t / 'a').write_text('a'); KILL")
    killed_while(f"storage.os.fsync = lambda f: KILL\nstorage.write_atomically(Path({str(file)!r}), 'x')")
    assert len(names(tmp_path)) == 2  # not vacuous: something is there to sweep
    write_atomically(file, "novo")
    with new_directory(path) as folder:
        (folder / "b").write_text("b")
        assert names(tmp_path) == [folder.name, "c.txt"]
        script = f"from cartilha import storage; storage.sweep_below(storage.Path({str(tmp_path)!r}))"
        subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
        assert names(tmp_path) == [folder.name, "c.txt"]  # somebody lives there
    assert names(tmp_path) == ["c.txt", "pasta"] and names(path) == ["b"]


@needs_kill
@pytest.mark.parametrize("in_one_go", [True, False])
@pytest.mark.parametrize("swept", [True, False])
def test_a_kill_while_a_directory_is_replaced_loses_neither(tmp_path, in_one_go, swept):
    path = old_directory(tmp_path)
    begin = f"""
path = Path({str(path)!r})
{"" if in_one_go else "storage._exchange = lambda left, right: False"}
storage.shutil.rmtree = lambda *a, **k: None
real = Path.replace
def replace(a, b):
    if a.suffix == ".tmp": KILL
    return real(a, b)
Path.replace = replace
real_exchange = storage._exchange
def exchange(a, b):
    done = real_exchange(a, b)
    if done: KILL
    return done
storage._exchange = exchange
with storage.new_directory(path, replace=True) as t: (t / "novo").write_text("novo")
"""
    killed_while(begin)
    # Swapped in one go, the new one is there already; else the old one is put back by whoever writes next.
    assert names(path) == ["novo"] if in_one_go and sys.platform == "linux" else not path.exists()
    if swept:
        sweep_below(tmp_path)
    else:
        with pytest.raises(Interrupted), new_directory(path, replace=True):
            interrupt()
    assert names(tmp_path) == ["pasta"] and len(names(path)) == 1


@needs_kill
def test_a_directory_for_itself_is_swept_to_the_bottom(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step-1"
    killed_while(f"with storage.new_directory(Path({str(path)!r})) as t: (t / 'a').write_text('a'); KILL")
    (tmp_path / "run" / ".mine.tmp").write_text("no process id: nobody's business")
    sweep_below(tmp_path / "run")
    assert names(path.parent) == [] and names(tmp_path / "run") == [".mine.tmp", "checkpoints"]


# Locks


def test_two_cannot_hold_a_lock_and_it_leaves_nothing(tmp_path):
    with exclusive(tmp_path / ".lock", "The run r"):
        busy = rf"The run r is in use .*process {os.getpid()} on "
        with pytest.raises(UserError, match=busy), exclusive(tmp_path / ".lock", "The run r"):
            pytest.fail("two hold it")
        assert names(tmp_path) == [".lock"]
    with exclusive(tmp_path / ".lock", "The run r"):
        pass
    assert names(tmp_path) == []


@needs_kill
def test_a_lock_dies_with_its_holder(tmp_path):
    killed_while(f"with storage.exclusive(Path({str(tmp_path / '.lock')!r}), 'x'): KILL")
    assert names(tmp_path) == [".lock"]
    with exclusive(tmp_path / ".lock", "The run r"):
        pass
    assert names(tmp_path) == []


def test_a_disk_without_locks_is_announced(tmp_path, monkeypatch, caplog):
    def no_locks(descriptor):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("cartilha.storage._lock", no_locks)
    with exclusive(tmp_path / ".lock", "The run r"):
        assert "has no locks (Function not implemented)" in caplog.text
    write_atomically(tmp_path / "a", "works without")
    assert names(tmp_path) == ["a"]


# What others wrote


def test_json_from_others_is_bounded(tmp_path):
    file = tmp_path / "a.json"
    for data, part in ((b"[" * 200_000, "nested too deeply"), (b"\xff{}", "decode"), (b"{", "Expecting")):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=part):
            read_json(file)
    with file.open("wb") as big:
        big.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="too many"):
        read_json(file)


SEALED = {"nome": "maçã", "n": [1, 0.1, 1e-05, None, True], "dentro": {"a": {"b": []}}}


def test_sealed_json_comes_back(tmp_path):
    write_sealed_json(tmp_path / "a.json", SEALED)
    assert read_sealed_json(tmp_path / "a.json") == SEALED
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["nome"] == "maçã"


def test_every_flipped_bit_of_sealed_json_is_noticed(tmp_path):
    file = tmp_path / "a.json"
    write_sealed_json(file, SEALED)
    data = file.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(ValueError):
            read_sealed_json(file)
    for other in (b"{}", b"[]", b"3", b'{"sha256": 3}', data + b" ", data[:-1], b""):
        file.write_bytes(other)
        with pytest.raises(ValueError):
            read_sealed_json(file)
