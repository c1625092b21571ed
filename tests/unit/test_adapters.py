"""Adapters: the gradients of peft and transformers, frozen weights, and merged weights that say the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from cartilha.blocks.packing import Batch, PackedStream, stack
from cartilha.errors import UserError
from cartilha.model import adapters, load, weight_gradients
from cartilha.model.adapters import Adapter, add_adapter, frozen_size, save_adapter, trained_parameters
from cartilha.model.configuration import model_config
from cartilha.model.forward import batch_nll
from cartilha.model.load import LoadedModel, load_model, load_with_adapter, weights_hash, with_adapter
from cartilha.model.recomputation import checkpoint_layers
from cartilha.model.weight_gradients import weight_gradients_in_place
from cartilha.tokens.packed import PackedDocuments
from cartilha.training.optimizer import StateSize, resolve_lr
from cartilha.training.state import TrainingState
from small_models import NUM_IDS, tiny

peft: Any = pytest.importorskip("peft", reason="needs peft (extra adapters)")

LENGTH = 24
TYPES = ("llama", "gpt2", "opt", "gpt_neox")


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    """With adapters that are not zero any more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05, generator=generator)
    return model


def batch() -> Batch:
    """One document in one row: what transformers reads, too."""
    ids = np.random.default_rng(0).integers(4, NUM_IDS, LENGTH - 1)
    return stack([PackedStream(PackedDocuments.from_ids([ids], prefix_id=2, end_id=3), LENGTH).block(0)])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed twice"])
@pytest.mark.parametrize("embeddings", [False, True], ids=["frozen", "embeddings"])
@pytest.mark.parametrize("name", TYPES)
def test_loss_and_gradients_are_those_of_peft_and_transformers(name, embeddings, checkpointing, monkeypatch):
    own = tiny(name)
    add_adapter(own, Adapter(3, embeddings))
    disturbed(own)
    if checkpointing:
        checkpoint_layers(own)
    in_place: list[int] = []
    plain = weight_gradients.add_product
    monkeypatch.setattr(weight_gradients, "add_product", lambda *factors: (in_place.append(1), plain(*factors))[1])
    with weight_gradients_in_place("cpu", 0.5):
        nll = batch_nll(own, batch(), torch.float32)
    (nll * 0.5).backward()
    settings = peft.LoraConfig(r=3, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = disturbed(peft.get_peft_model(tiny(name, packed=False), settings))
    if embeddings:
        for layer in (theirs.get_input_embeddings(), theirs.get_output_embeddings()):
            layer.requires_grad_(True)
    ids = torch.from_numpy(batch().input_ids)
    logits, targets = theirs(input_ids=ids).logits, torch.from_numpy(batch().targets)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    (expected * 0.5).backward()
    torch.testing.assert_close(nll.detach(), expected.detach(), rtol=1e-6, atol=0)
    gradients = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained_parameters(own).keys() and len(in_place) >= 2 * 4
    for key, parameter in own.named_parameters():
        if key not in gradients:
            assert parameter.grad is None, key
        else:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-6)


def tiny_loaded(adapter: Adapter) -> LoadedModel:
    loaded = with_adapter(load_model("random:tiny", torch.device("cpu")), adapter, seed=0)
    disturbed(loaded.model)
    if adapter.embeddings:
        with torch.no_grad():
            loaded.model.get_input_embeddings().weight.mul_(1.25)
    return loaded


