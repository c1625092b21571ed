"""`plan` from the command line, and the plan that a run keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from transformers import AutoConfig

import cartilha.pipeline.train as train_module
from cartilha.config import PLANNED_DEVICES, GenerateConfig, PlanConfig, TrainConfig
from cartilha.errors import UserError
from cartilha.model.attention import KERNELS
from cartilha.pipeline.expectation import expect
from cartilha.pipeline.plan import PlanResult
from cartilha.pipeline.train import train
from cartilha.runs.setup import assemble
from cartilha.runs.step_plan import CPU_SHARE, StepShape, plan_run
from cartilha.terminal.results import show
from cartilha.training.checkpoint import space_needed
from cartilha.training.device_facts import KNOWN_DEVICES
from cartilha.training.memory import SAFETY, MemoryModel
from cartilha.training.optimizer import StateSize

ROW_KEYS = {"device", "block_size", "micro_batch_size", "memory_bytes", "fits", "tokens_per_second", "estimated"}
ROW_KEYS |= {"mfu", "mfu_without_attention"}
TINY = ["--model", "random:tiny"]


def planned(cartilha, *arguments: object) -> dict:
    outcome = cartilha("plan", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_a_plan_has_a_row_for_each_device_block_size_and_micro_batch(cartilha, store):
    asked = ["--price_per_hour", 2, "--skip_probe", "--epochs", 3, "--optimizer", "adamw"]
    result = planned(cartilha, *TINY, "--store", store, *asked)
    rows = result["rows"]
    assert all(row.keys() >= ROW_KEYS for row in rows)
    places = {(row["device"], row["block_size"], row["micro_batch_size"]) for row in rows}
    devices = {"this machine", "cpu", "t4", "l4", "a100-40gb", "a100-80gb", "h100"}
    assert len(places) == len(rows) == 7 * 3 * 6  # 2048 is beyond its context
    assert {device for device, _, _ in places} == devices
    assert all(row["fits"] and row["estimated"] and row["tokens_per_second"] > 0 for row in rows)
    for row in rows:
        parts = {
            "weights",
            "gradients",
            "optimizer_states",
            "activations",
            "logits_chunk",
            "gathered",
            "overhead",
            "checkpoint_copy",
            "other_parts",
        }
        assert row["memory"].keys() == parts and sum(row["memory"].values()) == row["memory_bytes"]
        on_host = row["device"] in ("cpu", "this machine")  # a card's copy is in the host's memory
        assert row["memory"]["checkpoint_copy"] == (result["checkpoint_bytes"] if on_host else 0)
        hours = result["train_tokens"] / row["tokens_per_second"] / 3600
        assert row["hours"] == pytest.approx(hours) and row["price"] == pytest.approx(2 * hours)
        assert row["seconds_per_epoch"] == pytest.approx(3600 * hours / 3)
    assert result["state_bytes"] == 16 * result["num_parameters"]
    size = StateSize(result["num_parameters"], "adamw", 8 * result["num_parameters"])
    assert result["disk_bytes"] == space_needed(size)[0] > 52 * result["num_parameters"]
    assert {(row["device"], row["block_size"]) for row in result["recommended"]} == {place[:2] for place in places}
    assert "a100-80gb" in PlanResult(result)._repr_html_()  # a notebook shows the same record


def test_a_plan_takes_the_optimizer_that_suits_each_devices_steps(cartilha):
    result = planned(cartilha, *TINY, "--device", "cpu", "t4", "--block_size", 256, "--skip_probe", "--memory", "full")
    assert {row["device"]: round(row["bytes_per_parameter"]) for row in result["profiles"]} == {"cpu": 12, "t4": 16}
    assert result["optimizer"] == "adamw" and result["state_bytes"] == 16 * result["num_parameters"]  # the larger ones
    named = {device["device"]: (device["optimizer"], device["state_bytes"]) for device in result["devices"]}
    for profile in result["profiles"]:  # as the rows have it
        asked = profile["device"], profile["micro_batch_size"]
        rows = {(row["device"], row["micro_batch_size"]): row["memory_bytes"] for row in result["rows"]}
        assert rows[asked] == profile["memory_bytes"]
    assert named["cpu"] == ("rmsprop", 12 * result["num_parameters"]) and named["t4"][0] == "adamw"


def test_large_blocks_make_large_steps_which_take_adamw(cartilha, tmp_path):
    shape = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    AutoConfig.for_model("llama", num_attention_heads=2, max_position_embeddings=2048, **shape).save_pretrained(
        tmp_path
    )
    result = planned(cartilha, "--model", tmp_path, "--device", "cpu", "--skip_probe")
    states = {row["block_size"]: row["memory"]["optimizer_states"] / result["num_parameters"] for row in result["rows"]}
    assert states == {256: 4, 512: 4, 1024: 4, 2048: 8}
    alone = planned(cartilha, "--model", tmp_path, "--device", "cpu", "--skip_probe", "--block_size", 2048)
    assert alone["rows"] == [row for row in result["rows"] if row["block_size"] == 2048]


@pytest.mark.parametrize("optimizer", ["rmsprop", "muon", "adafactor"])
def test_an_optimizer_with_fewer_states_takes_less_memory_and_smaller_checkpoints(cartilha, optimizer):
    arguments = [*TINY, "--device", "t4", "cpu", "--block_size", 256, "--skip_probe"]
    adamw, other = (planned(cartilha, *arguments, "--optimizer", name) for name in ("adamw", optimizer))
    saved = adamw["state_bytes"] - other["state_bytes"]
    assert 0 < saved == adamw["checkpoint_bytes"] - other["checkpoint_bytes"]
    for row, less in zip(adamw["rows"], other["rows"], strict=True):
        assert row["memory"]["optimizer_states"] - less["memory"]["optimizer_states"] == saved
        assert row["memory_bytes"] - less["memory_bytes"] >= saved


def test_tokens_per_step_follow_the_device_unless_they_are_given(cartilha):
    result = planned(cartilha, *TINY, "--device", "cpu", "t4", "--block_size", 256, "--skip_probe")
    blocks = {
        row["device"]: row["micro_batch_size"] * row["gradient_accumulation_steps"] for row in result["recommended"]
    }
    assert result["batch_tokens"] == "auto" and blocks == {"cpu": 4, "t4": 32}
    assert [row["batch_tokens"] for row in result["recommended"]] == [1024, 8192]
    outcome = cartilha("plan", *TINY, "--device", "cpu", "--block_size", 256, "--skip_probe")
    assert "Tokens per step: 1,024 on a CPU, 8,192 on a GPU" in outcome.out


def test_a_plan_is_readable_in_a_terminal(cartilha):
    outcome = cartilha("plan", *TINY, "--device", "t4", "--block_size", 256, "--price_per_hour", 1)
    assert outcome.code == 0
    for part in ("t4", "256", "M parameters", "~", "weights", "while one is written", "checkpoint", "MFU", "~25%"):
        assert part in outcome.out


def test_a_plan_says_where_a_cpu_keeps_freed_memory(cartilha):
    arguments = ("plan", *TINY, "--block_size", 256, "--skip_probe")
    said = "up to 1.3 times"
    assert said in cartilha(*arguments, "--device", "cpu", "--memory", "lean").out
    assert said in cartilha(*arguments, "--device", "cpu", "--gradient_checkpointing").out
    assert said not in cartilha(*arguments, "--device", "cpu").out
    assert said not in cartilha(*arguments, "--device", "t4", "--memory", "lean").out


def test_this_machine_is_probed_and_the_rest_estimated(cartilha, monkeypatch):
    bodies = []
    monkeypatch.setattr("cartilha.pipeline.probe.training_body", lambda *asked: bodies.append(asked[1:]))
    result = planned(cartilha, *TINY, "--device", "auto", "h100")
    probed = {(row["device"], row["block_size"]) for row in result["rows"] if not row["estimated"]}
    assert probed == {("this machine", 512)}
    rates = {row["block_size"]: row["tokens_per_second"] for row in result["rows"] if row["device"] == "this machine"}
    assert rates[256] > rates[512] > rates[1024] > 0
    assert bodies == [("auto", 30)]  # compiled where a training of 30 steps and more is
    h100 = [row["mfu"] for row in result["rows"] if row["device"] == "h100"]
    assert h100 == pytest.approx([KNOWN_DEVICES["h100"].share] * len(h100))


def test_a_probe_that_does_not_fit_leaves_an_estimate(cartilha, monkeypatch):
    def full(*arguments: object, **settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("cartilha.pipeline.probe.train_steps", full)
    outcome = cartilha("plan", *TINY, "--device", "auto", "--json")
    assert outcome.code == 0 and "its speed is estimated" in outcome.err
    rows = json.loads(outcome.out)["rows"]
    assert all(row["estimated"] and row["tokens_per_second"] > 0 for row in rows)


def test_what_to_expect_is_foreseen_from_trainings_that_are_those_of_train(
    cartilha, store, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("cartilha.pipeline.expectation.FRESH", 2.0)
    monkeypatch.setattr("cartilha.pipeline.expectation.SHORTEST", {"cpu": (2, 256)})  # 4 steps of 64 tokens
    monkeypatch.setattr("cartilha.pipeline.expectation.HELD_OUT_TOKENS", 500)
    shared = {"model": "random:tiny", "store": str(store), "block_size": 32, "batch_tokens": 64}
    arguments = [word for name, value in shared.items() for word in (f"--{name}", value)]
    result = planned(cartilha, *arguments, "--device", "auto", "--skip_probe", "--expect")
    expected = result["expected"]
    config = TrainConfig(**shared, output=str(tmp_path / "run"), max_steps=16, validation_tokens=500)
    run = train(replace(config, skip_checks=True, skip_english=True)).results
    first, last = (run["evaluations"][i]["bits_per_byte"] for i in (0, -1))
    assert [row["steps"] for row in expected["trained"]] == [4, 8, 16]
    assert (expected["before"], expected["trained"][-1]["bits_per_byte"]) == (first, last)
    (whole,) = expected["rows"]  # ten minutes would read more than the text
    assert whole["tokens"] == expected["tokens_per_epoch"]
    low, high = whole["interval"]
    assert low < whole["bits_per_byte"] < high < first
    capfd.readouterr()
    show("plan", result)
    out = capfd.readouterr().out
    for shown in ("16 steps", f"{last:.3f}", f"{low:.2f} to {high:.2f}", "The last row is the whole training text"):
        assert shown in out


def test_nothing_is_foreseen_without_enough_text_or_a_model_that_gets_better(store, caplog, monkeypatch):
    monkeypatch.setattr("cartilha.pipeline.expectation.HELD_OUT_TOKENS", 500)
    asked = PlanConfig(model="random:tiny", store=str(store), block_size=32, batch_tokens=64)
    assert expect(asked)["rows"] == [] and "The weights of random:tiny are fresh." in caplog.text
    monkeypatch.setattr("cartilha.runs.setup.resolve_lr", lambda *arguments, **settings: 30.0)
    assert expect(asked)["rows"] == [] and "left the model better than before" in caplog.text
    with pytest.raises(UserError, match="give more text or a smaller --batch_tokens"):
        expect(replace(asked, batch_tokens=2048))


def test_the_devices_that_can_be_named_are_those_with_figures():
    assert tuple(KNOWN_DEVICES) == PLANNED_DEVICES


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "t5"], "There is no device 't5' to plan for; choose from auto, t4,"),
        (["--block_size", 4096], "beyond the context of random:tiny (1024 tokens); use --block_size 1024 or less"),
        (["--block_size", 1], "--block_size must be 2 or more, not 1."),
        (
            ["--block_size", 256, "--batch_tokens", 300],
            "must be a multiple of block_size (256); use --batch_tokens 256",
        ),
        (["--epochs", 0], "epochs must be 1 or more"),
        (["--optimizer", "sgd"], "There is no optimizer 'sgd'; choose from auto, adamw, rmsprop, muon, adafactor."),
        (["--price_per_hour", -1], "price_per_hour must be 0 or more"),
        (["--model", "random:huge"], "There is no architecture random:huge"),
        (["--store", "nowhere"], "nowhere"),
        (["--expect"], "--expect trains on a store for a few steps; name one with --store STORE."),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(refused, arguments, sentence):
    assert sentence in refused("plan", *TINY, "--skip_probe", "--device", "cpu", *arguments)


def test_a_model_that_fits_nowhere_is_refused_with_the_arithmetic(refused, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=32_000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                intermediate_size=11008).save_pretrained(tmp_path)  # fmt: skip
    sentence = refused("plan", "--model", tmp_path, "--device", "t4", "l4", "--memory", "full")
    assert "6.7 B parameters take 16 bytes each" in sentence and "100.4 GiB" in sentence and "l4" in sentence
    assert "parameters would fit" in sentence
    assert "4.03 bytes each (bfloat16 weight" in refused("plan", "--model", tmp_path, "--device", "t4", "l4")


def test_training_a_model_that_cannot_fit_is_refused_before_anything_is_written(refused, store, tmp_path, monkeypatch):
    monkeypatch.setattr("cartilha.runs.setup.free_memory_bytes", lambda device: 2**20)
    sentence = refused("train", *TINY, "--store", store, "--output", tmp_path / "run", "--block_size", 32)
    assert "cannot fit" in sentence and "12 bytes each" in sentence
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_plan_and_keeps_to_it(store, tmp_path):
    config = TrainConfig(
        model="random:tiny", store=str(store), output=str(tmp_path / "run"), block_size=32, batch_tokens=128,
        max_steps=2, dtype="float32",
    )  # fmt: skip
    results = train(config, prompts=GenerateConfig(prompt=("a",), max_new_tokens=2)).results
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert plan["micro_batch_size"] == results["settings"]["micro_batch_size"] == 4
    assert plan["memory_bytes"] == sum(plan["memory"].values()) > 0
    assert plan["tokens_per_second"] > 0 and plan["estimated"] is True and plan["attention"] == "segments"
    used = results["utilization"]
    assert used["peak"] == "measured" and used["peak_flops"] == plan["utilization"]["peak_flops"]
    assert plan["utilization"]["mfu"] == pytest.approx(CPU_SHARE)  # what the estimate is made from
    rate = results["tokens_per_second_after_first_step"]
    assert used["mfu"] == pytest.approx(rate * plan["flops_per_token"] / used["peak_flops"])
    assert 0 < used["mfu_without_attention"] < used["mfu"]
    # The test process holds much else: only the order of magnitude can be looked at here (the benchmark has the ratio).
    assert 0.1 < plan["memory_bytes"] / results["memory_bytes"] < 10


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({"epochs": 1}, 0),  # its only checkpoint comes when nothing is left to do
        ({"epochs": 2}, 1),
        ({"epochs": 1, "checkpoint_steps": 1}, 1),
        ({"epochs": 1, "checkpoint_minutes": 1e-9}, 1),
    ],
)
def test_a_copy_that_is_written_while_training_goes_on_is_planned(store, tmp_path, changes, copies):
    config = TrainConfig(model="random:tiny", store=str(store), output=str(tmp_path), block_size=32,
                         batch_tokens=128, dtype="float32", **changes)  # fmt: skip
    run = assemble(config, tmp_path, GenerateConfig(), False)
    assert run.plan.memory.checkpoint_copy == copies * 8 * run.loaded.num_parameters
    assert run.plan.values["memory_bytes"] == run.plan.memory_bytes and run.plan.background_checkpoints


def test_heads_that_flash_attention_cannot_take_are_planned_under_a_mask(monkeypatch):
    flash, other = (AutoConfig.for_model("llama", hidden_size=4 * size, num_attention_heads=4, num_hidden_layers=2,
                                         intermediate_size=64, vocab_size=61) for size in (32, 36))  # fmt: skip
    assert [KNOWN_DEVICES["h100"].for_model(config).kernel for config in (flash, other)] == ["varlen", "mask"]
    shape = StepShape(block_size=1024, blocks_per_step=2, micro_batch_size=2)
    masked = plan_run(other, KNOWN_DEVICES["h100"], StateSize(100_000, "adamw", 800_000), shape)
    monkeypatch.delattr(KERNELS["varlen"], "obstacle")
    plain = plan_run(other, KNOWN_DEVICES["h100"], StateSize(100_000, "adamw", 800_000), shape)
    # A boolean and a number in half precision for all layers, less what flash attention keeps of each layer besides.
    assert masked.memory.total - plain.memory.total >= 2 * 1024**2


def test_without_room_a_plan_has_no_copy_either(cartilha, monkeypatch):
    cpu = KNOWN_DEVICES["cpu"]
    step = planned(cartilha, *TINY, "--device", "cpu", "--block_size", 256)["recommended"][0]["memory"]
    without = sum(step.values()) - step["checkpoint_copy"]
    for room, copies in ((without + 1000, 0), (sum(step.values()) + 1000, 1)):
        monkeypatch.setitem(KNOWN_DEVICES, "cpu", replace(cpu, memory_bytes=int(room / SAFETY)))
        row = planned(cartilha, *TINY, "--device", "cpu", "--block_size", 256)["recommended"][0]
        assert row["fits"] and row["memory"]["checkpoint_copy"] == copies * step["checkpoint_copy"]


def test_without_room_for_the_copy_training_waits_for_checkpoints(store, tmp_path, monkeypatch, caplog):
    config = TrainConfig(model="random:tiny", store=str(store), output=str(tmp_path / "run"), block_size=32,
                         batch_tokens=128, dtype="float32", epochs=2)  # fmt: skip
    plan = assemble(config, tmp_path, GenerateConfig(), False).plan
    without = plan.memory_bytes - plan.memory.checkpoint_copy
    backgrounds = []
    monkeypatch.setattr(train_module.CheckpointWriter, "__init__", partialmethod(note_background, backgrounds))
    for room, background in ((without + 1000, False), (plan.memory_bytes + 1000, True)):
        free = int(room / SAFETY)
        monkeypatch.setattr("cartilha.runs.step_plan.available_memory_bytes", lambda device, free=free: free)
        with pytest.raises(StopIteration):
            train(replace(config, output=str(tmp_path / str(background))))
        assert backgrounds.pop() is background


def note_background(self: object, backgrounds: list[bool], *arguments: object, **settings: object) -> None:
    backgrounds.append(bool(settings["background"]))
    raise StopIteration


def test_the_step_is_traced_once(store, tmp_path, monkeypatch):
    """The check before step 1 takes the plan's figure."""
    asked = []
    step = MemoryModel.step
    monkeypatch.setattr(MemoryModel, "step", lambda *a, **o: asked.append(o) or step(*a, **o))
    config = TrainConfig(model="random:tiny", store=str(store), output=str(tmp_path / "run"), block_size=32,
                         batch_tokens=128, max_steps=1, dtype="float32", micro_batch_size=2, memory="full")  # fmt: skip
    train(config, prompts=GenerateConfig(prompt=("a",), max_new_tokens=2))
    assert len(asked) == 1


