"""Checkpoints: all that an exact resume needs, written so that a kill leaves the old one or the new one, whole.

checkpoints/step-00000123/
    model.safetensors      float32 weights, or bfloat16 ones; tied ones once; of an adapter alone, if one is trained
    optimizer.safetensors  the optimizer's states by parameter name; dropped when the run is finished
    state.json             progress, scaler, random state, settings that a resume must find unchanged
    manifest.json          size and SHA-256 of the files above, and of itself; written last

Of a sharded model, each process writes its part of the first two (`checkpoint_shards`); one process or another number
of them goes on from it, as sharded processes do from a checkpoint of one.

A checkpoint may come from an unknown source. Nothing in it is unpickled; sizes, shapes and ranges are checked before it
is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from cartilha.errors import UserError, first_line, log
from cartilha.machine.processes import is_main_process
from cartilha.model.adapters import trained_parameters
from cartilha.model.sharding import is_sharded
from cartilha.settings import IN_WORDS
from cartilha.storage import (
    file_sha256,
    new_directory,
    read_json,
    read_sealed_json,
    system_error,
    write_json,
    write_sealed_json,
)
from cartilha.training.checkpoint_checks import check_progress, check_scaler, check_tensors
from cartilha.training.checkpoint_shards import (
    OF_STATES,
    check_shards,
    has_shards,
    read_shards,
    shared_directory,
    write_shards,
)
from cartilha.training.optimizer import StateSize
from cartilha.training.state import TrainingState
from cartilha.training.streams import random_state, restore_random_state

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
FILES = (WEIGHTS, OPTIMIZER, "state.json")
FORMAT_VERSION = 1
SMALL_FILES_BYTES = 2**20  # state.json, headers, tokenizer, metrics
KEEP = 2  # newest checkpoints; the one with the best validation is kept besides


@dataclass(frozen=True)
class FrozenState:
    """What a checkpoint holds, on the host."""

    step: int
    weights: dict[str, torch.Tensor]  # by parameter name
    states: dict[str, torch.Tensor]  # the optimizer's tensors, by `parameter|key`
    values: dict[str, Any]  # the contents of state.json
    is_sharded: bool = False  # whether each process has a part of every tensor


def freeze(state: TrainingState, settings: dict[str, Any], *, copy: bool = False) -> FrozenState:
    """The state after its last step, with the settings that a resume must find unchanged (`check_settings`).

    With `copy`, tensors that are on the host already are copied, so that training may go on while they are written.
    """

    def at_rest(tensor: torch.Tensor) -> torch.Tensor:
        if is_sharded(state.model):  # written at once, part by part
            return tensor.detach()
        return tensor.detach().to("cpu", copy=copy).contiguous()

    return FrozenState(
        step=state.progress.step,
        weights={name: at_rest(parameter) for name, parameter in trained_parameters(state.model).items()},
        states={joined: at_rest(tensor) for joined, tensor in _named_states(state).items()},
        is_sharded=is_sharded(state.model),
        values={
            "format_version": FORMAT_VERSION,
            "progress": asdict(state.progress),
            "scaler": state.scaler.state_dict(),
            "random": random_state(),
            "settings": settings,
        },
    )


def _named_states(state: TrainingState) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": tensor
        for name, parameter in trained_parameters(state.model).items()
        for key, tensor in state.optimizer.state[parameter].items()
    }


def write_checkpoint(run: Path, frozen: FrozenState, validation_loss: float | None = None, keep: int = KEEP) -> Path:
    """Write a checkpoint of a run; older ones are removed afterwards, except the newest `keep` and the best.

    The best has the lowest validation loss (nats per token), which is known where it has just been measured. Later
    checkpoints are removed too: they are damaged, and the run has gone on from before them. An OSError says that the
    disk cannot be written to; the checkpoints that are there then stay as they are. Of a sharded model all processes
    call this, each with its part.
    """
    path = run / "checkpoints" / f"step-{frozen.step:08d}"
    place = shared_directory(path) if frozen.is_sharded else new_directory(path, replace=True)
    with place as temporary:
        files = write_shards(temporary, frozen.weights, frozen.states) if frozen.is_sharded else {}
        if frozen.is_sharded and not is_main_process():
            return path
        if not frozen.is_sharded:
            _save_tensors(frozen.weights, temporary / WEIGHTS)
            _save_tensors(frozen.states, temporary / OPTIMIZER)
        write_json(temporary / "state.json", frozen.values)
        for name in ["state.json"] if frozen.is_sharded else FILES:
            file = temporary / name
            files[name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
        manifest = {"format_version": FORMAT_VERSION, "validation_loss": validation_loss, "files": files}
        write_sealed_json(temporary / "manifest.json", manifest)
    remove_older(path, keep)
    for other in list_checkpoints(run):
        if other > path:
            shutil.rmtree(other, ignore_errors=True)
    return path


def remove_older(path: Path, keep: int) -> None:
    """Remove the checkpoints before `path`, which is whole, except the newest `keep` (with it) and the best."""
    earlier = [other for other in list_checkpoints(path.parents[1]) if other <= path]
    for other in {*earlier} - {*earlier[-keep:], best_checkpoint(earlier)}:
        shutil.rmtree(other, ignore_errors=True)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """`save_file`, with the system's own error where one is behind safetensors'."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if fault := system_error(error):
            raise OSError(fault.errno, fault.strerror, str(path)) from error
        raise


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first; unfinished ones (temporary names) are not among them."""
    return sorted(path for path in (run / "checkpoints").glob("step-????????") if path.name[5:].isdecimal())


def best_checkpoint(paths: list[Path]) -> Path | None:
    """The one with the lowest validation loss (the later of two equals), or None where none was validated."""
    losses = {path: _manifest(path).get("validation_loss") for path in reversed(paths)}
    measured = {path: float(loss) for path, loss in losses.items() if isinstance(loss, (int, float))}
    return min(measured, key=measured.__getitem__, default=None)


def _manifest(path: Path) -> dict[str, Any]:  # empty where it is damaged or missing
    try:
        return read_sealed_json(path / "manifest.json")
    except (OSError, ValueError):
        return {}


def space_needed(
    size: StateSize, run: Path | None = None, *, keep: int = KEEP, weight_bytes: int = 4
) -> tuple[int, int]:
    """Bytes that a run's files need at most, and bytes of one checkpoint.

    The newest checkpoints and the best are kept while one more is written, and the model is saved at the end, with
    `weight_bytes` per weight. Checkpoints that are in `run` already need no more space.
    """
    checkpoint = size.checkpoint_bytes + SMALL_FILES_BYTES
    there = sum(file.stat().st_size for path in list_checkpoints(run) for file in path.iterdir()) if run else 0
    model = weight_bytes * size.num_trained + size.other_bytes + SMALL_FILES_BYTES
    return max(checkpoint, (keep + 2) * checkpoint - there) + model, checkpoint


def drop_optimizer_states(run: Path) -> None:
    """Remove the optimizer states from a run's checkpoints, the newest last: from then on it can only be finished.

    A manifest changes before the file goes, so that a kill leaves a file too many, which the next end of the run
    removes, and no checkpoint that seems damaged. An OSError says that the disk cannot be written to.
    """
    for path in list_checkpoints(run):
        if has_states(path) and (manifest := _manifest(path)):
            manifest["files"] = {name: known for name, known in manifest["files"].items() if not _is_of_states(name)}
            write_sealed_json(path / "manifest.json", manifest)
        if not has_states(path):
            for file in filter(lambda file: _is_of_states(file.name), list(path.iterdir())):
                file.unlink(missing_ok=True)


def has_states(path: Path) -> bool:
    """Whether a checkpoint has its optimizer states still."""
    files = _manifest(path).get("files")
    return not isinstance(files, dict) or any(map(_is_of_states, files))


def _is_of_states(name: str) -> bool:
    return name == OPTIMIZER or (name.startswith("shard-") and name.endswith(OF_STATES))


def refuse_if_dropped(run: Path) -> None:
    """Refuse, with a UserError, to take more steps in a run whose newest checkpoint has only weights."""
    if remedy := _remedy_if_dropped(run):
        raise UserError(f"The run {run} cannot go on: {remedy}")


def _remedy_if_dropped(run: Path) -> str:
    if all(has_states(path) for path in list_checkpoints(run)[-1:]):
        return ""
    return (
        f"its optimizer states were dropped when it was finished; train its model further with --model {run / 'model'} "
        "and another --output, or train again from the start with --keep_optimizer."
    )


def newest_name(run: Path) -> str | None:
    """The name of the run's newest checkpoint, unverified; None where there is none."""
    return next((path.name for path in reversed(list_checkpoints(run))), None)


