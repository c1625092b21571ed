"""Disks that are full, read-only or gone: one sentence, the last good checkpoint intact, and the run goes on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from cartilha.cli import main
from cartilha.config import TrainConfig
from cartilha.errors import UserError
from cartilha.pipeline import prepare as prepare_module
from cartilha.pipeline.train import train
from cartilha.preparation import enough
from cartilha.runs import scratch
from cartilha.training.checkpoint import list_checkpoints, newest_sound_checkpoint
from cartilha.training.loop import train_steps

FAULTS = {"full": errno.ENOSPC, "quota": errno.EDQUOT, "read-only": errno.EROFS}


def flags(store: Path, output: Path, **changes: object) -> list[str]:
    values = {"model": "random:tiny", "block_size": 32, "batch_tokens": 64, "max_steps": 9, "checkpoint_steps": 3}
    values |= {"lr": 3e-3, "dtype": "float32", "store": store, "output": output, "resume": "auto", **changes}
    given = (str(part) for name, value in values.items() for part in (f"--{name}", value))
    return ["train", *given, "--skip_checks"]  # of texts that are all alike


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of the run that nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(flags(store, run)) == 0
    return weights(run)


def break_disk(patch: pytest.MonkeyPatch, below: Path, code: int, after: int) -> list[str]:
    """From the `after`-th write below a directory on, every one fails; returns the list of what was written."""
    written: list[str] = []

    def write(what: str, path: Any) -> None:
        if below in Path(os.path.realpath(path)).parents:
            written.append(f"{what} {Path(path).name}")
            if len(written) > after:
                raise OSError(code, os.strerror(code), str(path))

    real_open, real_mkdir, real_replace = Path.open, Path.mkdir, Path.replace

    def opening(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wa+x"):
            write("open", self)
        return real_open(self, mode, *rest, **more)

    def making(self: Path, *rest: Any, **more: Any) -> None:
        if not self.is_dir():
            write("mkdir", self)
        real_mkdir(self, *rest, **more)

    def renaming(self: Path, target: Any) -> Path:
        write("rename", self)
        return real_replace(self, target)

    patch.setattr(Path, "open", opening)
    patch.setattr(Path, "mkdir", making)
    patch.setattr(Path, "replace", renaming)
    import cartilha.training.checkpoint as checkpoint

    real_save = checkpoint.save_file

    def saving(tensors: Any, path: Path) -> None:
        try:
            write("tensors", path)
        except OSError as error:  # as safetensors says it
            raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from error
        real_save(tensors, path)

    patch.setattr(checkpoint, "save_file", saving)
    return written


def test_at_every_write_a_full_disk_loses_nothing_earlier(store, tmp_path, undisturbed, capfd, monkeypatch):
    """Every write point of a whole run in turn, each with one of the three faults; then the disk is mended."""
    with monkeypatch.context() as patch:
        all_writes = break_disk(patch, tmp_path / "whole", errno.ENOSPC, 10**9)
        assert main(flags(store, tmp_path / "whole")) == 0
    assert len(all_writes) > 50 and any(name.startswith("tensors") for name in all_writes)
    every = int(os.environ.get("CARTILHA_WRITE_POINTS_EVERY", "9"))  # 1 takes each: docs/reliability.md
    points = range(1, len(all_writes), every)
    for number, point in enumerate(points):
        run, code = tmp_path / f"run-{point}", list(FAULTS.values())[number % len(FAULTS)]
        capfd.readouterr()
        with monkeypatch.context() as patch:
            break_disk(patch, run, code, point)
            exit_code = main(flags(store, run))
        err = capfd.readouterr().err
        said = [line for line in err.splitlines() if line.startswith("cartilha:")]
        assert exit_code == 2 and len(said) == 1 and "Traceback" not in err, err
        assert os.strerror(code) in said[0], said[0]
        kept = list_checkpoints(run)
        if kept:
            assert kept[-1].name in said[0] and newest_sound_checkpoint(run) == kept[-1]
        assert main(flags(store, run)) == 0, capfd.readouterr().err
        assert weights(run) == undisturbed
        assert not [path for path in run.rglob(".*") if path.suffix in (".tmp", ".old")]
        shutil.rmtree(run)


def test_a_disk_that_is_too_small_is_refused_before_step_1(store, tmp_path, capfd, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr("cartilha.runs.setup.shutil.disk_usage", lambda path: usage)
    assert main(flags(store, tmp_path / "run")) == 2
    err = capfd.readouterr().err
    assert "has 0.00 GB left, and the run may need 0.01 GB" in err and not (tmp_path / "run").exists()


# Slow and vanishing drives


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies often and does not wait long at the end."""
    monkeypatch.setattr(scratch, "COPY_EVERY_S", 0.05)
    monkeypatch.setattr(scratch, "LAST_PAUSE_S", 0.05)


