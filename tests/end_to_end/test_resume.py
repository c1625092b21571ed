"""Interrupted runs: resumed, they are the unbroken run to the bit; what may not be gone on with is refused by name."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FLAGS, Left, assert_same_run, num_lines, start, terminate
from safetensors.torch import load_file, save_file

from cartilha.config import TrainConfig
from cartilha.errors import InterruptedRunError, UserError
from cartilha.model.forward import batch_nll
from cartilha.runs.files import write_config
from cartilha.storage import file_sha256, write_sealed_json
from cartilha.training.checkpoint import FILES, FORMAT_VERSION, FrozenState, freeze, write_checkpoint
from cartilha.training.memory import StepMemory
from cartilha.training.update_rules import OPTIMIZERS, UpdateRule


def test_interrupted_and_resumed_equals_unbroken(cartilha, unbroken, store, tmp_path, during_step):
    path = tmp_path / "run"
    arguments = ["train", *FLAGS, "--store", store, "--output", path]
    during_step({5: terminate})
    outcome = cartilha(*arguments)
    assert outcome.code == 75
    assert "cartilha: Stopped after step 5 of " in outcome.err and "--resume auto" in outcome.err
    assert "Traceback" not in outcome.err
    run = Left(path)
    assert run.results["status"] == "interrupted" and len(run.steps) == 5
    assert not (path / "model").exists()
    # Forget the texts of the default prompt: the run goes on with the prompts of the unbroken one.
    shutil.copy(unbroken.path / "samples.jsonl", path / "samples.jsonl")
    start(store, path, resume="auto")
    assert run.results["resumed_from_step"] == [5]
    assert_same_run(run, unbroken)


@pytest.mark.parametrize("last_epoch_step", [False, True])
def test_interrupted_twice_equals_unbroken(unbroken, store, tmp_path, during_step, last_epoch_step):
    per_epoch = unbroken.results["packing"]["steps_per_epoch"]
    first = per_epoch if last_epoch_step else 2
    during_step({first: terminate, first + 3: terminate})
    for _ in range(2):
        with pytest.raises(InterruptedRunError):
            start(store, tmp_path / "run", resume="auto")
    start(store, tmp_path / "run", resume="auto")
    run = Left(tmp_path / "run")
    assert run.results["resumed_from_step"] == [first, first + 3]
    assert_same_run(run, unbroken)


def test_automatic_steps_and_rates_stay_those_that_the_run_began_with(store, tmp_path, during_step, monkeypatch):
    changes = {"batch_tokens": "auto", "lr": "auto", "max_steps": 3, "model": "random:tiny"}
    during_step({1: terminate})
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run", **changes)
    monkeypatch.setattr("cartilha.training.optimizer.AUTO_BATCH_TOKENS", {"cpu": 8192})  # as on another device
    monkeypatch.setattr("cartilha.training.optimizer.FRESH_RATE", 0.01)  # as in another version
    start(store, tmp_path / "run", **changes, resume="auto")
    settings = Left(tmp_path / "run").results["settings"]
    assert settings["batch_tokens"] == 1024 // settings["block_size"] * settings["block_size"]
    start(store, tmp_path / "run", **changes, resume="auto")  # finished: nothing is left to do
    assert Left(tmp_path / "run").results["resumed_from_step"] == [1]


def test_automatic_tokens_per_step_hide_no_other_block_size(store, tmp_path, during_step, monkeypatch):
    monkeypatch.setattr("cartilha.training.optimizer.AUTO_BATCH_TOKENS", {"cpu": 64})
    changes = {"batch_tokens": "auto", "max_steps": 3, "model": "random:tiny"}
    during_step({1: terminate})
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run", **changes, block_size=64)
    with pytest.raises(UserError, match="block_size"):  # steps of 64 tokens would hold no block
        start(store, tmp_path / "run", **changes, block_size=128, resume="auto")


def test_a_resumed_run_draws_the_same_dropout(store, tmp_path, during_step):
    changes = {"model": "random:tiny-opt", "dropout": True, "epochs": 1}
    start(store, tmp_path / "whole", **changes)
    during_step({4: terminate})
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run", **changes)
    torch.manual_seed(12345)
    start(store, tmp_path / "run", **changes, resume="auto")
    assert_same_run(Left(tmp_path / "run"), Left(tmp_path / "whole"))


class OnlySigns(torch.optim.Optimizer):
    """Steps by the sign of a mean of the gradients."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter]["mean"].lerp_(parameter.grad, 0.1)
                parameter.sub_(group["lr"] * mean.sign())


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "of another package"])
def test_every_optimizer_goes_on_to_the_bit(store, tmp_path, during_step, monkeypatch, optimizer):
    rule = UpdateRule(OnlySigns, lambda shape: {"mean": shape})
    monkeypatch.setitem(OPTIMIZERS, "of another package", (rule, rule))
    start(store, tmp_path / "whole", optimizer=optimizer)
    during_step({4: terminate})
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run", optimizer=optimizer)
    start(store, tmp_path / "run", optimizer=optimizer, resume="auto")
    run = Left(tmp_path / "run")
    assert run.results["resumed_from_step"] == [4] and run.results["settings"]["optimizer"] == optimizer
    assert_same_run(run, Left(tmp_path / "whole"))
    assert run.losses[-1] < run.losses[0]


