"""Sums of models, weight by weight: what instruction tuning has added to a base is added to a trained one.

trained + (instruct - base), as in "chat vectors" (arXiv:2310.04799) and arXiv:2410.10739. Tensors are read one by one,
so that memory holds one shard of the result, whatever the models' size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from cartilha.errors import UserError, first_line
from cartilha.model.shards import weight_files
from cartilha.storage import refuse_lfs_pointer, write_json

SHARD_BYTES = 2 * 2**30
TIED_HEAD = "lm_head.weight"  # which some files hold a second time beside the embeddings


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a model; nothing is read until asked."""

    reference: str  # the MODEL, for messages
    folder: Path

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by its name in the files."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, as the file has it."""
        found: torch.Tensor = self._files[name].get_tensor(name)
        return found

    @cached_property
    def _files(self) -> dict[str, Any]:
        """The open file of each tensor."""
        found: dict[str, Any] = {}
        for path in weight_files(self.folder) or [self.folder / SAFE_WEIGHTS_NAME]:
            if not path.is_file():
                raise UserError(f"{self.reference} has no {path.name}; weights are added from safetensors files alone.")
            refuse_lfs_pointer(path)
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path.name} of {self.reference} cannot be read ({first_line(error)}); fetch it again."
                ) from error
            found |= dict.fromkeys(file.keys(), file)
        return found


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
) -> Callable[[str], torch.Tensor]:
    """A function that computes a weight of the sum, given by name, in float32.

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

    return sum_of


def write_weights(
    shapes: Mapping[str, tuple[int, ...]], compute: Callable[[str], torch.Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Write weights, computed one after another, as transformers reads them: one file, or shards and an index."""
    sizes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: compute(name).to(dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
