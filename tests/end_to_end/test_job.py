"""The whole job on a tiny model: files, figures, exact resume, and what a failure leaves behind."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from runs import FLAGS, PROMPTS, SETTINGS, Left, assert_same_run, raising, start, terminate
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cartilha.config import EvaluateConfig, TrainConfig
from cartilha.errors import InterruptedRunError, OutOfMemoryError
from cartilha.machine.cpu import cpu_has_bfloat16
from cartilha.model.forward import batch_nll
from cartilha.pipeline.evaluate import evaluate
from cartilha.pipeline.train import train
from cartilha.tokens.store import TokenStore

EVALUATION_KEYS = {
    *("perplexity", "word_perplexity", "bits_per_byte", "num_tokens", "num_bytes", "num_words", "num_documents"),
    *("protocol", "seconds"),
}


# The whole job


RECIPE = """
description: The whole job in seconds.
model: random:tiny
prepare:
  input: [{corpus}]
train:
  block_size: 32
  batch_tokens: 128
  epochs: 1
  lr: 3e-3
  dtype: float32
generate:
  prompt: [Era uma vez]
  max_new_tokens: 4
"""


def test_a_whole_recipe_in_seconds_and_again_does_nothing(cartilha, refused, corpus, tmp_path):
    recipe = tmp_path / "pequena.yaml"
    recipe.write_text(RECIPE.format(corpus=corpus), encoding="utf-8")
    job = ["run", recipe, "--output", tmp_path / "job", "--train.max_steps", 3]
    outcome = cartilha(*job, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result.keys() == {"prepared", "trained", "report", "table", "samples"}
    run = Left(tmp_path / "job" / "run")
    assert result["trained"]["status"] == run.results["status"] == "finished"
    assert run.results["tokens_per_second_after_first_step"] > 0 and run.results["utilization"]["mfu"] > 0
    assert result["trained"]["was_finished"] is False and run.results["settings"]["num_steps"] == 3
    page = (tmp_path / "job" / "report.html").read_text(encoding="utf-8")
    assert Path(result["report"]) == tmp_path / "job" / "report.html" and "<html" in page
    assert "| run | 32 | 3 steps | 4 |" in result["table"] and "finished" in result["table"]
    assert {path.name for path in (tmp_path / "job").iterdir()} == {"store", "run", "report.html"}
    files = {"config.yaml", "metrics.jsonl", "results.json", "samples.jsonl", "checkpoints", "model"}
    files |= {"surprisal.parquet", "evaluations", "plan.json"}
    assert {path.name for path in run.path.iterdir()} == files
    assert [line["prompt"] for line in run.lines("samples.jsonl")] == ["Era uma vez"] * 2

    page = cartilha("report", tmp_path / "job", "--output", tmp_path / "page.html", "--json")
    assert page.code == 0 and f"its run is {run.path}." in page.err
    assert json.loads(page.out)["table"] == result["table"]
    again = ["train", "--config", run.path / "config.yaml", "--output", tmp_path / "again"]
    assert cartilha(*again).code == 0 and Left(tmp_path / "again").losses == run.losses

    before = (run.path / "model" / "model.safetensors").stat().st_mtime_ns
    again = cartilha(*job)
    assert again.code == 0 and "nothing to do" in again.err
    assert (run.path / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert "random:tiny: finished" in again.out and "finished" in again.out
    # Other settings are not passed off as those of the run that is there.
    assert "lr was 0.003, now 0.5" in refused(*job, "--train.lr", 0.5)


def test_results_json_says_what_the_design_promises(unbroken, store):
    results = unbroken.results
    assert results["status"] == "finished" and results["error"] is None and results["resumed_from_step"] == []
    assert {*SETTINGS, "store", "num_steps", "seed", "device", "micro_batch_size"} <= results["settings"].keys()
    for name, value in SETTINGS.items():
        assert results["settings"][name] == value
    assert results["settings"]["blocks_per_step"] == 4
    assert {row["epoch"] for row in results["epochs"]} == {1, 2}
    assert all(row.keys() == {"epoch", "train_loss", "validation_loss", "seconds"} for row in results["epochs"])
    assert all(row.keys() >= EVALUATION_KEYS for row in results["evaluations"])
    assert results["packing"]["padding_share"] < 0.05
    assert results["machine"]["device"] == "cpu" and results["machine"]["matmul_gflops"]["float32"] > 0
    assert {"torch", "python", "cartilha"} <= results["versions"].keys()
    assert results["corpus"]["train_hash"] == TokenStore(store).counts["train"].corpus_hash
    assert results["tokens"] == 2 * (results["corpus"]["num_train_tokens"] + results["corpus"]["num_train_documents"])
    config = yaml.safe_load((unbroken.path / "config.yaml").read_text(encoding="utf-8"))["train"]
    assert config.items() >= SETTINGS.items()


def test_metrics_have_a_line_every_step(unbroken):
    keys = {"step", "epoch", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "seconds"}
    keys |= {"micro_batch_size"}
    steps = unbroken.steps
    assert [line["step"] for line in steps] == list(range(1, unbroken.results["settings"]["num_steps"] + 1))
    assert all(line.keys() == keys for line in steps)
    assert all(line["memory_bytes"] > 1e6 and line["grad_norm"] > 0 for line in steps)
    for name in ("tokens", "seconds", "epoch"):
        assert [line[name] for line in steps] == sorted(line[name] for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert max(line["lr"] for line in steps) == 3e-3 and steps[-1]["lr"] == pytest.approx(3e-4)


def test_validation_before_step_1_and_after_every_epoch_is_in_metrics_and_results(unbroken):
    results = unbroken.results
    per_epoch = results["packing"]["steps_per_epoch"]
    in_metrics = [line for line in unbroken.lines("metrics.jsonl") if "evaluation" in line]
    for rows in (in_metrics, results["evaluations"]):
        assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (per_epoch, 1), (2 * per_epoch, 2)]
    assert unbroken.lines("metrics.jsonl")[0]["step"] == 0
    for line, row in zip(in_metrics, results["evaluations"], strict=True):
        assert line["evaluation"]["perplexity"] == row["perplexity"]
    losses = [row["loss"] for row in results["evaluations"]]
    assert losses[1:] == [row["validation_loss"] for row in results["epochs"]]
    assert losses[0] > losses[1] > losses[2]


def test_a_notice_is_given_once_per_run(store, tmp_path, caplog):
    results = start(store, tmp_path / "run", batch_tokens=512)
    assert all("The interval rests on" in row["notes"][0] for row in results["evaluations"])
    assert len(results["evaluations"]) == 3 and caplog.text.count("The interval rests on") == 1


def test_an_epochs_loss_is_the_mean_over_its_tokens(unbroken):
    seen = 0  # tokens before the epoch
    for row in unbroken.results["epochs"]:
        steps = [line for line in unbroken.steps if line["epoch"] == row["epoch"]]
        totals = [seen, *(line["tokens"] for line in steps)]
        tokens = [after - before for before, after in itertools.pairwise(totals)]
        seen = steps[-1]["tokens"]
        weighted = sum(line["loss"] * n for line, n in zip(steps, tokens, strict=True)) / sum(tokens)
        assert row["train_loss"] == pytest.approx(weighted, rel=1e-9)
        unweighted = sum(line["loss"] for line in steps) / len(steps)
        assert abs(row["train_loss"] - unweighted) > 1e-5, "equally long steps: proves nothing"


def test_the_last_validation_is_what_evaluate_finds_on_the_model(unbroken, store, cartilha):
    last = unbroken.results["evaluations"][-1]
    found = evaluate(EvaluateConfig(model=(str(unbroken.path / "model"),), store=str(store), dtype="float32"))
    again = found.to_dict()["models"][0]
    for name in ("perplexity", "word_perplexity", "bits_per_byte", "loss"):
        assert again[name] == pytest.approx(last[name], rel=1e-5)
    same = ["protocol", "corpus_hash", "num_tokens", "num_bytes", "num_words", "num_documents"]
    assert [again[name] for name in same] == [last[name] for name in same]
    outcome = cartilha("evaluate", "--model", unbroken.path / "model", "random:tiny", "--store", store, "--json")
    figures = [row["loss"] for row in json.loads(outcome.out)["models"]]
    assert figures[0] == pytest.approx(last["loss"], rel=1e-2)  # in the machine's own dtype
    assert figures[1] == pytest.approx(unbroken.results["evaluations"][0]["loss"], rel=1e-2)


def test_the_saved_model_is_a_plain_float32_model(unbroken, store):
    folder = unbroken.path / "model"
    assert all(tensor.dtype == torch.float32 for tensor in unbroken.weights.values())
    for path in folder.glob("*.json"):
        assert "cartilha" not in path.read_text(encoding="utf-8") and "_attn" not in path.read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config._attn_implementation == "sdpa" and model.dtype == torch.float32
    nll, num_tokens = 0.0, 0
    with torch.inference_mode():
        for document in TokenStore(store).read_documents("validation"):
            ids = [tokenizer.bos_token_id, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
            tensor = torch.tensor([ids])
            nll += float(model(input_ids=tensor, labels=tensor).loss) * (len(ids) - 1)
            num_tokens += len(ids) - 1
    last = unbroken.results["evaluations"][-1]
    assert num_tokens == last["num_tokens"]
    assert nll / num_tokens == pytest.approx(last["loss"], rel=1e-5)
    assert "perplexity" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_samples_of_every_evaluation_are_kept_whatever_they_hold(unbroken):
    samples = unbroken.lines("samples.jsonl")
    steps = [0, unbroken.results["packing"]["steps_per_epoch"], unbroken.results["settings"]["num_steps"]]
    assert [(line["step"], line["prompt"]) for line in samples] == [
        (step, prompt) for step in steps for prompt in PROMPTS.prompt
    ]
    assert all(line["text"].startswith(line["prompt"]) and line["mode"] == "greedy" for line in samples)


# Seeds, batches, options


def test_one_seed_gives_the_same_losses_and_another_seed_others(unbroken, store, tmp_path):
    start(store, tmp_path / "same")
    assert_same_run(Left(tmp_path / "same"), unbroken)
    start(store, tmp_path / "other", seed=1, max_steps=3)
    other = Left(tmp_path / "other").losses
    assert len(other) == 3 and all(a != b for a, b in zip(other, unbroken.losses, strict=False))


def test_micro_batches_change_no_loss(unbroken, store, tmp_path, during_step):
    for size, passes in ((1, 16), (2, 8), (3, 8)):
        counted: list[int] = []
        during_step(dict.fromkeys(range(1, 100), lambda counted=counted: counted.append(1)))
        start(store, tmp_path / str(size), micro_batch_size=size, max_steps=4)
        assert len(counted) == passes, "not the number of forward passes that micro-batches of this size need"
        run = Left(tmp_path / str(size))
        # The schedule of four steps is another one: only the first loss is that of the unbroken run.
        assert run.losses[0] == pytest.approx(unbroken.losses[0], rel=1e-5)
        if size > 1:
            assert run.losses == pytest.approx(Left(tmp_path / "1").losses, rel=1e-5)
            norms = [[line["grad_norm"] for line in Left(tmp_path / name).steps] for name in ("1", str(size))]
            assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.fixture(scope="module")
def four_steps(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of four steps with the usual settings."""
    path = tmp_path_factory.mktemp("four") / "run"
    start(store, path, max_steps=4)
    return Left(path).losses


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 1e-2},
        {"warmup_fraction": 1.0},
        {"final_lr_fraction": 1.0},
        {"schedule": "constant"},
        {"weight_decay": 5.0},
        {"max_grad_norm": 1e-3},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_setting_reaches_the_weights(store, tmp_path, four_steps, changes):
    if changes.get("dtype") == "bfloat16" and not cpu_has_bfloat16():
        pytest.skip("this CPU has no bf16")
    start(store, tmp_path / "run", max_steps=4, device="cpu", **changes)
    losses = Left(tmp_path / "run").losses
    assert losses[0] == pytest.approx(four_steps[0], rel=1e-3)  # before any weight has moved
    assert abs(losses[-1] - four_steps[-1]) > 1e-6