def newest_sound_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files have the recorded sizes and hashes; damaged ones are named and passed over.

    A UserError says that only another version's checkpoints are left: a run that starts again would remove them.
    """
    found = list_checkpoints(run)
    others = []
    for path in reversed(found):
        try:
            _verify(path)
        except _OtherVersionError as error:
            others.append(f"{path.name} ({error})")
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("The checkpoint %s is damaged (%s) and is passed over.", path.name, error)
        else:
            return path
    if others:
        raise UserError(
            f"The checkpoints of the run {run} were written by another version of cartilha: {', '.join(others)}; go on "
            "with that version, or train into another --output."
        )
    if found:
        log.warning("No checkpoint of the run %s is sound: it starts again at step 1.", run)
    return None


class _OtherVersionError(ValueError):
    """The checkpoint is not damaged, but of another version."""


def _verify(path: Path) -> None:
    """Raise an error unless the checkpoint's files have the recorded sizes and hashes, and its state has settings."""
    try:
        manifest = read_json(path / "manifest.json")
        of_first_version = isinstance(manifest, dict) and manifest.keys() == set(FILES)
        manifest = {} if of_first_version else read_sealed_json(path / "manifest.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"manifest.json: {error}") from error
    if of_first_version:
        raise _OtherVersionError("its manifest has no hash of its own, as those of the first version")
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise _OtherVersionError(f"format {version}, this version reads {FORMAT_VERSION}")
    shards = {file.name for file in path.glob("shard-*")} | {n for n in manifest["files"] if n.startswith("shard-")}
    for name in sorted({"state.json", *shards} if shards else FILES):
        if _is_of_states(name) and not has_states(path):
            continue
        recorded = manifest["files"][name]
        if (path / name).stat().st_size != recorded["size"]:
            raise ValueError(f"{name} has another size")
        if file_sha256(path / name) != recorded["sha256"]:
            raise ValueError(f"{name} has another hash")
    if not isinstance(_read_state(path)["settings"], dict):
        raise ValueError("state.json has no settings")


def _read_state(path: Path) -> dict[str, Any]:
    values = read_json(path / "state.json")
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"state.json is not of format {FORMAT_VERSION}")
    return values


