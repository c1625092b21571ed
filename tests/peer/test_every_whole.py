"""Every type that reads more than text: its text is scored as by the whole model, and what is saved is whole again.

`make test-models` tries all types, else a sample is tried. What is found must stand in docs/models.md
(`--write-table`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_every_type import LENGTHS, assert_same, rows_of_table, write_row
from test_loss_peer import pack
from tiny_wholes import IMAGE_ID, WHOLES, tiny_whole
from transformers import PreTrainedModel

from cartilha.errors import UserError
from cartilha.model.configuration import whole_config
from cartilha.model.load import LoadedModel, load_model
from cartilha.model.packed_or_rows import how_it_runs, runs_packed
from cartilha.model.parts import auto_class
from cartilha.training.optimizer import StateSize

SAMPLE = ("aya_vision", "gemma3", "llama4", "qwen3_vl")
TIED_IN_ANY_CASE = ("granite_docling",)  # its head is its embeddings, whatever the whole's configuration says
CPU = torch.device("cpu")
BEYOND = 1.5  # what trained weights are multiplied by


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "whole_type" in metafunc.fixturenames:
        metafunc.parametrize("whole_type", WHOLES if metafunc.config.getoption("--all-types") else SAMPLE)


def bits(path: Path) -> dict[str, Any]:
    """The weights in a file, each as its dtype, shape and bytes."""
    weights = load_file(path / "model.safetensors")
    return {
        name: (w.dtype, w.shape, w.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, w in weights.items()
    }


def built(whole_type: str) -> PreTrainedModel:
    try:
        return tiny_whole(whole_type)
    except Exception as error:
        pytest.skip(f"no tiny model: {str(error)[:100]}")


def changed(loaded: LoadedModel) -> LoadedModel:
    """As if it had been trained."""
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(BEYOND)
    return loaded


def test_its_text_is_scored_as_by_the_whole_and_the_rest_is_saved_to_the_bit(whole_type, tmp_path, request):
    whole = built(whole_type)
    base, saved = tmp_path / "base", tmp_path / "saved"
    torch.nn.Module.to(copy.deepcopy(whole), torch.bfloat16).save_pretrained(base)
    whole = auto_class(whole.config).from_pretrained(base, dtype=torch.float32).eval()
    try:
        loaded = load_model(str(base), CPU)
    except UserError as error:
        how, remark = "refused", str(error).partition("since ")[2].partition(";")[0].partition(" (")[0] or str(error)
    else:
        packed, rest = runs_packed(loaded.model), loaded.others
        how, remark = "packed" if packed else "rows", "beside " + (", ".join(rest["names"]) or "nothing")
        if reason := how_it_runs(loaded.model).reason:
            remark += f"; since {reason}"
        of_whole = {id(weight): name for name, weight in loaded.other_parts.whole.named_parameters()}
        names = {name: of_whole[id(weight)] for name, weight in loaded.model.named_parameters()}
        batch = pack(LENGTHS, block_size=96)
        batch.input_ids[batch.input_ids == IMAGE_ID] = 1  # which stands for no text
        assert_same(loaded.model, whole, batch, names)
        planned = StateSize.planned(whole_config(str(base)))
        assert whole_type in TIED_IN_ANY_CASE or (planned.num_parameters, planned.other_bytes) == (
            loaded.num_parameters,
            rest["bytes"],
        )
        assert_whole_again(base, saved, changed(loaded))
    row = f"| {whole_type} | {how} | {remark} |\n"
    if request.config.getoption("--write-table"):
        write_row(whole_type, row)
    assert rows_of_table()[whole_type] == row, "see --write-table"


def assert_whole_again(base: Path, saved: Path, loaded: LoadedModel) -> None:
    """What is saved has the base's other weights to the bit, and loads as the base did."""
    loaded.save(saved)
    before, after, rest = bits(base), bits(saved), loaded.others
    assert before.keys() == after.keys()
    same = {name for name in before if before[name] == after[name]}
    num_same = sum(before[name][1].numel() for name in same)
    own = {parameter.numel() for parameter in loaded.model.parameters()}
    assert num_same >= rest["num_parameters"], "other parts have changed"
    assert sum(before[name][1].numel() for name in before.keys() - same) >= max(own), "nothing was trained"
    whole, report = auto_class(whole_config(str(base))).from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert whole.dtype == torch.float32, "the trained weights would be rounded when they are loaded"
    ids = torch.arange(1, 9)[None]
    expected = loaded.model(input_ids=ids, use_cache=False).logits if not runs_packed(loaded.model) else None
    if expected is not None:
        torch.testing.assert_close(whole.eval()(input_ids=ids, use_cache=False).logits, expected)
