"""Rows for new tokens: old rows untouched, spare ones first, means of what they replace, tied where it was tied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
)

from cartilha.errors import UserError
from cartilha.model.embeddings import extend_embeddings, input_rows, model_shape, shape_of
from cartilha.model.head import head_of
from cartilha.model.load import load_model, prepare_model
from cartilha.tokens.tokenizer import byte_tokenizer

CPU = torch.device("cpu")
PIECES = ((1, 2), (3, 4, 5), (1, 2, 6, 7))
ROWS = 48

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "opt": OPTConfig(**SIZES, vocab_size=ROWS, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
    "opt-projected": OPTConfig(
        **SIZES, vocab_size=ROWS, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=ROWS, n_positions=64),
    "smollm": LlamaConfig(**SIZES, vocab_size=ROWS, intermediate_size=64, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SIZES, vocab_size=ROWS, intermediate_size=64, tie_word_embeddings=False),
    "phi-with-a-biased-head": PhiConfig(**SIZES, vocab_size=ROWS, intermediate_size=64),
    "qwen2": Qwen2Config(**SIZES, vocab_size=ROWS, intermediate_size=64, num_key_value_heads=2),
}


def model(name: str):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[name].__class__(**CONFIGS[name].to_dict()), dtype=torch.float32)
    assert isinstance(made, PreTrainedModel)
    return prepare_model(made, name, CPU)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("first_id", [41, 47, 48])
def test_old_rows_stay_spare_rows_come_first_and_the_rest_are_added(name, first_id, tmp_path: Path):
    loaded = model(name)
    inputs, head = input_rows(loaded.model), head_of(loaded.model).weight
    tied = inputs is head
    assert tied == (name not in ("llama3", "phi-with-a-biased-head", "qwen2"))
    bias = head_of(loaded.model).bias
    if bias is not None:
        bias.data.uniform_(-1, 1)
        bias = bias.detach().clone()
    before = inputs.detach().clone(), head.detach().clone()
    extend_embeddings(loaded, PIECES, first_id)
    num_rows = 48 if first_id + 3 <= 48 else 56  # whole tiles of eight
    after = input_rows(loaded.model), head_of(loaded.model).weight
    assert (after[0] is after[1]) == tied
    assert loaded.model.config.vocab_size == num_rows
    for old, new in zip(before, after, strict=True):
        assert new.shape == (num_rows, old.shape[1])
        kept = [i for i in range(ROWS) if not first_id <= i < first_id + 3]
        assert torch.equal(new[kept], old[kept])
        # What stands for no token, below the last tile's end, is like no token in particular.
        for row in new[max(first_id + 3, ROWS) :]:
            torch.testing.assert_close(row, old.mean(dim=0))
    weights = [[1, 1, 1, 1]] * 2 if tied else [[1, 2, 4, 8], [8, 4, 2, 1]]
    for old, new, side in zip(before, after, weights, strict=True):
        for i, ids in enumerate(PIECES):
            w = torch.tensor(side[: len(ids)], dtype=torch.float32)
            torch.testing.assert_close(new[first_id + i], (w / w.sum()) @ old[list(ids)])
    if bias is not None:
        found = head_of(loaded.model).bias
        kept = [i for i in range(ROWS) if not first_id <= i < first_id + 3]
        assert len(found) == num_rows and torch.equal(found[kept], bias[kept])
        for i, ids in enumerate(PIECES):  # as the rows of the head
            w = torch.tensor(weights[1][: len(ids)], dtype=torch.float32)
            torch.testing.assert_close(found[first_id + i], (w / w.sum()) @ bias[list(ids)])
    loaded.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again.get_input_embeddings().weight, after[0])
    assert torch.equal(again.get_output_embeddings().weight, after[1])
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied


def test_a_model_with_fewer_rows_than_its_tokenizer_has_ids_is_refused():
    with pytest.raises(UserError, match="48 rows for a tokenizer of 49 ids"):
        extend_embeddings(model("smollm"), [*PIECES, (1, 48)], 49)


def test_an_unused_token_beyond_the_rows_gets_one_of_its_own():
    loaded = model("smollm")
    old = head_of(loaded.model).weight.detach().clone()
    extend_embeddings(loaded, PIECES, 50)  # 48 and 49 were never in a text
    new = head_of(loaded.model).weight
    assert len(new) == 56 and torch.equal(new[:48], old)
    torch.testing.assert_close(new[48:50], old.mean(dim=0).expand(2, -1))
    torch.testing.assert_close(new[50], old[[1, 2]].mean(dim=0))


def test_the_shape_says_what_a_row_costs():
    tied, untied = shape_of(model("smollm").model), shape_of(model("llama3").model)
    assert (tied.row_parameters, untied.row_parameters) == (32, 64)
    assert untied.num_parameters - tied.num_parameters == ROWS * 32
    for shape, name in ((tied, "smollm"), (untied, "llama3")):
        loaded = model(name)
        extend_embeddings(loaded, PIECES, ROWS)
        assert shape_of(loaded.model).num_parameters == shape.num_parameters + 8 * shape.row_parameters
    # The cost of a token is that of the matrices it goes through: the head counts, looking a row up does not.
    assert tied.relative_cost(ROWS) == pytest.approx(untied.relative_cost(ROWS))
    assert tied.relative_cost(0) == 1


def test_the_shape_of_a_folder_is_read_from_its_config_alone(tmp_path: Path):
    model("qwen2").model.save_pretrained(tmp_path)
    whole = shape_of(load_model(str(tmp_path), CPU).model)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    assert model_shape(str(tmp_path), byte_tokenizer()) == whole
    (tmp_path / "config.json").unlink()
    byte_tokenizer().save(tmp_path)
    assert model_shape(str(tmp_path), byte_tokenizer()) is None