def contents(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Callable[[], Any]]], None]:
    """Do something before the step of this number is handed on."""

    def arrange(actions: dict[int, Callable[[], Any]]) -> None:
        def steps(*rest: Any, **more: Any) -> Iterator[Any]:
            for record in train_steps(*rest, **more):
                if record.step in actions:
                    actions[record.step]()
                yield record

        monkeypatch.setattr("cartilha.pipeline.train.train_steps", steps)

    return arrange


def test_a_run_on_scratch_is_copied_whole(store, tmp_path, undisturbed, patient, capfd):
    arguments = flags(store, tmp_path / "drive" / "run", scratch=tmp_path / "local")
    assert main(arguments) == 0
    assert "is written to" in capfd.readouterr().err
    run, local = tmp_path / "drive" / "run", next((tmp_path / "local").glob("*/run"))
    assert weights(run) == undisturbed and contents(run) == contents(local)
    assert main(arguments) == 0 and "nothing to do" in capfd.readouterr().err


def vanish(drive: Path) -> None:
    """The drive disconnects: where it was mounted is something else now."""
    drive.rename(drive.with_name("away"))
    while not drive.is_file():
        with suppress(IsADirectoryError):
            drive.write_text("not connected")
        if drive.is_dir():  # made meanwhile by the copy
            shutil.rmtree(drive, ignore_errors=True)


def come_back(drive: Path) -> None:
    drive.unlink()
    drive.with_name("away").rename(drive)


def test_a_drive_that_vanishes_for_a_while_costs_nothing(
    store, tmp_path, undisturbed, patient, before_step, until, capfd, monkeypatch
):
    drive = tmp_path / "drive"
    drive.mkdir()
    faults: list[OSError] = []
    note = scratch.Copier._note
    monkeypatch.setattr(scratch.Copier, "_note", lambda self, error: (faults.append(error), note(self, error)))
    copied, missed = lambda: list_checkpoints(drive / "run"), lambda: faults
    before_step({4: lambda: until(copied), 5: lambda: (vanish(drive), until(missed)), 8: lambda: come_back(drive)})
    assert main(flags(store, drive / "run", scratch=tmp_path / "local")) == 0
    err = capfd.readouterr().err
    assert err.count("cannot be written to") == 1 and "can be written to again" in err
    assert weights(drive / "run") == undisturbed
    assert contents(drive / "run") == contents(next((tmp_path / "local").glob("*/run")))


def test_a_drive_that_stays_away_leaves_the_whole_run_here(store, tmp_path, undisturbed, patient, before_step, capfd):
    drive = tmp_path / "drive"
    drive.mkdir()
    before_step({5: lambda: vanish(drive)})
    arguments = flags(store, drive / "run", scratch=tmp_path / "local")
    assert main(arguments) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cartilha:")]
    local = next((tmp_path / "local").glob("*/run"))
    assert len(said) == 1 and "The run is complete, but it cannot be copied" in said[0] and str(local) in said[0]
    assert weights(local) == undisturbed
    come_back(drive)
    before_step({})
    assert main(arguments) == 0  # nothing is left to do but to copy
    assert weights(drive / "run") == undisturbed and contents(drive / "run") == contents(local)


def test_a_lost_local_disk_goes_on_from_the_copy(store, tmp_path, undisturbed, patient, before_step, until):
    """As on Colab: the session's own disk is gone, the drive is there."""
    output, local = tmp_path / "drive" / "run", tmp_path / "local"

    class SessionEnds(BaseException):
        pass

    def end() -> None:
        until(lambda: list_checkpoints(output))
        raise SessionEnds

    before_step({5: end})
    with pytest.raises(SessionEnds):
        main(flags(store, output, scratch=local))
    shutil.rmtree(local)
    before_step({})
    assert main(flags(store, output, scratch=local)) == 0
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["resumed_from_step"] == [3] and weights(output) == undisturbed


def test_a_new_run_does_not_inherit_an_old_local_copy(store, tmp_path, patient):
    output, local = tmp_path / "drive" / "run", tmp_path / "local"
    common = {"model": "random:tiny", "store": str(store), "output": str(output), "scratch": str(local)}
    sizes: dict[str, Any] = {
        "block_size": 32,
        "batch_tokens": 64,
        "dtype": "float32",
        "max_steps": 2,
        "skip_checks": True,
    }
    train(TrainConfig(**common, **sizes))
    shutil.rmtree(output)
    train(TrainConfig(**common, **{**sizes, "max_steps": 1}))
    assert json.loads((output / "results.json").read_text(encoding="utf-8"))["steps"] == 1
    with pytest.raises(UserError, match="holds a run already"):
        train(TrainConfig(**common, **sizes))