def test_states_of_another_optimizer_are_never_taken(stopped, store, tmp_path):
    path = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(UserError, match=r"another optimizer \(rmsprop before\): its states mean nothing to the other"):
        start(store, path, resume="auto", allow_changes=True, optimizer="muon")


def forget(option: str, path: Path) -> None:
    """Make the only checkpoint of a run one of a version that did not have this option."""
    (checkpoint,) = (path / "checkpoints").iterdir()
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    del state["settings"][option]
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    files = {n: {"size": (checkpoint / n).stat().st_size, "sha256": file_sha256(checkpoint / n)} for n in FILES}
    manifest = {"format_version": FORMAT_VERSION, "validation_loss": None, "files": files}
    write_sealed_json(checkpoint / "manifest.json", manifest)


def test_a_run_begun_before_an_option_existed_goes_on_with_its_default(stopped, store, tmp_path, unbroken):
    path = shutil.copytree(stopped, tmp_path / "run")
    forget("dropout", path)
    start(store, path, resume="auto")
    assert_same_run(Left(path), unbroken)


def test_a_run_begun_before_rmsprop_keeps_adamw(store, tmp_path, during_step):
    start(store, tmp_path / "whole", max_steps=4, optimizer="adamw")
    during_step({2: terminate})
    path = tmp_path / "run"
    with pytest.raises(InterruptedRunError):
        start(store, path, max_steps=4, optimizer="adamw")
    forget("optimizer", path)
    start(store, path, max_steps=4, resume="auto")
    run = Left(path)
    assert run.results["settings"]["optimizer"] == "adamw"
    assert_same_run(run, Left(tmp_path / "whole"))


def test_lean_weights_are_no_way_for_a_run_whose_optimizer_has_no_such_form(store, tmp_path, during_step):
    during_step({2: terminate})
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run", max_steps=4, optimizer="muon", dtype="auto")
    with pytest.raises(UserError, match="muon has no form for bfloat16 weights"):
        start(store, tmp_path / "run", max_steps=4, dtype="auto", memory="lean", resume="auto")