def test_an_architecture_that_cannot_be_traced_begins_with_one_block(store, tmp_path, monkeypatch, caplog):
    def broken(*arguments: object, **settings: object) -> None:
        raise RuntimeError("an operation without a shape")

    monkeypatch.setattr("cartilha.runs.step_plan.MemoryModel", broken)
    config = TrainConfig(
        model="random:tiny", store=str(store), output=str(tmp_path / "run"), block_size=32, batch_tokens=128,
        max_steps=1, dtype="float32",
    )  # fmt: skip
    results = train(config, prompts=GenerateConfig(prompt=("a",), max_new_tokens=2)).results
    assert results["settings"]["micro_batch_size"] == 1
    assert any("could not be planned (an operation without a shape)" in notice for notice in results["notices"])


def test_gradient_checkpointing_changes_no_loss(store, tmp_path):
    losses = []
    for checkpointing in (False, True):
        path = tmp_path / str(checkpointing)
        config = TrainConfig(
            model="random:tiny-opt", store=str(store), output=str(path), block_size=32, batch_tokens=128, max_steps=3,
            dtype="float32", gradient_checkpointing=checkpointing,
        )  # fmt: skip
        train(config, prompts=GenerateConfig(prompt=("a",), max_new_tokens=2))
        text = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in text if "evaluation" not in line])
    assert losses[0] == losses[1]


