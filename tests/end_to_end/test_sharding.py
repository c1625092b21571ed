"""Sharded models: the losses of one process, checkpoints that any number of processes goes on from, lost processes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from processes import Outcome, in_processes, run_processes
from runs import Left, start
from safetensors.torch import load_file

from cartilha.blocks.sampler import BlockSampler
from cartilha.config import TrainConfig
from cartilha.errors import UserError
from cartilha.machine.processes import world
from cartilha.model.configuration import model_config
from cartilha.model.load import load_model
from cartilha.model.sharding import shard_model
from cartilha.runs.sharing import is_to_be_sharded
from cartilha.tokens.packed import PackedDocuments
from cartilha.training.checkpoint import drop_optimizer_states, list_checkpoints, newest_sound_checkpoint
from cartilha.training.checkpoint_shards import check_shards
from cartilha.training.loop import StepSettings, train_steps
from cartilha.training.profiles import Profile
from cartilha.training.schedule import Schedule
from cartilha.training.state import TrainingState

SETTINGS = {
    "block_size": 32,
    "batch_tokens": 160,
    "epochs": 1,
    "max_steps": 6,
    "checkpoint_steps": 2,
    "seed": 3,
    "keep_last": 3,
    "optimizer": "adamw",  # which a GPU's steps take
}
QUICK = ("--skip_english", "--skip_checks")


def flags(store: Path, output: Path, **changes: Any) -> list[object]:
    values = {"model": "random:tiny", "dtype": "float32", "lr": 3e-3, "store": store, "output": output, **SETTINGS}
    values |= changes
    words = [part for name, value in values.items() for part in (f"--{name}", value)]
    return ["train", *words]


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Six steps in one process; each has five blocks, which no two processes share evenly."""
    path = tmp_path_factory.mktemp("alone") / "run"
    start(store, path, **SETTINGS)
    return Left(path)


@pytest.fixture(scope="module")
def two(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Left, Outcome]:
    path = tmp_path_factory.mktemp("two") / "run"
    twice = "--gradient_checkpointing"  # changes no figure
    outcome = run_processes(2, path.parent, *flags(store, path, shard="full"), "--keep_optimizer", twice)
    return Left(path), outcome


