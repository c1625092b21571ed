"""Validation between epochs, patience, the best weights in RUN/model, and English before and after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FLAGS, Left, assert_same_run, start, terminate
from safetensors.torch import load_file

from cartilha.config import EvaluateConfig
from cartilha.corpus.english import english_sample
from cartilha.errors import InterruptedRunError, UserError
from cartilha.pipeline.evaluate import evaluate
from cartilha.reporting.figures import run_figures
from cartilha.reporting.html import render_report
from cartilha.reporting.results import load_run
from cartilha.reporting.wording import Wording
from cartilha.training.schedule import SHAPES

WORSE = {"epochs": 8, "schedule": "ruinous", "warmup_fraction": 0.0, "patience": 3}


@pytest.fixture(scope="module", autouse=True)
def ruinous() -> Iterator[None]:
    """A schedule whose rate becomes so high after the first epoch that no later validation is better."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "ruinous", lambda done, final: 1.0 if done < 1 / 8 else 150.0)
        yield


@pytest.fixture(scope="module")
def impatient(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """A run that patience ended; not to be changed by a test."""
    path = tmp_path_factory.mktemp("impatient") / "run"
    start(store, path, **WORSE)
    return Left(path)


def losses_by_step(run: Left) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.results["evaluations"]}


def as_if_killed_before_its_end(run: Path) -> None:
    results = {**Left(run).results, "status": "running"}
    for name in ("model_step", "ended_by"):
        results.pop(name)
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    shutil.rmtree(run / "model")


def test_a_run_without_gain_ends_early_with_its_best_weights(impatient):
    results, losses = impatient.results, losses_by_step(impatient)
    per_epoch = results["packing"]["steps_per_epoch"]
    assert results["status"] == "finished" and results["ended_by"] == "patience"
    best = min(losses, key=losses.__getitem__)
    assert best == per_epoch and results["model_step"] == best
    assert list(losses) == [number * per_epoch for number in range(5)] and results["steps"] == 4 * per_epoch
    assert results["comparison"]["steps"] == [0, best]
    saved = load_file(impatient.path / "checkpoints" / f"step-{best:08d}" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in impatient.weights.items())


def test_the_figures_of_such_a_run_are_those_of_its_model(impatient, store, tmp_path):
    config = EvaluateConfig(model=(str(impatient.path / "model"),), store=str(store), dtype="float32")
    (measured,) = evaluate(config).to_dict()["models"]
    run, step = load_run(impatient.path), impatient.results["model_step"]
    assert run.after.step == step and run.after.bits_per_byte == pytest.approx(measured["bits_per_byte"], rel=1e-6)
    card = (impatient.path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"{measured['perplexity']:.2f}" in card and f"the weights those of step {step}" in card
    assert f"os pesos são os do passo {step}" in card
    page = render_report([impatient.path], tmp_path / "report.html").read_text(encoding="utf-8")
    last = impatient.results["steps"]
    assert f"RUN/model holds the weights of step {step}" in page and f"O último passo foi o {last}." in page
    assert "3 validations in a row brought no better value" in page and "O treino terminou antes: 3 validações" in page


def test_resumed_it_is_finished_and_another_patience_is_another_setting(cartilha, impatient, store, tmp_path):
    path = shutil.copytree(impatient.path, tmp_path / "run")
    asked = [part for name, value in WORSE.items() for part in (f"--{name}", value)]
    flags = [*FLAGS, *asked, "--store", store, "--output", path, "--resume", "auto"]
    outcome = cartilha("train", *flags)
    assert outcome.code == 0 and "is finished: nothing to do" in outcome.err
    step, last = impatient.results["model_step"], impatient.results["steps"]
    assert f"(the weights of step {step} of {last}, whose validation was the best)" in outcome.out.replace("\n", " ")
    with pytest.raises(UserError, match="patience was 3, now 4"):
        start(store, path, **{**WORSE, "patience": 4}, resume="auto")
    start(store, path, **{**WORSE, "patience": 4}, resume="auto", allow_changes=True)
    assert Left(path).results["resumed_from_step"] == [last] and Left(path).results["steps"] > last


@pytest.mark.parametrize("killed_at_the_end", [False, True])
def test_stopped_and_resumed_patience_ends_at_the_same_step(impatient, store, tmp_path, during_step, killed_at_the_end):
    path = tmp_path / "run"
    if killed_at_the_end:
        as_if_killed_before_its_end(shutil.copytree(impatient.path, path))
    else:
        during_step({impatient.results["steps"] - 2: terminate})
        with pytest.raises(InterruptedRunError):
            start(store, path, **WORSE)
    start(store, path, **WORSE, resume="auto")
    run = Left(path)
    assert_same_run(run, impatient)
    for name in ("ended_by", "model_step", "best_checkpoint", "steps"):
        assert run.results[name] == impatient.results[name]


def test_a_best_checkpoint_that_is_damaged_is_named_and_the_last_weights_are_kept(impatient, store, tmp_path):
    path = shutil.copytree(impatient.path, tmp_path / "run")
    as_if_killed_before_its_end(path)
    best = impatient.results["best_checkpoint"]
    (path / "checkpoints" / best / "model.safetensors").write_bytes(b"")
    results = start(store, path, **WORSE, resume="auto")
    assert results["model_step"] == results["steps"]
    assert f"The checkpoint {best} is damaged" in " ".join(results["notices"])


def test_where_the_last_is_the_best_nothing_is_said(unbroken):
    results = unbroken.results
    assert "better without it" not in " ".join(results["notices"])
    assert (results["ended_by"], results["model_step"]) == ("steps", results["steps"])
    assert "weights those of step" not in (unbroken.path / "model" / "README.md").read_text(encoding="utf-8")


def test_a_training_that_only_harms_is_said(store, tmp_path):
    results = start(store, tmp_path / "run", lr=3.0, warmup_fraction=0.0)
    losses = [row["loss"] for row in results["evaluations"]]
    assert losses[0] < min(losses[1:]) and results["model_step"] > 0
    assert "the model was better without it" in " ".join(results["notices"])


def test_patience_that_cannot_end_a_run_is_a_notice(store, tmp_path):
    notices = start(store, tmp_path / "run", patience=2)["notices"]
    assert "There is 1 validation before the last step, so --patience 2 cannot end" in " ".join(notices)


def test_validations_between_epochs_are_recorded_drawn_and_resumed(unbroken, store, tmp_path, during_step):
    asked = {"validate_every": "30%", "keep_last": 9, "keep_optimizer": True}
    start(store, tmp_path / "whole", **asked)
    whole = Left(tmp_path / "whole")
    steps, per_epoch = list(losses_by_step(whole)), whole.results["packing"]["steps_per_epoch"]
    assert steps[0] == 0 and len(steps) == 7 and {per_epoch, 2 * per_epoch} < set(steps)
    assert whole.losses == unbroken.losses  # a validation changes nothing
    losses, figure = losses_by_step(whole), run_figures(load_run(whole.path), Wording("en"))[0]
    (curve,) = [one for one in figure.series if one.css_class == "validation"]
    assert list(curve.xs) == steps
    for step in steps[1:]:  # each has a checkpoint that knows its loss, so that the best can be taken
        manifest = json.loads((whole.path / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text("utf-8"))
        assert manifest["validation_loss"] == pytest.approx(losses[step])
    during_step({steps[1] + 1: terminate})
    with pytest.raises(InterruptedRunError):
        start(store, tmp_path / "run", **asked)
    start(store, tmp_path / "run", **asked, resume="auto")
    assert_same_run(Left(tmp_path / "run"), whole)


def test_the_same_rhythm_may_be_written_otherwise(store, tmp_path):
    start(store, tmp_path / "run", validate_every="0.2k")
    assert start(store, tmp_path / "run", validate_every="200", resume="auto")["status"] == "finished"
    with pytest.raises(UserError, match="validate_every was 200, now 300"):
        start(store, tmp_path / "run", validate_every="300", resume="auto")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--validate_every", "often"], "--validate_every is a number of tokens such as 2000000 or 2m"),
        (["--patience", 0], "--patience must be 1 or more, not 0."),
        (["--optimizer", "sgd"], "There is no optimizer 'sgd'; choose from auto, adamw, rmsprop, muon, adafactor."),
    ],
)
def test_mistakes_are_one_sentence(refused, store, tmp_path, arguments, sentence):
    assert sentence in refused("train", *FLAGS, "--store", store, "--output", tmp_path / "run", *arguments)


