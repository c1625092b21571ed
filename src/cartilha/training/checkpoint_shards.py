"""The files of a sharded model's checkpoint: each process writes its part of every tensor.

torch.distributed.checkpoint writes and reads them as safetensors, so that nothing is unpickled, and any number of
processes, one among them, reads what any other number wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from cartilha.machine.processes import gather_objects, on_rank_0, world
from cartilha.storage import file_sha256, new_directory

OF_WEIGHTS, OF_STATES = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@contextmanager
def shared_directory(path: Path) -> Iterator[Path]:
    """`new_directory` for all processes, which must see the same disk; the first one makes and renames it."""
    with ExitStack() as stack:
        yield on_rank_0(lambda: stack.enter_context(new_directory(path, replace=True)))


def write_shards(folder: Path, weights: dict[str, Tensor], states: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write this process's part of all tensors, while the others write theirs; sizes and hashes of all files by name.

    An OSError, in every process, says that one of them could not write.
    """
    places = {**dict.fromkeys(weights, 1), **dict.fromkeys(states, 2)}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=places, save_distributed=True)
    try:
        save({**weights, **states}, storage_writer=writer)
    except CheckpointException as error:
        for fault, _ in error.failures.values():
            if isinstance(fault, OSError):
                raise OSError(fault.errno, fault.strerror, str(folder)) from error
        raise
    own = sorted(folder.glob(f"shard-{world()[0] + 1:05d}-*"))
    sums = {file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)} for file in own}
    return {name: known for share in gather_objects(sums) for name, known in share.items()}


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint was written in parts."""
    return any(folder.glob(f"shard-*-{OF_WEIGHTS}"))


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors by name, in place, from a checkpoint that was written whole or in parts.

    If they are shared out over the processes, all of these read together, each its own part.
    """
    together = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
        found = {name: tensor.detach() for name, tensor in tensors.items()}
        load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not together)


def check_shards(folder: Path, shapes: dict[str, tuple[int, ...]], *, of_states: bool) -> None:
    """Compare the parts of the weights, or of the states, with the expected shapes, all float32; no tensor is read.

    A ValueError names a tensor that is unknown, missing, incomplete, or of another shape or type.
    """
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    known: dict[str, Any] = {name: item for name, item in metadata.items() if ("|" in name) == of_states}
    for name in [*sorted(known.keys() - shapes.keys()), *sorted(shapes.keys() - known.keys())]:
        raise ValueError(f"{name} is {'unknown' if name in known else 'missing'} in {folder.name}")
    for name, shape in sorted(shapes.items()):
        item = known[name]
        if tuple(item.size) != shape or item.properties.dtype != torch.float32:
            raise ValueError(f"{name} is {item.properties.dtype} {list(item.size)}, not float32 {list(shape)}")
        if sum(prod(chunk.sizes) for chunk in item.chunks) != prod(shape):
            raise ValueError(f"a part of {name} is missing")