@pytest.mark.parametrize("embeddings", [False, True], ids=["frozen", "embeddings"])
def test_a_saved_adapter_is_read_by_us_and_by_peft_to_the_same_figures(embeddings, tmp_path):
    loaded = tiny_loaded(Adapter(4, embeddings))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = load_plainly(loaded.model)(input_ids=ids).logits
        assert loaded.base_hash is not None
        save_adapter(loaded.model, loaded.reference, loaded.base_hash, tmp_path, torch.float32)
        merged = load_model(str(tmp_path), torch.device("cpu")).model
        assert not [name for name, _ in merged.named_parameters() if "lora_" in name]
        torch.testing.assert_close(load_plainly(merged)(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        base = load_plainly(load_model("random:tiny", torch.device("cpu")).model)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        other = base if embeddings else load_plainly(load_model("random:tiny", torch.device("cpu")).model)
        assert (other(input_ids=ids).logits - expected).abs().max() > 0.05 or embeddings, "an adapter that does nothing"


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_base_in_half_precision_is_read_without_a_float32_copy_where_its_files_have_none(
    stored, tmp_path, monkeypatch
):
    AutoModelForCausalLM.from_config(model_config("random:tiny"), dtype=stored).save_pretrained(tmp_path)
    read, asked = load.read_model, []
    monkeypatch.setattr(load, "read_model", lambda *how: (asked.append(how[-1]), read(*how))[1])
    adapted = load_with_adapter(str(tmp_path), torch.device("cpu"), Adapter(4, base="bfloat16"))
    assert asked == [stored]
    for name, parameter in adapted.model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if "base_layer.weight" in name else torch.float32), name
    assert adapted.base_hash == weights_hash(load_model(str(tmp_path), torch.device("cpu")).model)


def load_plainly(model: PreTrainedModel) -> PreTrainedModel:
    """The model with transformers' own attention."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return plain


def test_an_adapter_of_another_base_is_refused(tmp_path, monkeypatch):
    loaded = tiny_loaded(Adapter(4))
    assert loaded.base_hash is not None
    save_adapter(loaded.model, loaded.reference, loaded.base_hash, tmp_path, torch.float32)
    with pytest.raises(UserError, match=r"does not belong to .* \(its base had other weights\)"):
        load_model(str(tmp_path), torch.device("cpu"), seed=1)  # fresh weights of another seed
    config = tmp_path / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace("random:tiny", "random:tiny-opt"))
    with pytest.raises(UserError, match="does not belong to"):
        load_model(str(tmp_path), torch.device("cpu"))
    for base, sentence in (("", "names no base model"), (str(tmp_path), "names itself"), ("./nowhere", "no directory")):
        config.write_text(text.replace("random:tiny", base))
        with pytest.raises(UserError, match=sentence):
            load_model(str(tmp_path), torch.device("cpu"))
    config.write_text(text)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="does not belong to"):
        load_model(str(tmp_path), torch.device("cpu"))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_model(str(tmp_path), torch.device("cpu"))


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_what_is_planned_is_what_an_adapter_takes(base):
    adapter = Adapter(4, base=base)
    config = model_config("random:tiny")
    loaded = tiny_loaded(adapter)
    planned = StateSize.planned(config, "adamw", adapter)
    assert planned == StateSize.of(loaded.model)
    state = TrainingState.begin(loaded.model, torch.bfloat16, lr=1e-3, weight_decay=0.1)
    states = [t for of in state.optimizer.state.values() for t in of.values() if t.dim()]
    assert planned.optimizer_bytes == sum(tensor.nbytes for tensor in states)
    assert planned.weight_bytes == sum(parameter.nbytes for parameter in loaded.model.parameters())
    assert planned.gradient_bytes == sum(parameter.nbytes for parameter in trained_parameters(loaded.model).values())
    assert loaded.num_parameters == planned.num_parameters == sum(p.numel() for p in loaded.model.parameters())


def test_a_base_of_4_bits_takes_little_more_than_half_a_byte():
    sizes = {base: StateSize.planned(model_config("random:tiny"), "adamw", Adapter(4, base=base))
             for base in ("float32", "4bit")}  # fmt: skip
    linear = sum(p.numel() for n, p in load_model("random:tiny", torch.device("cpu")).model.named_parameters()
                 if "proj" in n)  # fmt: skip
    saved = sizes["float32"].frozen_bytes - sizes["4bit"].frozen_bytes
    assert saved == pytest.approx((4 - 0.516) * linear, rel=1e-3)
    assert replace(sizes["4bit"], frozen_bytes=0) == replace(sizes["float32"], frozen_bytes=0)


def test_a_base_of_4_bits_is_made_of_bitsandbytes_layers(monkeypatch):
    """Stand-ins with the interface of bitsandbytes, whose own layers compute on CUDA."""

    class Params4bit(torch.nn.Parameter):
        def __new__(cls, data: torch.Tensor, requires_grad: bool, quant_type: str, compress_statistics: bool) -> Any:
            assert data.dtype == torch.bfloat16 and quant_type == "nf4" and compress_statistics
            return torch.nn.Parameter.__new__(cls, data, requires_grad)

    class Linear4bit(torch.nn.Linear):
        def __init__(self, size: int, out: int, *, compute_dtype: torch.dtype, **options: Any) -> None:
            super().__init__(size, out, bias=options["bias"])
            assert compute_dtype == torch.bfloat16

    stand_in = SimpleNamespace(nn=SimpleNamespace(Params4bit=Params4bit, Linear4bit=Linear4bit))
    extra = adapters.import_extra
    monkeypatch.setattr(adapters, "import_extra", lambda *of: stand_in if of[0] == "bitsandbytes" else extra(*of))
    own, plain = tiny("opt", packed=False), dict(tiny("opt").named_parameters())
    add_adapter(own, Adapter(3, base="4bit"))
    layers = {name: module for name, module in own.named_modules() if name.endswith("base_layer")}
    assert len(layers) == 2 * 6 + 2
    for name, layer in layers.items():
        before = name.removesuffix(".base_layer")
        assert type(layer) is Linear4bit and torch.equal(layer.weight, plain[f"{before}.weight"].bfloat16())
        assert (layer.bias is None) == (f"{before}.bias" not in plain)
    others = [p for name, p in own.named_parameters() if "base_layer.weight" not in name]
    assert {parameter.dtype for parameter in others} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert own(torch.arange(9)[None]).logits.isfinite().all()
    with pytest.raises(UserError, match="linear layers cannot be kept in 4 bits; use --lora_base bfloat16"):
        add_adapter(tiny("gpt2", packed=False), Adapter(3, base="4bit"))


def test_frozen_weights_in_half_precision_compute_as_rounded_ones_do():
    exact, half = (tiny_loaded(Adapter(4, base=base)) for base in ("float32", "bfloat16"))
    assert frozen_size(half.model)[1] < 0.7 * frozen_size(exact.model)[1]
    with torch.no_grad():
        rounded = copy.deepcopy(exact.model)
        for name, parameter in rounded.named_parameters():
            if "base_layer" in name:
                parameter.copy_(parameter.bfloat16())
    found, expected = [], []
    for model, kept in ((half.model, found), (rounded, expected)):
        with weight_gradients_in_place("cpu", 1.0):
            nll = batch_nll(model, batch(), torch.bfloat16)
        nll.backward()
        kept += [nll.detach(), *(parameter.grad for parameter in trained_parameters(model).values())]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_rate_of_an_adapter_is_ten_times_that_of_all_weights():
    assert resolve_lr("auto", 500_000_000, of_adapter=True) == 10 * resolve_lr("auto", 500_000_000)
    assert resolve_lr("auto", 1000, of_adapter=True) == 3e-3 and resolve_lr(0.1, 1000, of_adapter=True) == 0.1


def test_the_base_keeps_its_hash_whatever_is_added():
    plain = load_model("random:tiny", torch.device("cpu")).model
    assert tiny_loaded(Adapter(4)).base_hash == weights_hash(plain)