def read_settings(path: Path) -> dict[str, Any]:
    """The settings recorded in a sound checkpoint."""
    return dict(_read_state(path)["settings"])


ALLOW_CHANGES = "use the old ones, another --output, or --allow_changes."


def check_settings(
    recorded: dict[str, Any], current: dict[str, Any], run: Path, *, allow_changes: bool = False
) -> None:
    """Refuse settings other than those that the run began with: a UserError, or only a warning, names them.

    Where a value is not for people to read, `NAME_in_words` is shown instead of it; that is not compared.
    """
    changed = [name for name in current if not name.endswith(IN_WORDS) and recorded.get(name) != current[name]]
    if not changed:
        return
    for name, noun in (("optimizer", "optimizer"), ("memory", "memory profile")):
        if allow_changes and name in changed:
            raise UserError(
                f"The run {run} cannot go on with another {noun} ({recorded.get(name)} before): its states mean "
                "nothing to the other; use the old one, or train its model further with another --output."
            )
    differences = "; ".join(f"{name} was {_shown(recorded, name)}, now {_shown(current, name)}" for name in changed)
    if not allow_changes:
        lasting = {"optimizer", "memory"} & set(changed)  # which --allow_changes does not help with
        ways = "use the old ones or another --output." if lasting else ALLOW_CHANGES
        remedy = _remedy_if_dropped(run) or ways
        raise UserError(f"The run {run} cannot go on with other settings ({differences}); {remedy}")
    log.warning(
        "The run %s goes on with other settings (%s): it is no longer the run of one command, and steps keep their "
        "count whatever the data are now.",
        *(run, differences),
    )


def _shown(settings: dict[str, Any], name: str) -> Any:
    words = settings.get(name + IN_WORDS)
    return settings.get(name) if words is None else words or None


def _read(path: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read all tensors of a file of the checkpoint, or of its parts, in place."""
    if has_shards(path) or any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        read_shards(path, tensors)
        return
    with torch.no_grad():
        # Copied, since what is read is mapped from the file.
        for key, value in load_file(path / name, device=str(next(iter(tensors.values())).device)).items():
            tensors[key].copy_(value)


def _check(path: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError unless a file of the checkpoint, or its parts, hold these tensors, as far as headers show."""
    if has_shards(path):
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        check_shards(path, shapes, of_states=name == OPTIMIZER)
    else:
        check_tensors(path / name, tensors)


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Put a checkpoint's weights, and nothing else of it, into the model; a UserError says that it is damaged."""
    try:
        _verify(path)
        _check(path, WEIGHTS, trained_parameters(model))
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise UserError(f"The checkpoint {path.name} is damaged ({first_line(error)}).") from error
    _read(path, WEIGHTS, trained_parameters(model))


def load_checkpoint(path: Path, state: TrainingState) -> None:
    """Restore a checkpoint into the state, in place. Everything is checked before anything is changed.

    A UserError says that it is not a checkpoint of this model, or that its contents make no sense. Of a sharded model
    all processes call this.
    """
    parameters = trained_parameters(state.model)
    try:
        saved = _read_state(path)
        progress = check_progress(saved["progress"])
        _check(path, WEIGHTS, parameters)
        states = _named_states(state) if has_states(path) else {}
        if states:
            _check(path, OPTIMIZER, states)
        check_scaler(saved["scaler"], state.scaler.is_enabled())
        restore_random_state(saved["random"])
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, OverflowError, SafetensorError) as error:
        raise UserError(
            f"The checkpoint {path} cannot be used for this model ({first_line(error)}); "
            "use the model and code that it was made with, or another --output."
        ) from error
    _read(path, WEIGHTS, parameters)
    if states:
        _read(path, OPTIMIZER, states)
    state.scaler.load_state_dict(saved["scaler"])
    vars(state.progress).update(vars(progress))