def test_the_schedule_may_end_before_the_epoch_and_is_then_validated_too(store, tmp_path):
    results = start(store, tmp_path / "run", max_steps=2)
    assert results["epochs"] == [] and [row["step"] for row in results["evaluations"]] == [0, 2]
    in_metrics = [line["step"] for line in Left(tmp_path / "run").lines("metrics.jsonl") if "evaluation" in line]
    assert in_metrics == [0, 2]


def test_a_time_budget_ends_a_run_in_good_order_and_the_rate_has_decayed(
    cartilha, store, tmp_path, during_step, monkeypatch
):
    flags = [*FLAGS, "--max_steps", 100_000, "--time_budget", "3s", "--store", store, "--output", tmp_path / "run"]
    passes: list[int] = []  # each takes an eighth of a second by the loop's clock
    monkeypatch.setattr("cartilha.training.loop.time", SimpleNamespace(perf_counter=lambda: len(passes) / 8))
    during_step(dict.fromkeys(range(1, 1000), lambda: passes.append(1)))
    outcome = cartilha("train", *flags)
    assert outcome.code == 0 and "time budget of 3s is used up after step" in outcome.err
    run = Left(tmp_path / "run")
    assert run.results["status"] == "finished" and (run.path / "model" / "model.safetensors").is_file()
    rates = [line["lr"] for line in run.steps]
    assert len(rates) == 24 and run.steps[-2]["seconds"] < 3 <= run.steps[-1]["seconds"]
    assert rates.index(max(rates)) == 1  # the warm-up of 0.15 s ends in the second step
    assert max(rates) == pytest.approx(3e-3, rel=0.02) and rates[-1] == pytest.approx(0.1 * 3e-3, rel=1e-3)
    assert run.results["evaluations"][-1]["step"] == len(rates)
    assert "nothing to do" in cartilha("train", *flags, "--resume", "auto").err


