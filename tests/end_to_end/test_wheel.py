"""The built wheel holds all that a stranger needs: recipes, templates and the primer, outside the clone."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory with the wheel's contents and nothing of the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return wheel, target


def run_installed(target, folder, *arguments):
    """Run the command from the installed wheel: the clone's editable install comes after it on the path."""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    command = [sys.executable, "-m", "cartilha", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_data(installed):
    names = set(zipfile.ZipFile(installed[0]).namelist())
    texts = {"corpus/primer/texts.jsonl", "corpus/english/texts.txt"}
    wanted = {"recipes/demo.yaml", "recipes/opt-125m-pt.yaml", "py.typed"} | texts
    assert {f"cartilha/{name}" for name in wanted} <= names
    assert any(name.startswith("cartilha/reporting/templates/") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_a_recipe_runs_by_name_outside_the_clone(installed, tmp_path):
    where = subprocess.run(
        [sys.executable, "-c", "import cartilha; print(cartilha.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed[1])},
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(installed[1])), "the clone was imported, not the wheel"
    overrides = [
        "--model",
        "random:tiny",
        "--output",
        "job",
        "--prepare.limit_documents",
        "20",
        "--train.max_steps",
        "2",
    ]
    overrides += ["--train.block_size", "64", "--train.batch_tokens", "256", "--generate.max_new_tokens", "4", "--json"]
    done = run_installed(installed[1], tmp_path, "run", "demo", *overrides)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trained"]["status"] == "finished"
    assert (tmp_path / "job" / "report.html").stat().st_size > 5_000