@pytest.mark.parametrize(("batch_tokens", "optimizer"), [(2016, "rmsprop"), (2048, "adamw")])
def test_small_steps_take_rmsprop(store, tmp_path, batch_tokens, optimizer):
    start(store, tmp_path / "run", max_steps=2, batch_tokens=batch_tokens)
    start(store, tmp_path / "named", max_steps=2, batch_tokens=batch_tokens, optimizer=optimizer)
    assert Left(tmp_path / "run").results["settings"]["optimizer"] == optimizer
    assert_same_run(Left(tmp_path / "run"), Left(tmp_path / "named"))


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_and_resumed_equals_unbroken(unbroken, store, tmp_path, during_step, monkeypatch, damaged):
    path = tmp_path / "killed"
    monkeypatch.setattr("cartilha.pipeline.train.can_write_in_background", lambda device, size: False)

    def kill() -> None:
        """What a kill at this moment would leave: a copy of the directory, with a torn line."""
        shutil.copytree(tmp_path / "run", path)
        with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"step": 8, "loss"')

    during_step({8: kill})
    start(store, tmp_path / "run", checkpoint_steps=3)
    run = Left(path)
    assert run.results["status"] == "running"
    assert [folder.name for folder in sorted((path / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    if damaged:
        (path / "checkpoints" / "step-00000006" / "optimizer.safetensors").write_bytes(b"")
    start(store, path, resume="auto", checkpoint_steps=3)
    assert run.results["resumed_from_step"] == [3 if damaged else 6]
    assert ("step-00000006 is damaged" in " ".join(run.results["notices"])) is damaged
    assert_same_run(run, unbroken)


def test_killed_after_the_last_checkpoint_and_before_older_ones_are_removed(store, tmp_path, monkeypatch):
    def killed(path: Path, keep: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cartilha.training.checkpoint.remove_older", killed)
    monkeypatch.setattr("cartilha.pipeline.train.can_write_in_background", lambda device, size: False)
    path = tmp_path / "run"
    while not list(path.glob("checkpoints/*3")):  # each start comes one step further
        with pytest.raises(KeyboardInterrupt):
            start(store, path, resume="auto", checkpoint_steps=1, max_steps=3, keep_last=1)
    monkeypatch.undo()
    start(store, path, resume="auto", checkpoint_steps=1, max_steps=3, keep_last=1)
    assert [folder.name for folder in (path / "checkpoints").iterdir()] == ["step-00000003"]


def test_killed_before_the_first_checkpoint_begins_anew(unbroken, store, tmp_path, during_step):
    during_step({2: lambda: shutil.copytree(tmp_path / "run", tmp_path / "killed")})
    start(store, tmp_path / "run")
    with pytest.raises(UserError, match="holds a run already; go on with it by --resume auto"):
        start(store, tmp_path / "killed")
    start(store, tmp_path / "killed", resume="auto")
    run = Left(tmp_path / "killed")
    assert run.results["resumed_from_step"] == []
    assert_same_run(run, unbroken)


def test_killed_among_the_first_files_it_can_be_run_again(store, tmp_path, monkeypatch):
    def write_and_die(path: Path, config: TrainConfig) -> None:
        write_config(path, config)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cartilha.pipeline.train.write_config", write_and_die)
        start(store, tmp_path / "run", max_steps=1)
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert start(store, tmp_path / "run", max_steps=1, resume="auto")["status"] == "finished"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 1e-3}, "lr was 0.003, now 0.001"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"epochs": 3}, "num_steps was "),
        ({"block_size": 64}, "block_size was 32, now 64"),
        ({"batch_tokens": 64}, "batch_tokens was 128, now 64"),
        ({"weight_decay": 0.0}, "weight_decay was 0.1, now 0.0"),
        ({"schedule": "linear"}, "schedule was cosine, now linear"),
        ({"optimizer": "muon"}, "optimizer was rmsprop, now muon"),
        ({"dropout": True}, "dropout was False, now True"),
        ({"model": "random:tiny-opt"}, "model was random:tiny, now random:tiny-opt"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_name(unbroken, stopped, store, tmp_path, changes, named):
    for run in (unbroken.path, stopped):  # a finished run, and one that could go on
        path = shutil.copytree(run, tmp_path / run.name)
        with pytest.raises(UserError, match="other settings") as caught:
            start(store, path, resume="auto", **changes)
        assert named in str(caught.value)
        assert "optimizer" not in changes or "--allow_changes" not in str(caught.value)  # it would not help
        assert (path / "results.json").read_bytes() == (run / "results.json").read_bytes()


@pytest.fixture(scope="module")
def stopped(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after three steps; not to be changed by a test."""
    path = tmp_path_factory.mktemp("stopped") / "stopped"
    count = 0

    def patched(model: Any, batch: Any, dtype: torch.dtype, body: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 3:
            terminate()
        return batch_nll(model, batch, dtype, body)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedRunError):
        patch.setattr("cartilha.training.loop.batch_nll", patched)
        start(store, path)
    return path


def test_another_store_is_another_setting(unbroken, cartilha, tmp_path, corpus):
    other = tmp_path / "other-store"
    assert cartilha("prepare", "--input", corpus, "--model", "random:tiny", "--output", other, "--seed", 9).code == 0
    with pytest.raises(UserError, match="store was "):
        start(other, shutil.copytree(unbroken.path, tmp_path / "run"), resume="auto")


def test_what_does_not_decide_the_result_may_change(stopped, store, tmp_path, unbroken, monkeypatch):
    monkeypatch.setattr("cartilha.machine.devices.fastest_cpu_dtype", lambda real: "bfloat16")
    path = shutil.copytree(stopped, tmp_path / "run")
    start(store, path, resume="auto", micro_batch_size=1, checkpoint_steps=5, dtype="auto")
    run = Left(path)
    assert run.results["settings"]["dtype"] == "float32"  # as the run began, whatever auto would choose today
    assert run.losses == pytest.approx(unbroken.losses, rel=1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process at once")
def test_a_process_that_is_asked_to_stop_ends_with_75(store, tmp_path):
    path = tmp_path / "run"
    arguments = [*FLAGS, "--store", store, "--output", path, "--max_steps", 100_000]
    process = subprocess.Popen(
        [sys.executable, "-m", "cartilha", "train", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        deadline = time.monotonic() + 300
        while not ((path / "metrics.jsonl").is_file() and Left(path).results["evaluations"] and num_lines(path) > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 75
    assert out == "" and "Traceback" not in err and "cartilha: Stopped after step " in err
    run = Left(path)
    assert run.results["status"] == "interrupted"
    assert (path / "checkpoints" / f"step-{run.steps[-1]['step']:08d}" / "manifest.json").is_file()


# One epoch and one more


CONSTANT = {"warmup_fraction": 0.0, "final_lr_fraction": 1.0}


def test_one_epoch_and_one_more_are_two(unbroken, store, tmp_path):
    start(store, tmp_path / "two", **CONSTANT)
    run = Left(tmp_path / "run")
    assert start(store, run.path, **CONSTANT, epochs=1, keep_optimizer=True)["status"] == "finished"
    with pytest.raises(UserError, match=r"num_steps was \d+, now \d+.*--allow_changes"):
        start(store, run.path, **CONSTANT, resume="auto")
    start(store, run.path, **CONSTANT, resume="auto", allow_changes=True)
    assert run.results["resumed_from_step"] == [unbroken.results["packing"]["steps_per_epoch"]]
    assert "num_steps was " in " ".join(run.results["notices"])
    assert_same_run(run, Left(tmp_path / "two"))
    assert not torch.equal(run.weights["model.norm.weight"], unbroken.weights["model.norm.weight"]), "proves nothing"


def test_a_finished_run_drops_its_optimizer_states_and_says_how_to_train_further(store, tmp_path, cartilha):
    run = Left(tmp_path / "run")
    start(store, run.path, keep_last=1, checkpoint_steps=1, save_dtype="bfloat16")
    (kept,) = (run.path / "checkpoints").iterdir()
    assert {file.name for file in kept.iterdir()} == {"model.safetensors", "state.json", "manifest.json"}
    assert {tensor.dtype for tensor in run.weights.values()} == {torch.bfloat16}
    exact = load_file(kept / "model.safetensors")["model.norm.weight"]
    assert exact.dtype == torch.float32 and torch.equal(exact.bfloat16(), run.weights["model.norm.weight"])
    # As if it had been killed just before its end was recorded: it needs no states for what is left to do.
    (kept / "optimizer.safetensors").write_bytes(b"")
    before = run.results
    (run.path / "results.json").write_text(json.dumps({**before, "status": "running"}), encoding="utf-8")
    assert start(store, run.path, resume="auto")["evaluations"] == before["evaluations"]
    assert not (kept / "optimizer.safetensors").exists()
    flags = [*FLAGS, "--store", store, "--output", run.path, "--resume", "auto"]
    assert cartilha("train", *flags).code == 0
    for more in ([], ["--allow_changes"]):
        outcome = cartilha("train", *flags, "--epochs", 3, *more)
        assert outcome.code == 2 and "its optimizer states were dropped" in outcome.err.splitlines()[-1]
        assert f"--model {run.path / 'model'} and another --output" in outcome.err
    (run.path / "results.json").write_text(json.dumps({**before, "status": "running"}), encoding="utf-8")
    with pytest.raises(UserError, match="its optimizer states were dropped"):
        start(store, run.path, resume="auto", epochs=3, allow_changes=True)


def test_with_allow_changes_a_run_goes_on_and_says_what_is_other(cartilha, stopped, store, tmp_path):
    path = shutil.copytree(stopped, tmp_path / "run")
    flags = [*FLAGS, "--store", store, "--output", path, "--resume", "auto", "--batch_tokens", 64, "--seed", 5]
    outcome = cartilha("train", *flags, "--allow_changes")
    assert outcome.code == 0
    assert "goes on with other settings (batch_tokens was 128, now 64; seed was 0, now 5" in outcome.err
    run = Left(path)
    assert run.results["status"] == "finished" and run.results["settings"]["batch_tokens"] == 64
    assert [line["step"] for line in run.steps] == list(range(1, run.results["settings"]["num_steps"] + 1))


def test_no_flag_brings_a_model_of_another_shape_to_a_checkpoint(stopped, store, tmp_path):
    path = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(UserError, match="cannot be used for this model"):
        start(store, path, resume="auto", allow_changes=True, model="random:tiny-opt")
    assert Left(path).results == Left(stopped).results


def test_a_model_whose_weights_changed_is_another_model(store, tmp_path, during_step):
    model = tmp_path / "model"
    start(store, tmp_path / "first", max_steps=1)
    shutil.copytree(tmp_path / "first" / "model", model)
    during_step({2: terminate})
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run", model=str(model))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"\(weights was [0-9a-f]{16}, now [0-9a-f]{16}\)"):
        start(store, tmp_path / "run", model=str(model), resume="auto")


# What is in force


def test_the_micro_batch_in_force_goes_on_whatever_would_be_planned_now(store, tmp_path, during_step, monkeypatch):
    no_memory = StepMemory(0, 0, 0, 0, 0, 0)
    monkeypatch.setattr("cartilha.runs.step_plan.best_step", lambda *_: (1, no_memory))
    start(store, tmp_path / "whole")
    during_step({6: terminate})  # a step has four forward passes now
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run")
    monkeypatch.setattr("cartilha.runs.step_plan.best_step", lambda *_: (4, no_memory))
    start(store, tmp_path / "run", resume="auto")
    assert_same_run(Left(tmp_path / "run"), Left(tmp_path / "whole"))
    with pytest.raises(AssertionError):  # not vacuous: with another micro-batch the bits are others
        start(store, tmp_path / "other", micro_batch_size=4)
        assert_same_run(Left(tmp_path / "other"), Left(tmp_path / "whole"))


def test_checkpoints_in_the_background_change_nothing_and_the_best_is_kept(unbroken, store, tmp_path, monkeypatch):
    written: list[tuple[str, int]] = []
    copies: list[bool] = []

    def slowly(run: Path, frozen: FrozenState, *rest: Any) -> Path:
        time.sleep(0.05)  # training goes on meanwhile
        written.append((threading.current_thread().name, frozen.step))
        return write_checkpoint(run, frozen, *rest)

    def frozen(*state: Any, copy: bool) -> FrozenState:
        copies.append(copy)
        return freeze(*state, copy=copy)

    monkeypatch.setattr("cartilha.training.writer.write_checkpoint", slowly)
    monkeypatch.setattr("cartilha.training.writer.freeze", frozen)
    start(store, tmp_path / "run", checkpoint_steps=1, keep_optimizer=True)
    run = Left(tmp_path / "run")
    threads = ["checkpoint_0"] * (len(run.steps) - 1) + ["MainThread"]  # nothing goes on beside the last one
    assert written == list(zip(threads, range(1, len(run.steps) + 1), strict=True))
    assert copies == [True] * (len(run.steps) - 1) + [False]
    assert_same_run(run, unbroken)
    losses = [row["validation_loss"] for row in run.results["epochs"]]
    assert losses[1] < losses[0] and run.results["best_checkpoint"] == f"step-{len(run.steps):08d}"
    assert run.results["checkpoint_seconds"] > 0
    # Every checkpoint is the run at its step: going on from the last but one gives the same end.
    names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (len(run.steps) - 1, len(run.steps))]
    shutil.rmtree(run.path / "checkpoints" / names[-1])
    results = {**run.results, "status": "running"}
    (run.path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    start(store, run.path, resume="auto")
    assert run.results["resumed_from_step"] == [len(run.steps) - 1]
    assert run.weights["model.norm.weight"].equal(unbroken.weights["model.norm.weight"])


def test_a_damaged_record_costs_the_history_and_not_the_run(stopped, store, tmp_path, unbroken):
    path = shutil.copytree(stopped, tmp_path / "run")
    (path / "results.json").write_text('{"status": "interrupted", "epochs": 7}', encoding="utf-8")
    start(store, path, resume="auto")
    run = Left(path)
    assert "results.json is damaged" in " ".join(run.results["notices"])
    assert run.weights["model.norm.weight"].equal(unbroken.weights["model.norm.weight"])
    assert run.results["evaluations"][-1]["perplexity"] == unbroken.results["evaluations"][-1]["perplexity"]


def test_going_on_under_other_circumstances_is_said(stopped, store, tmp_path):
    path = shutil.copytree(stopped, tmp_path / "run")
    results = Left(path).results
    results["machine"]["threads"], results["versions"]["torch"] = 64, "1.0"
    (path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    notices = " ".join(start(store, path, resume="auto")["notices"])
    assert "goes on elsewhere (threads was 64, now " in notices and "torch was 1.0, now " in notices


# Stopping


def test_a_stop_file_stops_the_run_and_is_not_obeyed_twice_over(cartilha, refused, store, tmp_path, during_step):
    stop = tmp_path / "pare"
    flags = [*FLAGS, "--store", store, "--output", tmp_path / "run", "--resume", "auto", "--stop_file", stop]
    during_step({3: stop.touch, **{n: lambda: time.sleep(0.3) for n in range(4, 8)}})  # it is looked for once a second
    outcome = cartilha("train", *flags)
    assert outcome.code == 75 and "cartilha: Stopped after step " in outcome.err
    stopped_at = len(Left(tmp_path / "run").steps)
    assert 3 <= stopped_at < 10
    again = cartilha("train", *flags)
    assert again.code == 75 and f"The stop file {stop} is there" in again.err and len(again.err.splitlines()) == 1
    stop.unlink()
    assert cartilha("train", *flags).code == 0
    assert Left(tmp_path / "run").results["resumed_from_step"] == [stopped_at]


def test_a_second_process_on_the_same_run_is_refused(store, tmp_path, during_step, unbroken):
    refusals: list[str] = []

    def begin_another() -> None:
        with pytest.raises(UserError) as caught:
            start(store, tmp_path / "run", resume="auto")
        refusals.append(str(caught.value))

    during_step({2: begin_another, 9: begin_another})
    start(store, tmp_path / "run")
    assert len(refusals) == 2 and "is in use by another process" in refusals[0]
    assert_same_run(Left(tmp_path / "run"), unbroken)


def test_a_mistake_leaves_no_directory_and_no_lock(store, tmp_path, refused):
    refused("train", *FLAGS, "--store", store, "--output", tmp_path / "a" / "run", "--block_size", 2048)
    assert not (tmp_path / "a" / "run").exists()
    assert not (tmp_path / "run" / ".lock").exists()
