"""Disks that really are full or read-only: small ones of our own, mounted for the test (which takes root, on Linux)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cartilha.cli import main
from cartilha.training.checkpoint import list_checkpoints, newest_sound_checkpoint
from cartilha.training.loop import train_steps


def run_as_root(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        pytest.skip(f"disks cannot be mounted here ({done.stderr.strip() or command[0]})")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a disk of so many MB: in memory, or an ext4 of its own in a file."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a disk takes root, on Linux")
    mounted: list[Path] = []

    def mount(kind: str, megabytes: int) -> Path:
        place = tmp_path / "disco cheio"
        place.mkdir(exist_ok=True)
        if kind == "tmpfs":
            run_as_root("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place)
        else:
            image = tmp_path / "image"
            if not image.exists():
                if shutil.which("mkfs.ext4") is None:
                    pytest.skip("there is no mkfs.ext4")
                image.write_bytes(b"")
                os.truncate(image, megabytes << 20)
                run_as_root("mkfs.ext4", "-q", "-m", "0", image)
            run_as_root("mount", "-o", "loop", image, place)
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], capture_output=True)


def train(store: Path, run: Path) -> list[str]:
    sizes = {"block_size": 32, "batch_tokens": 64, "max_steps": 9, "checkpoint_steps": 3, "lr": 3e-3}
    sizes |= {"dtype": "float32", "resume": "auto", "scratch": "none"}
    given = (str(part) for name, value in sizes.items() for part in (f"--{name}", value))
    return ["train", "--model", "random:tiny", "--store", str(store), "--output", str(run), *given, "--skip_checks"]


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(train(store, run)) == 0
    return run


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def fill(disk: Path) -> None:
    """Take what is left of a disk."""
    with (disk / "filler").open("wb", buffering=0) as file:
        piece = 1 << 16
        while piece:
            try:
                file.write(b"x" * piece)
            except OSError:
                piece //= 2


def forbid(disk: Path) -> None:
    """The disk turns read-only under the files that are open on it, as after a fault of its hardware."""
    run_as_root("mount", "-o", "remount,abort", disk)


def one_sentence(err: str) -> str:
    said = [line for line in err.splitlines() if line.startswith("cartilha:")]
    assert len(said) == 1 and "Traceback" not in err, err
    return said[0]


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_fails_in_the_middle_of_a_run_costs_nothing_earlier(
    store, undisturbed, mount, until, capfd, monkeypatch, fault
):
    disk = mount("tmpfs" if fault == "full" else "ext4", 32)
    run = disk / "run"

    def steps(*rest: Any, **more: Any) -> Iterator[Any]:
        for record in train_steps(*rest, **more):
            if record.step == 5:
                until(lambda: list_checkpoints(run))  # another thread writes it
                fill(disk) if fault == "full" else forbid(disk)
            yield record

    with monkeypatch.context() as patch:
        patch.setattr("cartilha.pipeline.train.train_steps", steps)
        assert main(train(store, run)) == 2
    sentence = one_sentence(capfd.readouterr().err)
    assert "step-00000003" in sentence
    assert ("No space left" if fault == "full" else "Read-only file system") in sentence
    newest = newest_sound_checkpoint(run)
    assert newest is not None and newest.name == "step-00000003"
    if fault == "full":
        assert main(train(store, run)) == 2 and "GB left" in one_sentence(capfd.readouterr().err)
        (disk / "filler").unlink()
    else:
        assert main(train(store, run)) == 2 and "Read-only" in one_sentence(capfd.readouterr().err)
        subprocess.run(["umount", disk], check=True)
        mount("ext4", 32)
    assert main(train(store, run)) == 0, capfd.readouterr().err
    assert weights(run) == weights(undisturbed)
    assert not [path for path in run.rglob(".*") if path.suffix in (".tmp", ".old")]


@pytest.mark.parametrize("fault", ["full", "read-only"])
@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_what_stood_on_a_disk_stays_where_a_command_cannot_write(
    store, undisturbed, mount, capfd, command, fault, tmp_path
):
    disk = mount("tmpfs", 8)
    names = ["saved.parquet", "tokens.parquet"] if command == "evaluate" else ["report.html", "report.md"]
    for name in names:
        (disk / name).write_bytes(b"what stood there")
    if fault == "full":
        fill(disk)
    else:
        run_as_root("mount", "-o", "remount,ro", disk)
    if command == "evaluate":
        arguments = ["--model", undisturbed / "model", "--store", store, "--dtype", "float32"]
        arguments += ["--save", disk / names[0], "--per_token", disk / names[1]]
    else:
        arguments = [undisturbed, "--output", disk / names[0]]
    assert main([command, *map(str, arguments)]) == 2
    sentence = one_sentence(capfd.readouterr().err)
    assert ("No space left" if fault == "full" else "Read-only") in sentence and str(disk) in sentence
    left = {path.name: path.read_bytes() for path in disk.iterdir() if path.name != "filler"}
    assert left == dict.fromkeys(names, b"what stood there")