def test_validation_may_score_a_fixed_part(store, tmp_path, unbroken):
    whole = unbroken.results["evaluations"][0]
    wanted = whole["num_tokens"] - 1
    parts = [
        start(store, tmp_path / str(seed), max_steps=1, seed=seed, validation_tokens=wanted)["evaluations"]
        for seed in (0, 1)
    ]
    assert whole["num_documents"] > 1
    assert all(0 < row["num_tokens"] <= wanted for rows in parts for row in rows)
    assert len({row["corpus_hash"] for rows in parts for row in rows}) == 1


def test_dropout_is_off_unless_asked_for_and_never_reaches_validation_or_texts(store, tmp_path):
    runs = {}
    for dropout in (False, True):
        start(store, tmp_path / str(dropout), model="random:tiny-opt", dropout=dropout, max_steps=2)
        runs[dropout] = Left(tmp_path / str(dropout))
    assert all(a != b for a, b in zip(runs[False].losses, runs[True].losses, strict=True))
    before = [run.results["evaluations"][0]["loss"] for run in runs.values()]
    assert before[0] == before[1]
    texts = [[line["text"] for line in run.lines("samples.jsonl") if line["step"] == 0] for run in runs.values()]
    assert texts[0] == texts[1]


def test_dropout_does_not_depend_on_the_texts_written_before(store, tmp_path):
    config = TrainConfig(
        **{**SETTINGS, "model": "random:tiny-opt", "dropout": True, "max_steps": 2}, store=str(store), output=""
    )
    for seed in (0, 1):
        train(replace(config, output=str(tmp_path / str(seed))), prompts=replace(PROMPTS, seed=seed))
    assert Left(tmp_path / "0").losses == Left(tmp_path / "1").losses