def test_two_sharded_processes_train_as_one(two, alone):
    run, outcome = two
    assert outcome.codes == [0, 0], outcome.errs
    assert run.losses == pytest.approx(alone.losses, abs=1e-5)

    norms = [[line["grad_norm"] for line in left.steps] for left in (run, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for one, other in zip(run.results["evaluations"], alone.results["evaluations"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert run.results["english"]["after"]["bits_per_byte"] < run.results["english"]["before"]["bits_per_byte"]
    assert run.results["comparison"]["steps"] == [0, 6]
    assert {row["step"] for row in run.lines("samples.jsonl")} == {0, 6}
    # The whole model is there at the end, as that of one process.
    weights, expected = run.weights, alone.weights
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in weights)
    assert (run.path / "model" / "config.json").read_bytes() == (alone.path / "model" / "config.json").read_bytes()


def copied(run: Left, path: Path, keep: int) -> Path:
    """A run as if it had been killed after that step."""
    shutil.copytree(run.path, path)
    (path / "results.json").write_text(json.dumps({**run.results, "status": "running"}), encoding="utf-8")
    for checkpoint in list_checkpoints(path):
        if int(checkpoint.name[5:]) > keep:
            shutil.rmtree(checkpoint)
    return path


def test_one_process_goes_on_from_what_two_wrote(cartilha, two, alone, store, tmp_path):
    path = copied(two[0], tmp_path / "run", keep=4)
    found = cartilha(*flags(store, path, shard="full"), "--resume", "auto", "--skip_english")
    assert found.code == 0 and "Going on from step 4" in found.err
    assert "There is one process, which holds the whole model" in found.err
    assert Left(path).losses == pytest.approx(alone.losses, abs=1e-5)


def test_four_sharded_processes_go_on_from_what_one_wrote(store, alone, tmp_path):
    path = tmp_path / "run"
    start(store, path, **SETTINGS, keep_optimizer=True)
    copied(Left(path), tmp_path / "killed", keep=4)
    found = run_processes(4, tmp_path, *flags(store, tmp_path / "killed", shard="full"), "--resume", "auto", *QUICK)
    assert found.codes == [0] * 4, found.errs
    assert "Going on from step 4" in found.errs[0]
    assert Left(tmp_path / "killed").losses == pytest.approx(alone.losses, abs=1e-5)


def test_a_lost_process_ends_the_others_in_a_sentence_and_the_run_goes_on(cartilha, store, alone, tmp_path):
    path = tmp_path / "run"
    found = run_processes(2, tmp_path, *flags(store, path, shard="full"), *QUICK, lost=(1, 4))
    assert found.codes == [75, -signal.SIGKILL], found.errs
    assert "Traceback" not in found.errs[0]
    last = found.errs[0].splitlines()[-1]
    assert last.startswith("cartilha: Another of the 2 processes has ended") and "from step-00000002" in last
    assert Left(path).results["status"] == "interrupted"
    assert cartilha(*flags(store, path), "--resume", "auto", "--skip_english").code == 0
    assert Left(path).losses == pytest.approx(alone.losses, abs=1e-5)


def test_an_adapter_is_shared_out_with_its_base(cartilha, store, tmp_path):
    pytest.importorskip("peft", reason="needs peft (extra adapters)")
    adapter = {"lora": 4, "max_steps": 4, "seed": 0}
    assert cartilha(*flags(store, tmp_path / "alone", **adapter), *QUICK).code == 0
    asked = [*flags(store, tmp_path / "two", shard="full", **adapter), "--keep_optimizer", *QUICK]
    found = run_processes(2, tmp_path, *asked)
    assert found.codes == [0, 0] and "Sharded: each of 2 processes" in found.errs[0], found.errs
    run, alone = Left(tmp_path / "two"), Left(tmp_path / "alone")
    assert run.losses == pytest.approx(alone.losses, abs=1e-5)
    weights, expected = (load_file(left.path / "model" / "adapter_model.safetensors") for left in (run, alone))
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in weights)
    assert cartilha("evaluate", "--model", run.path, "--store", store).code == 0  # its base is known by its weights

    path = copied(run, tmp_path / "killed", keep=2)
    assert cartilha(*flags(store, path, **adapter), "--resume", "auto", *QUICK).code == 0
    assert Left(path).losses == pytest.approx(alone.losses, abs=1e-5)


def test_lean_weights_are_never_silently_whole_in_each_process(caplog, monkeypatch):
    """A resumed run keeps its profile, which the options need not name."""
    monkeypatch.setattr("cartilha.runs.sharing.world", lambda: (0, 2))
    lean, shape = Profile(lean=True, checkpointing=False), model_config("random:tiny")

    def is_sharded(shard: Literal["auto", "full"]) -> bool:
        config = TrainConfig(model="random:tiny", block_size=32, shard=shard, optimizer="adamw")
        return is_to_be_sharded(config, lean, shape, torch.device("cpu"), torch.bfloat16)

    with pytest.raises(UserError, match="since it is trained with --memory lean, which works on whole weights"):
        is_sharded("full")
    caplog.set_level("INFO", "cartilha")
    assert not is_sharded("auto") and "Replicated: each of 2 processes holds the whole model" in caplog.text


def test_a_part_of_a_checkpoint_that_is_lost_or_damaged_is_noticed(two, tmp_path, caplog):
    path = copied(two[0], tmp_path / "run", keep=4)
    newest, older = (path / "checkpoints" / name for name in ("step-00000004", "step-00000002"))
    (newest / "shard-00002-model-00001-of-00002.safetensors").unlink()
    assert newest_sound_checkpoint(path) == older
    damaged = older / "shard-00001-model-00002-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert newest_sound_checkpoint(path) is None
    shapes = {name: tuple(value.shape) for name, value in two[0].weights.items()}
    with pytest.raises(ValueError, match=r"embed_tokens.weight is torch.float32 \[130, 64\], not float32 \[259"):
        check_shards(newest, shapes, of_states=False)


def test_the_states_of_a_finished_sharded_run_are_dropped(two, tmp_path):
    path = copied(two[0], tmp_path / "run", keep=6)
    drop_optimizer_states(path)
    assert newest_sound_checkpoint(path) == path / "checkpoints" / "step-00000006"
    assert not list(path.rglob("*model-00002-of-00002*"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizer": "adafactor"}, "works on whole weights"),
        ({"lora": 4, "lora_base": "4bit", "dtype": "bfloat16"}, "A base of 4 bits is held whole by each process"),
    ],
)
def test_what_cannot_be_sharded_is_refused(refused, monkeypatch, store, tmp_path, wrong, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("cartilha.pipeline.preflight.find_spec", lambda module: True)
    assert said in refused(*flags(store, tmp_path / "run", shard="full", **wrong))


def in_half_precision(rank: int, folder: Path) -> None:
    """Three steps of a sharded Llama with layers gathered in bfloat16, and the same in one process.

    Gradients are scaled, as in fp16, and multiplied by the perplexity.
    """
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 256, length) for length in generator.integers(5, 40, 60)]
    documents = PackedDocuments.from_ids(ids, prefix_id=256, end_id=257)
    sampler = BlockSampler(documents, block_size=16, blocks_per_step=5, seed=0)
    schedule = Schedule(3, 1e-3, warmup_fraction=0.0, final_lr_fraction=1.0)
    model = load_model("random:tiny", torch.device("cpu")).model
    if world()[1] == 2:
        shard_model(model, torch.device("cpu"), torch.bfloat16)
        assert not any(parameter.dtype != torch.float32 for parameter in model.parameters())
    state = TrainingState.begin(model, torch.float16, lr=1e-3, weight_decay=0.1, optimizer="muon")
    steps = train_steps(state, sampler, schedule, StepSettings(torch.bfloat16, 2, loss="perplexity"))
    (folder / f"{rank}.json").write_text(json.dumps([float(step.loss) for step in steps]))


def test_layers_are_gathered_in_half_precision_and_muon_steps_whole_matrices(tmp_path):
    for number in (1, 2):
        in_processes(number, in_half_precision, tmp_path / str(number))
    alone, two, other = (json.loads((tmp_path / name).read_text()) for name in ("1/0.json", "2/0.json", "2/1.json"))
    assert two == other and two == pytest.approx(alone, abs=2e-3)
