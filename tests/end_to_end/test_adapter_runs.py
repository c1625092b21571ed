"""`--lora`: the base stays as it is, a resume is exact, and the adapter's directory is a model like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import Left, assert_same_run, start, terminate
from safetensors.torch import load_file

from cartilha.config import PlanConfig, PushConfig
from cartilha.errors import InterruptedRunError, UserError
from cartilha.model.load import load_model, weights_hash
from cartilha.pipeline import train as train_module
from cartilha.pipeline.plan import plan
from cartilha.pipeline.preflight import preflight
from cartilha.runs import setup

pytest.importorskip("peft", reason="needs peft (extra adapters)")

LORA = {"lora": 4, "epochs": 1}


class LeftAdapter(Left):
    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adapted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> LeftAdapter:
    """A run of one epoch; its base is hashed when the adapter is saved."""
    path, hashes = tmp_path_factory.mktemp("adapted") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        save = train_module.save_model

        def note(loaded, folder, dtype):
            base = {n: p for n, p in loaded.model.named_parameters() if "lora_" not in n}
            hashes.append(weights_hash(Renamed(base)))
            save(loaded, folder, dtype)

        patch.setattr(train_module, "save_model", note)
        start(store, path, **LORA)
    plain = load_model("random:tiny", torch.device("cpu")).model
    assert hashes == [weights_hash(plain)], "the base has moved"
    return LeftAdapter(path)


class Renamed:
    """Parameters under the names that they have without an adapter."""

    def __init__(self, parameters) -> None:
        self._parameters = parameters

    def named_parameters(self):
        return [(name.replace(".base_layer", ""), value) for name, value in self._parameters.items()]


def test_an_adapter_learns_and_is_taken_as_a_model(adapted, store, cartilha):
    before, after = adapted.results["evaluations"]
    assert after["bits_per_byte"] < before["bits_per_byte"] - 0.01
    settings = adapted.results["settings"]
    assert settings["num_trained"] == sum(tensor.numel() for tensor in adapted.weights.values()) < 20_000
    assert not (adapted.path / "model" / "model.safetensors").exists()
    for reference in (adapted.path, adapted.path / "model"):
        out = cartilha("evaluate", "--model", reference, "--store", store, "--dtype", "float32", "--json").out
        assert json.loads(out)["models"][0]["bits_per_byte"] == pytest.approx(after["bits_per_byte"], abs=1e-6)
    card = (adapted.path / "model" / "README.md").read_text()
    assert "library_name: peft" in card and "LoRA adapter of rank 4" in card and "adaptador LoRA de posto 4" in card
    assert cartilha("generate", "--model", adapted.path, "--prompt", "Texto", "--max_new_tokens", 3).code == 0
    assert cartilha("report", adapted.path, "--output", adapted.path.parent / "report.html").code == 0


def test_a_resumed_adapter_is_the_unbroken_one(adapted, store, tmp_path, during_step):
    during_step({2: terminate})
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run", **LORA)
    with pytest.raises(UserError, match="lora was 4, now 5"):
        start(store, tmp_path / "run", resume="auto", epochs=1, lora=5)
    start(store, tmp_path / "run", resume="auto", **LORA)
    assert_same_run(LeftAdapter(tmp_path / "run"), adapted)
    (checkpoint, *_) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (checkpoint / "model.safetensors").stat().st_size < 100_000, "the base is in the checkpoint"


def test_a_base_in_bfloat16_is_trained_where_the_machine_prefers_float32(store, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "choose_dtype", lambda name, device: torch.float32)
    results = start(store, tmp_path / "run", max_steps=2, lora=4, lora_base="bfloat16", dtype="auto")
    assert results["settings"]["dtype"] == "bfloat16"
    assert {row["step"] for row in LeftAdapter(tmp_path / "run").lines("samples.jsonl")} == {0, 2}
    before, after = results["evaluations"]
    assert after["loss"] < before["loss"]


def test_training_goes_on_from_an_adapter(adapted, store, tmp_path):
    results = start(store, tmp_path / "run", model=str(adapted.path / "model"), max_steps=1, lora=2)
    first, last = results["evaluations"][0], adapted.results["evaluations"][-1]
    assert first["bits_per_byte"] == pytest.approx(last["bits_per_byte"], abs=1e-6)
    merged = load_model(str(tmp_path / "run"), torch.device("cpu"))
    assert merged.num_parameters == load_model("random:tiny", torch.device("cpu")).num_parameters


def test_a_plan_counts_an_adapter(adapted):
    """Frozen weights have no gradients and no states; the whole of it is compared with the run's own plan."""
    asked = PlanConfig(model="random:tiny", device=("t4",), block_size=32, batch_tokens=32, skip_probe=True, lora=4)
    planned = plan(asked).to_dict()
    settings, recorded = adapted.results["settings"], json.loads((adapted.path / "plan.json").read_text())
    trained, frozen = settings["num_trained"], settings["num_parameters"] - settings["num_trained"]
    assert planned["num_trained"] == trained and planned["num_parameters"] == recorded["num_parameters"]
    assert planned["state_bytes"] == 4 * frozen + 12 * trained
    for memory in (planned["rows"][0]["memory"], recorded["memory"]):
        assert memory["weights"] == 4 * (frozen + trained) and memory["gradients"] <= 4 * trained
        assert memory["optimizer_states"] == 4 * trained


def test_what_cannot_be_is_said_in_a_sentence(adapted, store, tmp_path, refused, monkeypatch):
    run = ["train", "--model", "random:tiny", "--store", store, "--output", tmp_path / "run"]
    assert "give its rank with --lora" in refused(*run, "--lora_base", "bfloat16")
    assert "add --lora_embeddings" in refused(*run, "--lora", 4, "--embeddings_first", "5%")
    assert "leave out --dtype float32" in refused(*run, "--lora", 4, "--lora_base", "bfloat16", "--dtype", "float32")
    assert "extra `quantization`" in refused(*run, "--lora", 4, "--lora_base", "4bit")
    monkeypatch.setattr("cartilha.pipeline.preflight.find_spec", lambda module: None)
    assert "extra `adapters`" in refused(*run, "--lora", 4)
    monkeypatch.setattr("cartilha.pipeline.preflight.find_spec", lambda module: True)
    assert "needs an NVIDIA GPU" in refused(*run, "--lora", 4, "--lora_base", "4bit", "--device", "cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"adapter of random:tiny.*cartilha merge"):
        preflight(PushConfig(run=str(adapted.path), name="ana/pt"))