# Failures


def test_out_of_memory_is_recorded_said_and_a_row_of_the_table(cartilha, store, tmp_path, during_step):
    full = raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    during_step(dict.fromkeys(range(3, 9), full))
    outcome = cartilha("train", *FLAGS, "--store", store, "--output", tmp_path / "run")
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1].startswith("cartilha: The device ran out of memory even with one block per ")
    run = Left(tmp_path / "run")
    assert run.results["status"] == "out_of_memory" and "9 bytes" in run.results["error"]
    assert len(run.steps) == 2 and len(run.results["evaluations"]) == 1
    row = report_row(cartilha, tmp_path)
    assert row.startswith("| run | 32 |") and row.endswith("| out of memory |")


def test_memory_that_runs_out_on_the_way_halves_the_micro_batch_and_changes_no_result(
    store, tmp_path, during_step, unbroken
):
    full = raising(torch.OutOfMemoryError("CUDA out of memory"))
    during_step({3: full, 4: full, 8: terminate})  # four blocks do not fit, nor do two: in the third step
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run")
    run = Left(tmp_path / "run")
    during_step({})
    start(store, tmp_path / "run", resume="auto")
    sizes = [line["micro_batch_size"] for line in run.steps]
    assert sizes == [4, 4] + [1] * (len(sizes) - 2)  # what was learnt survives the resume
    assert run.results["settings"]["micro_batch_size"] == 1 and run.results["status"] == "finished"
    halvings = [notice for notice in run.results["notices"] if "Memory ran out in step 3 " in notice]
    assert len(halvings) == 2 and "going on with 2" in halvings[0] and "going on with 1" in halvings[1]
    assert run.losses == pytest.approx(unbroken.losses, rel=1e-4)
    assert [line["tokens"] for line in run.steps] == [line["tokens"] for line in unbroken.steps]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (9 GB)"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),  # Windows
    ],
    ids=["python", "cuda", "mps", "windows"],
)
def test_every_devices_lack_of_memory_is_recognised(store, tmp_path, during_step, error):
    during_step({1: raising(error)})
    with pytest.raises(OutOfMemoryError):
        start(store, tmp_path / "run", micro_batch_size=1)
    assert Left(tmp_path / "run").results["status"] == "out_of_memory"