def english_of(run: Left) -> dict[str, Any]:
    found = run.results["english"]
    assert isinstance(found, dict)
    return found


def test_english_is_measured_before_and_after_as_evaluate_does(cartilha, store, tmp_path, during_step):
    path = tmp_path / "run"
    flags = [flag for flag in FLAGS if flag != "--skip_english"]
    during_step({2: terminate})
    assert cartilha("train", *flags, "--store", store, "--output", path).code == 75
    assert english_of(Left(path)).keys() == {"before"}
    outcome = cartilha("train", *flags, "--store", store, "--output", path, "--resume", "auto")
    english = english_of(Left(path))
    text = tmp_path / "english.txt"
    text.write_text("\n".join(english_sample()) + "\n", encoding="utf-8")
    models = ("random:tiny", str(path / "model"))
    scored = evaluate(EvaluateConfig(model=models, input=(str(text),), dtype="float32")).to_dict()["models"]
    for when, measured in zip(("before", "after"), scored, strict=True):
        for name in ("bits_per_byte", "bits_per_byte_interval", "num_tokens", "num_documents"):
            assert english[when][name] == pytest.approx(measured[name], rel=1e-6), (when, name)
    assert (english["before"]["step"], english["after"]["step"]) == (0, Left(path).results["steps"])
    difference = english["after"]["bits_per_byte"] - english["before"]["bits_per_byte"]
    low, high = english["bits_per_byte_difference_interval"]
    assert english["bits_per_byte_difference"] == pytest.approx(difference) and low < difference < high
    shown = f"{english['before']['bits_per_byte']:.4f} -> {english['after']['bits_per_byte']:.4f} bits/byte"
    assert f"English sample: {shown}" in outcome.out
    page = render_report([path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "English sample, bits per byte" in page and "Amostra em inglês, 24 textos:" in page
    assert f"{english['after']['bits_per_byte']:.3f}" in page
    card = (path / "model" / "README.md").read_text(encoding="utf-8")
    shown = f"{english['before']['bits_per_byte']:.3f}"
    assert f"English sample, bits per byte | {shown} [" in card
    assert f"amostra em inglês, bits por byte | {shown.replace('.', ',')} [" in card
    assert f"changed by {difference:+.3f}" in card.replace("−", "-")


def test_english_may_be_skipped_and_changes_nothing_of_the_training(unbroken, store, tmp_path):
    assert "english" not in unbroken.results
    start(store, tmp_path / "run", skip_english=False)
    assert_same_run(Left(tmp_path / "run"), unbroken)