def test_only_network_drives_are_found_to_be_such(tmp_path, monkeypatch):
    class Disk:
        def __init__(self, mountpoint: str, fstype: str, opts: str = "rw") -> None:
            self.mountpoint, self.fstype, self.opts = mountpoint, fstype, opts

    disks = [Disk("/", "overlay"), Disk("/content", "ext4"), Disk("/content/drive", "fuse.drive")]
    disks += [Disk("/home", "nfs4"), Disk("/home/me/local", "xfs"), Disk("/mnt/x", "fuse-overlayfs")]
    monkeypatch.setattr(scratch.psutil, "disk_partitions", lambda all: disks)
    monkeypatch.setattr(scratch.os.path, "realpath", str)
    found = {
        path
        for path in ("/tmp/a", "/content/a", "/content/drive/b", "/content/drives", "/home/me/a")
        if scratch.is_on_network_disk(Path(path))
    }
    assert found == {"/content/drive/b", "/home/me/a"}
    assert not scratch.is_on_network_disk(Path("/home/me/local/a")) and not scratch.is_on_network_disk(Path("/mnt/x/a"))
    disks[0] = Disk("/", "nfs4")
    assert not scratch.is_on_network_disk(Path("/tmp/a"))  # where everything lies on it, nothing is nearer


# A disk that really fills up, while text is prepared


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk (root on Linux)")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Somebody else fills the disk."""
    with (disk / "ballast").open("wb") as file:
        for size in (1 << 20, 4096):
            while shutil.disk_usage(disk).free >= leave + size:
                file.write(bytes(size))
                file.flush()


@pytest.mark.parametrize(
    ("moment", "workers"), [("_check_space", 1), ("_check_space", 2), ("load_index", 1), ("write_sides", 1)]
)
def test_a_disk_that_fills_while_text_is_prepared(small_disk, tmp_path, capfd, monkeypatch, moment, workers):
    """Full before the shards, before what is decided, and inside of the store's writing, with near-duplicates."""
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 200_000)
    monkeypatch.setattr(prepare_module, "INLINE_BYTES", 0)
    path = tmp_path / "textos.txt"
    path.write_text("".join(f"{n} {'era uma vez um café ' * (n % 60)}{n}\n" for n in range(2500)), "utf-8")
    other = small_disk / "tese.txt"
    other.write_text("anos de trabalho")
    command = [
        "prepare",
        "--input",
        str(path),
        "--model",
        "random:tiny",
        "--workers",
        str(workers),
        "--near_duplicates",
    ]
    assert main([*command, "--output", str(tmp_path / "reference")]) == 0
    real = getattr(prepare_module, moment)

    def and_fill(*rest: Any, **more: Any) -> Any:
        if moment != "_check_space":
            fill(small_disk, 300_000)
            return real(*rest, **more)
        result = real(*rest, **more)
        fill(small_disk, 1_000_000)
        return result

    capfd.readouterr()
    store = small_disk / "store"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, moment, and_fill)
        code = main([*command, "--output", str(store)])
    err = capfd.readouterr().err
    said = [line for line in err.splitlines() if line.startswith("cartilha:")]
    assert code == 2 and len(said) == 1 and "Traceback" not in err, err
    assert "is full" in said[0] and "same command" in said[0]
    assert not store.exists() and other.read_text() == "anos de trabalho"
    done = list((small_disk / ".store.work").glob("shard-*/done.json"))
    assert done
    (small_disk / "ballast").unlink()
    redone: list[int] = []
    real_shard = enough.process_shard
    if workers == 1:
        monkeypatch.setattr(enough, "process_shard", lambda t: (redone.append(t.shard.number), real_shard(t))[1])
    assert main([*command, "--output", str(store)]) == 0, capfd.readouterr().err
    assert not {f"shard-{number:06d}" for number in redone} & {p.parent.name for p in done}
    for p in (tmp_path / "reference").rglob("*.*"):
        if p.is_file() and p.name != ".verified.json":
            assert (store / p.relative_to(tmp_path / "reference")).read_bytes() == p.read_bytes(), p.name
    assert sorted(p.name for p in small_disk.iterdir()) == ["store", "tese.txt"]
