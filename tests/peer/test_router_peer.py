"""The routers' own loss: packed documents and rows have the total loss and the gradients of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_every_type import gradients
from test_loss_peer import pack, segments_of
from tiny_types import tiny_config, tiny_model
from transformers import PreTrainedModel

from cartilha.blocks.packing import IGNORE_INDEX, Batch
from cartilha.errors import UserError
from cartilha.model.forward import batch_losses, batch_nll
from cartilha.model.load import look_at, prepare_model
from cartilha.model.packed_or_rows import runs_packed
from cartilha.model.recomputation import checkpoint_layers
from cartilha.model.router import router_loss_of
from cartilha.model.weight_gradients import weight_gradients_in_place

FACTOR = 0.37
CPU = torch.device("cpu")
NAMES = {"mixtral": "router_aux_loss_coef", "jetmoe": "aux_loss_coef", "qwen3_next": "router_aux_loss_coef"}


def built(model_type: str, asked: bool = True) -> PreTrainedModel:
    model = tiny_model(model_type)
    model.config.output_router_logits = asked
    setattr(model, NAMES[model_type], FACTOR)
    return model


def loss_of_transformers(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean nll and routers' loss of a padded batch of the documents, in transformers' own words."""
    pieces = [(ids[0], goal[0]) for ids, goal in segments_of(batch) if (goal != IGNORE_INDEX).any()]
    ids, goals, mask = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        for rows, value in (
            ([ids for ids, _ in pieces], 0),
            ([goal for _, goal in pieces], IGNORE_INDEX),
            ([torch.ones_like(ids) for ids, _ in pieces], 0),
        )
    )
    output = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
    nll = F.cross_entropy(output.logits.flatten(0, 1), goals.flatten(), ignore_index=IGNORE_INDEX)
    return nll + FACTOR * output.aux_loss


@pytest.mark.parametrize("model_type", NAMES)
def test_total_loss_and_gradients_are_those_of_transformers(model_type):
    peer, batch = built(model_type), pack([7, 9, 20, 12, 5, 30], block_size=40)  # of which some are cut
    model = prepare_model(copy.deepcopy(peer), model_type, CPU).model
    assert runs_packed(model) == (model_type != "qwen3_next")
    expected = loss_of_transformers(peer, batch)
    nll, of_routers = batch_losses(model, batch, torch.float32)
    assert of_routers is not None and float(of_routers) > 0.1 * FACTOR * batch.num_targets
    torch.testing.assert_close((nll + of_routers) / batch.num_targets, expected, rtol=1e-6, atol=0.0)
    theirs = gradients(peer, expected * batch.num_targets)
    checkpoint_layers(model)
    model.zero_grad()
    with weight_gradients_in_place("cpu", 1.0):  # as training does
        loss = batch_nll(model, batch, torch.float32)
        loss.backward()
    assert float(loss) == float(nll), "the loss that is shown is the text's"
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert (weight.grad - theirs[name]).norm() <= 2e-5 * max(float(theirs[name].norm()), 1e-3 * largest), name


def test_weights_in_half_precision_have_it_too():
    model = prepare_model(built("mixtral").bfloat16(), "mixtral", CPU).model
    found = router_loss_of(model)
    assert found is not None and found.factor == pytest.approx(FACTOR, rel=1e-5)


def test_a_mixture_whose_first_layers_have_no_experts_is_looked_at():
    config = tiny_config("flint")  # two layers without experts, with which transformers cannot compute the loss
    config.output_router_logits = True
    assert look_at(config, "flint").how.packed


def test_a_model_whose_router_mixes_tokens_is_refused():
    config = tiny_config("doge")
    config.is_moe, config.num_experts, config.num_experts_per_tok = True, 16, 2
    with pytest.raises(UserError, match="a position sees what comes after it"):
        look_at(config, "doge")


def test_without_being_asked_for_it_is_left_out():
    model = prepare_model(built("mixtral", asked=False), "mixtral", CPU).model
    assert router_loss_of(model) is None
    assert batch_losses(model, pack([7, 9], block_size=40), torch.float32)[1] is None
