"""Two and four processes, replicated and sharded: the losses of one, also killed and resumed in another number.

    python -m pytest tests/end_to_end/test_numbers_of_processes.py --all-processes -rP

`make test` has a part of it (test_processes.py, test_sharding.py); this takes minutes.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from processes import run_processes
from runs import Left

TRAIN = ["train", "--model", "random:tiny", "--dtype", "float32", "--lr", 3e-3, "--block_size", 32]
TRAIN += ["--batch_tokens", 160, "--max_steps", 12, "--checkpoint_steps", 3, "--skip_english", "--skip_checks"]
LARGEST, LARGEST_IN_HALF = 1e-5, 1e-3  # difference of losses, in nats per token
CASES = {
    "replicated": ["--shard", "none"],
    "sharded": ["--shard", "full"],
    "adapter, sharded": ["--shard", "full", "--lora", 4],
    "adapter on bfloat16, sharded": ["--shard", "full", "--lora", 4, "--lora_base", "bfloat16", "--dtype", "auto"],
}


@pytest.fixture(scope="module", autouse=True)
def asked_for(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--all-processes"):
        pytest.skip("takes minutes; --all-processes runs it")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> list[object]:
    """The options of a run that are the same for any number of processes."""
    if "--lora" in CASES[request.param]:
        pytest.importorskip("peft", reason="needs peft (extra adapters)")
    return [*TRAIN, *CASES[request.param]]


@pytest.fixture(scope="module")
def alone(case: list[object], store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process; its steps have five blocks, which neither two nor four processes share evenly."""
    folder = tmp_path_factory.mktemp("alone")
    assert run_processes(1, folder, *case, "--store", store, "--output", folder / "run").codes == [0]
    return Left(folder / "run").losses


def compare(path: Path, alone: list[float]) -> None:
    losses, in_half = Left(path).losses, Left(path).results["settings"]["dtype"] != "float32"
    assert len(losses) == len(alone) == 12
    largest = max(abs(one - other) for one, other in zip(losses, alone, strict=True))
    print(f"largest difference: {largest:.1e}")
    assert largest <= (LARGEST_IN_HALF if in_half else LARGEST)


@pytest.mark.parametrize("number", [2, 4])
def test_processes_train_as_one(case, alone, store, tmp_path, number):
    found = run_processes(number, tmp_path, *case, "--store", store, "--output", tmp_path / "run")
    assert found.codes == [0] * number, found.errs
    compare(tmp_path / "run", alone)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 1), (1, 2), (2, 4)])
def test_a_killed_run_goes_on_with_another_number(case, alone, store, tmp_path, before, after):
    path = tmp_path / "run"
    settings = [*case, "--store", store, "--output", path]
    found = run_processes(before, tmp_path, *settings, lost=(before - 1, 8))
    assert found.codes == [75] * (before - 1) + [-signal.SIGKILL], found.errs
    for said in found.errs[: before - 1]:
        last = said.splitlines()[-1]
        assert last.startswith(f"cartilha: Another of the {before} processes has ended") and "Traceback" not in said
        assert "the run goes on from step-0000000" in last  # 3, if the checkpoint of step 6 was still being written
    found = run_processes(after, tmp_path / "again", *settings, "--resume", "auto")
    assert found.codes == [0] * after and "Going on from step " in found.errs[0], found.errs
    compare(path, alone)