def test_any_other_error_is_recorded_a_row_of_the_table_and_no_obstacle_to_going_on(
    cartilha, store, tmp_path, during_step, unbroken
):
    during_step({5: raising(RuntimeError("a fault of ours"))})
    with pytest.raises(RuntimeError, match="a fault of ours"):  # the traceback is wanted: exit code 1
        start(store, tmp_path / "run", checkpoint_steps=2)
    run = Left(tmp_path / "run")
    assert (run.results["status"], run.results["error"]) == ("failed", "a fault of ours")
    assert report_row(cartilha, tmp_path).endswith("| failed |")
    start(store, tmp_path / "run", resume="auto", checkpoint_steps=2)
    assert run.results["error"] is None and run.results["resumed_from_step"] == [4]
    assert_same_run(run, unbroken)


def report_row(cartilha: Any, tmp_path: Path) -> str:
    page = tmp_path / "page.html"
    outcome = cartilha("report", tmp_path / "run", "--output", page, "--json")
    assert outcome.code == 0 and "<html" in page.read_text(encoding="utf-8")
    return json.loads(outcome.out)["table"].strip().splitlines()[-1]


def test_ctrl_c_twice_stops_at_once_and_is_recorded(cartilha, store, tmp_path, during_step):
    during_step({3: raising(KeyboardInterrupt())})
    outcome = cartilha("train", *FLAGS, "--store", store, "--output", tmp_path / "run")
    assert outcome.code == 130 and outcome.err.endswith("cartilha: stopped.\n")
    assert Left(tmp_path / "run").results["status"] == "interrupted"
    assert report_row(cartilha, tmp_path).endswith("| interrupted |")


def test_a_diverged_run_stops_and_its_checkpoints_hold_no_damaged_weights(refused, store, tmp_path, during_step):
    flags = ["--store", store, "--output", tmp_path / "run", "--max_grad_norm", 1e9, "--checkpoint_steps", 1]
    message = refused("train", *FLAGS, *flags, "--lr", 1e9)
    assert "diverged: the last 5 steps" in message and "last good checkpoint is step-0000" in message
    run = Left(tmp_path / "run")
    assert run.results["status"] == "failed"
    assert [line.get("skipped") for line in run.steps[-5:]] == [True] * 5 and run.steps[0].get("skipped") is None
    for path in (run.path / "checkpoints").iterdir():
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path / "model.safetensors").values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_no_number_changes_no_weight_and_is_counted(store, tmp_path, monkeypatch, bad):
    weights: list[torch.Tensor] = []
    spoilt = (2, 3, 5)

    def patched(model: Any, batch: Any, dtype: torch.dtype, body: Any) -> torch.Tensor:
        weights.append(model.get_input_embeddings().weight.detach().clone())
        loss = batch_nll(model, batch, dtype, body)
        return loss * bad if len(weights) in spoilt else loss

    monkeypatch.setattr("cartilha.training.loop.batch_nll", patched)
    results = start(store, tmp_path / "run", max_steps=8)
    changed = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert changed == [step not in spoilt for step in range(1, 8)]
    run = Left(tmp_path / "run")
    assert [line["step"] for line in run.steps if line.get("skipped")] == list(spoilt)
    assert results["skipped_steps"] == 3 and results["status"] == "finished"
    assert any("Step 2 had a loss or gradient that is not a number" in notice for notice in results["notices"])
    assert results["evaluations"][-1]["perplexity"] < results["evaluations"][0]["perplexity"]


def test_a_job_that_fails_is_reported_too_and_goes_on_when_run_again(cartilha, corpus, tmp_path, during_step):
    recipe = tmp_path / "pequena.yaml"
    recipe.write_text(RECIPE.format(corpus=corpus), encoding="utf-8")
    job = ["run", recipe, "--output", tmp_path / "job"]
    during_step({4: terminate})
    outcome = cartilha(*job)
    assert outcome.code == 75
    page = (tmp_path / "job" / "report.html").read_text(encoding="utf-8")
    assert "interrupted" in page
    outcome = cartilha(*job, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["trained"]["resumed_from_step"] == [4]
    assert json.loads(outcome.out)["prepared"]["was_ready"] is True
    assert (tmp_path / "job" / "report.html").read_text(encoding="utf-8") != page