def test_several_cards_are_planned_replicated_and_sharded(cartilha):
    one = planned(cartilha, *TINY, "--device", "h100", "--block_size", 256, "--price_per_hour", 2)
    result = planned(cartilha, *TINY, "--device", "h100", "--block_size", 256, "--price_per_hour", 2, "--gpus", 8)
    assert [row["device"] for row in result["recommended"]] == ["h100", "h100/8"]
    whole, share = (row["memory"] for row in result["recommended"])
    assert share["weights"] == share["gradients"] == -(-whole["weights"] // 8)
    assert share["optimizer_states"] == -(-whole["optimizer_states"] // 8)
    rates = [row["tokens_per_second"] for row in (one["recommended"][0], *result["recommended"])]
    assert rates[1] == rates[2] == pytest.approx(8 * rates[0])
    shown = cartilha("plan", *TINY, "--device", "h100", "--gpus", 8)
    assert shown.code == 0 and "A name that ends in /8: sharded" in shown.out


def test_eight_billion_parameters_are_told_what_fits_which_card_and_what_would(cartilha, tmp_path):
    """Of eight cards of a kind each profile is planned, replicated and sharded; what does not fit names what does."""
    shape = {"vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 24_576, "num_hidden_layers": 8,
             "num_attention_heads": 64, "num_key_value_heads": 8}  # fmt: skip
    AutoConfig.for_model("llama", **shape).save_pretrained(tmp_path)
    sizes = ["--block_size", 512, "--batch_tokens", 4096, "--device", "l4", "a100-80gb", "--gpus", 8]
    result = planned(cartilha, "--model", tmp_path, *sizes)
    assert 8e9 < result["num_parameters"] < 8.5e9
    found = {(line["device"], line["profile"]): line for line in result["profiles"]}
    assert found["a100-80gb", "full"]["remedy"] == "use --memory full --shard full"
    assert found["a100-80gb/8", "full"]["fits"] and found["a100-80gb", "lean"]["fits"]
    assert found["a100-80gb/8", "full"]["bytes_per_parameter"] == pytest.approx(2.0)
    assert found["l4", "full"]["remedy"] == "use more cards (--gpus) or --lora with --lora_base"
    for place in (("l4", "lean"), ("l4/8", "full, layers twice")):
        assert found[place]["remedy"].startswith("use a larger card (a100")
    assert all(line["fits"] == (line["remedy"] is None) for line in result["profiles"])
