"""Every causal type of the installed transformers: how it runs, and its figures beside transformers' own.

A tiny model of each type, with short windows and weights that matter, is given documents side by side. Its nll and
gradients must be those of transformers on each document alone. What is found must stand in docs/models.md.
`make test-models` tries all types (some minutes), else a sample of all kinds is tried. `--write-table` writes them.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import state_kernels
import torch
import torch.nn.functional as F
from test_loss_peer import nll_alone, pack, segments_of
from tiny_types import CONTEXT, TYPES, WINDOW, tiny_model
from transformers import PreTrainedModel

from cartilha.blocks.packing import Batch
from cartilha.errors import UserError
from cartilha.model import forward
from cartilha.model.attention import FALLBACK
from cartilha.model.boundaries import TOLD_TYPES
from cartilha.model.forward import batch_nll, scored_tokens
from cartilha.model.head import head_of
from cartilha.model.load import prepare_model
from cartilha.model.packed_or_rows import PROVABLE_TYPES, how_it_runs, prove, runs_packed

SAMPLE = ("bloom", "cohere", "deepseek_v3", "gemma2", "gpt_neo", "gpt_oss", "lfm2", "mamba", "mamba2", "mixtral",
          "olmo3", "qwen3_next")  # fmt: skip
LENGTHS = [7, 1, 60, 20, 2, 90, 12, 5, 40]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
RULE = "|---|---|---|\n"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        metafunc.parametrize("model_type", TYPES if metafunc.config.getoption("--all-types") else SAMPLE)


def rows_of_table() -> dict[str, str]:
    """The lines of the table by their type."""
    lines = PAGE.read_text(encoding="utf-8").partition(RULE)[2].splitlines(keepends=True)
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


def write_row(name: str, row: str) -> None:
    """Put a type's line into the table, which ends the page."""
    rows = {**rows_of_table(), name: row}
    head = PAGE.read_text(encoding="utf-8").partition(RULE)[0]
    PAGE.write_text(head + RULE + "".join(rows[name] for name in sorted(rows)), encoding="utf-8")


def built(model_type: str) -> PreTrainedModel:
    try:
        return tiny_model(model_type)
    except Exception as error:
        pytest.skip(f"no tiny model: {str(error)[:100]}")


def remarks(model: PreTrainedModel) -> str:
    """What is special about a type's head and attention."""
    head, how = head_of(model), how_it_runs(model)
    shape = head.shape
    named = {
        "bias in the head": head.bias is not None,
        "scaled head": (shape.scale, shape.input_scale) != (1.0, 1.0),
        "soft cap on the logits": shape.cap is not None,
        **dict.fromkeys(sorted(how.needs), True),
        f"since {how.reason}": how.reason is not None,
    }
    return "; ".join(name for name, holds in named.items() if holds)


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(
    model: PreTrainedModel, peer: PreTrainedModel, batch: Batch, names: dict[str, str] | None = None
) -> None:
    """Nll and gradients of packed documents are those of each alone under transformers' own code.

    `names` are those of the model's parameters in the peer, if they differ.
    """
    expected = nll_alone(peer, batch)
    assert expected.std() > 0.03, "weights that predict nothing would prove nothing"
    found = scored_tokens(model, batch, torch.float32).nll
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert float(found.double().sum() / expected.double().sum()) == pytest.approx(1, abs=1e-6)
    pieces = [(peer(input_ids=ids, use_cache=False).logits[0], goal[0]) for ids, goal in segments_of(batch)]
    losses = [F.cross_entropy(logits, goal, reduction="sum", ignore_index=-100) for logits, goal in pieces]
    theirs = gradients(peer, torch.stack(losses).sum())
    found = gradients(model, batch_nll(model, batch, torch.float32))
    ours = {(names or {}).get(name, name): gradient for name, gradient in found.items()}
    whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 2e-5 * torch.maximum(gradient.norm(), 1e-3 * whole), name


def test_it_runs_as_the_table_says_with_the_figures_of_transformers(model_type, monkeypatch, request):
    peer = built(model_type)
    model = copy.deepcopy(peer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare_model(model, model_type, torch.device("cpu"))
    except UserError as error:
        how, remark = "refused", str(error).partition("since ")[2].partition(";")[0]
    else:
        how, remark = "packed" if runs_packed(model) else "rows", remarks(model)
        batch = pack(LENGTHS, block_size=96)
        assert max(batch.segment_lengths) > 10 * WINDOW and CONTEXT >= 96
        assert_same(model, peer, batch)
        if runs_packed(model):
            monkeypatch.setattr(forward, "choose_kernel", lambda *hardware: FALLBACK)
            assert_same(model, peer, batch)
        elif model_type in TOLD_TYPES:
            state_kernels.install(monkeypatch, peer)
            told = prepare_model(copy.deepcopy(peer), model_type, torch.device("cpu")).model
            assert runs_packed(told)
            assert_same(told, peer, batch)
            how = "rows, or packed"
        elif model_type not in PROVABLE_TYPES:
            assert not prove(built(model_type)).packed, "its proof holds: it belongs into PROVABLE_TYPES"
    row = f"| {model_type} | {how} | {remark} |\n"
    if request.config.getoption("--write-table"):
        write_row(model_type, row)
    assert rows_of_table()[model_type] == row, "see --write-table"
