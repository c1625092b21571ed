"""Checkpoints: all that an exact resume needs, written so that a kill leaves the old one or the new one, whole.

checkpoints/step-00000123/
    model.safetensors      float32 weights, tied ones once
    optimizer.safetensors  Adam's moments and step counts, by parameter name
    state.json             progress, scaler, random state, settings that a resume must find unchanged
    manifest.json          size and SHA-256 of the files above; written last
"""

from __future__ import annotations

import base64
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cartilha.errors import UserError
from cartilha.storage import file_sha256, new_directory, write_json
from cartilha.training.loop import Progress

log = logging.getLogger("cartilha")

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class TrainingState:
    """The objects that a checkpoint saves and restores in place."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress


def save_checkpoint(run: Path, state: TrainingState, settings: dict[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint of the state after its last step; older ones beyond `keep` are removed afterwards.

    So are later ones: the run has gone on from before them because they are damaged.

    Args:
        run: The run's directory.
        state: What to save.
        settings: What a resume must find unchanged (`check_settings`), and what it goes on with (the dtype).
        keep: Newest checkpoints to keep.
    """
    path = run / "checkpoints" / f"step-{state.progress.step:08d}"
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in state.model.named_parameters()}
    moments = {
        f"{names[parameter]}|{key}": value.detach().cpu().contiguous()
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in state.model.named_parameters()}
    with new_directory(path, replace=True) as temporary:
        save_file(weights, temporary / "model.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        write_json(
            temporary / "state.json",
            {
                "progress": asdict(state.progress),
                "scaler": state.scaler.state_dict(),
                "random": _random_state(),
                "settings": settings,
            },
        )
        sizes = {n: {"size": (temporary / n).stat().st_size, "sha256": file_sha256(temporary / n)} for n in FILES}
        write_json(temporary / "manifest.json", sizes)
    kept = [other for other in list_checkpoints(run) if other <= path][-keep:]
    for other in list_checkpoints(run):
        if other not in kept:
            shutil.rmtree(other)
    return path


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first; unfinished ones (temporary names) are not among them."""
    return sorted((run / "checkpoints").glob("step-????????"))


def newest_name(run: Path) -> str | None:
    """The name of the run's newest checkpoint, unverified; None where there is none."""
    found = list_checkpoints(run)
    return found[-1].name if found else None


def newest_sound_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files have the recorded sizes and hashes; damaged ones are named and passed over."""
    for path in reversed(list_checkpoints(run)):
        fault = _fault(path)
        if fault is None:
            return path
        log.warning("The checkpoint %s is damaged (%s) and is passed over.", path.name, fault)
    return None


def _fault(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name in FILES:
            if (path / name).stat().st_size != manifest[name]["size"]:
                return f"{name} has another size"
            if file_sha256(path / name) != manifest[name]["sha256"]:
                return f"{name} has another hash"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings recorded in a sound checkpoint."""
    settings = json.loads((path / "state.json").read_text(encoding="utf-8"))["settings"]
    assert isinstance(settings, dict)
    return settings


def check_settings(recorded: dict[str, Any], current: dict[str, Any], run: Path) -> None:
    """Refuse to resume with other settings than the run began with.

    Raises:
        UserError: Naming what differs.
    """
    changed = [name for name in current if recorded.get(name) != current[name]]
    if changed:
        differences = "; ".join(f"{name} was {recorded.get(name)}, now {current[name]}" for name in changed)
        raise UserError(
            f"The run {run} cannot go on with other settings ({differences}); use the old ones or another --output."
        )


def load_checkpoint(path: Path, state: TrainingState) -> None:
    """Restore a checkpoint into the state, in place."""
    device = state.model.device
    parameters = dict(state.model.named_parameters())
    weights = load_file(path / "model.safetensors", device=str(device))
    assert weights.keys() == parameters.keys(), "the settings' model matches but its parameters do not"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for joined, value in load_file(path / "optimizer.safetensors").items():
        name, key = joined.rsplit("|", 1)
        # Fused AdamW keeps its step counts beside the parameters.
        state.optimizer.state[parameters[name]][key] = value.to(device)
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    state.scaler.load_state_dict(saved["scaler"])
    for name, value in saved["progress"].items():
        setattr(state.progress, name, value)
    _restore_random_state(saved["random"])


def _random_state() -> dict[str, Any]:
    """States of torch's generators (dropout draws from them), base64."""
    generators = [torch.get_rng_state()]
    if torch.cuda.is_available():
        generators += torch.cuda.get_rng_state_all()
    return {"torch": [base64.b64encode(bytes(g.numpy().tobytes())).decode("ascii") for g in generators]}


def _restore_random_state(saved: dict[str, Any]) -> None:
    states = [torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for text in saved["torch"]]
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) == 1 + torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states[1:])
