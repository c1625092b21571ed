"""Sums of models, weight by weight: what instruction tuning has added to a base is added to a trained one.

trained + (instruct - base), as in "chat vectors" (arXiv:2310.04799) and arXiv:2410.10739. Tensors are read one by one,
so that memory holds one shard of the result, whatever the models' size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cartilha.errors import UserError, first_line
from cartilha.storage import read_json, refuse_lfs_pointer, write_json

SHARD_BYTES = 2 * 2**30
WEIGHTS = "model.safetensors"
TIED_HEAD = "lm_head.weight"  # which some files hold a second time beside the embeddings


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a model, in one file or in shards that an index lists; nothing is read until asked."""

    reference: str  # the MODEL, for messages
    folder: Path

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by its name in the files."""
        return {name: tuple(self._file(name).get_slice(name).get_shape()) for name in self._places}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, as the file has it."""
        found: torch.Tensor = self._file(name).get_tensor(name)
        return found

    def _file(self, name: str) -> Any:
        return self._open[self._places[name]]

    @cached_property
    def _places(self) -> dict[str, str]:
        index = self.folder / f"{WEIGHTS}.index.json"
        if index.is_file():
            return dict(read_json(index)["weight_map"])
        return dict.fromkeys(self._open[WEIGHTS].keys(), WEIGHTS) if (self.folder / WEIGHTS).is_file() else {}

    @cached_property
    def _open(self) -> dict[str, Any]:
        index = self.folder / f"{WEIGHTS}.index.json"
        names = set(read_json(index)["weight_map"].values()) if index.is_file() else {WEIGHTS}
        files = {}
        for name in sorted(names):
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"{self.reference} has no {name}; weights are added from safetensors files alone.")
            refuse_lfs_pointer(path)
            try:
                files[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{name} of {self.reference} cannot be read ({first_line(error)}); fetch it again."
                ) from error
        return files


def check_alike(trained: WeightFiles, base: WeightFiles, instruct: WeightFiles) -> None:
    """Refuse, with a UserError, weights of other names or shapes; the trained model may have more rows."""
    for other in (base, instruct):
        for name in sorted(trained.shapes.keys() ^ other.shapes.keys() - {TIED_HEAD}):
            lacking = other if name in trained.shapes else trained
            raise UserError(
                f"{lacking.reference} has no weight {name}, so the models cannot be added; name models of one family."
            )
    for name, shape in trained.shapes.items():
        for other in (base, instruct):
            found = other.shapes.get(name, shape)
            if found[1:] != shape[1:] or found[:1] > shape[:1] or found != base.shapes.get(name, found):
                raise UserError(
                    f"{name} is {list(found)} in {other.reference} and {list(shape)} in {trained.reference}, so the "
                    "models cannot be added; name models of one family."
                )


def added(
    trained: WeightFiles, base: WeightFiles, instruct: WeightFiles, num_rows: int, num_ids: int
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """The name of each weight of the sum, and a function that computes it in float32.

    The base has `num_rows` rows of embeddings and head, of which its tokenizer has `num_ids`: the rows beyond these are
    the trained model's own.
    """

    def sum_of(name: str) -> torch.Tensor:
        result = trained.tensor(name).float()
        if name in base.shapes and name in instruct.shapes:
            difference = instruct.tensor(name).float() - base.tensor(name).float()
            end = min(num_ids, num_rows) if len(difference) == num_rows else len(difference)
            result[:end] += difference[:end]
        return result

    for name in trained.shapes:
        yield name, partial(sum_of, name)


def write_weights(weights: Iterator[tuple[str, Callable[[], torch.Tensor]]], folder: Path, dtype: torch.dtype) -> None:
    """Write weights, computed one after another, as transformers reads them: one file, or shards and an index."""
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}

    def close() -> None:
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    total = 0
    for name, compute in weights:
        tensor = compute().to(dtype).contiguous()
        total += tensor.nbytes
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > SHARD_BYTES:
            close()
        held[name] = tensor
    close()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / WEIGHTS)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        places |= dict.fromkeys(names, file)
    write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {"total_size": total}, "weight_map": places})
