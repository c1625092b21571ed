"""An option that is marked as deciding the result is guarded wherever results are used again, whoever defines it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cartilha.config import COMMANDS, GenerateConfig, PrepareConfig, TrainConfig
from cartilha.errors import UserError
from cartilha.option_groups import ComputeOptions
from cartilha.pipeline.prepare import prepare
from cartilha.runs import setup
from cartilha.settings import deciding, option, options


@dataclass(frozen=True, kw_only=True)
class PreparedOtherwise(PrepareConfig):
    shape: tuple[str, ...] = deciding(("round",), "an option from outside")
    colour: str = option("red", "another one, which decides nothing")


@dataclass(frozen=True, kw_only=True)
class TrainedOtherwise(TrainConfig):
    shape: str = deciding("round", "an option from outside")
    colour: str = option("red", "another one, which decides nothing")


def test_a_store_made_with_another_value_of_a_new_option_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("um\ndois\ntrês\nquatro\n", encoding="utf-8")
    known = {"input": tmp_path / "a.txt", "model": "random:tiny", "output": tmp_path / "store"}
    prepare(PrepareConfig(**known))
    config = PreparedOtherwise(**known)
    assert prepare(config).was_ready  # the store is older than the option: its default
    assert prepare(replace(config, colour="blue")).was_ready
    with pytest.raises(UserError, match="was made with another shape; "):
        prepare(replace(config, shape=("square",)))
    prepare(replace(config, shape="square", overwrite=True))
    assert prepare(replace(config, shape="square")).was_ready
    with pytest.raises(UserError, match="was made with another shape; "):
        prepare(config)


def test_a_run_does_not_go_on_with_another_value_of_a_new_option(monkeypatch):
    config, path = TrainedOtherwise(lr=1.0, epochs=2), Path("run")
    results = {
        "settings": {**setup._asked(config, setup._schedule(config, 5, 3)), "num_parameters": 5},
        "corpus": {"train_hash": ""},
        "packing": {"steps_per_epoch": 3},
    }
    monkeypatch.setattr(setup, "read_status", lambda path: "finished")
    monkeypatch.setattr(setup, "read_results", lambda path: results)
    assert setup.is_finished_as_asked(replace(config, colour="blue", keep_last=9), path)
    with pytest.raises(UserError, match="shape was round, now square"):
        setup.is_finished_as_asked(replace(config, shape="square"), path)
    with pytest.raises(UserError, match=r"time_budget_s was None, now 60\.0"):
        setup.is_finished_as_asked(replace(config, time_budget="1m"), path)


def test_the_home_directory_can_be_written_as_a_tilde(monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path("/home/ana")))
    ana = Path("/home/ana")
    config = PrepareConfig(input=("~/textos/*.txt", "b~/c"), output=Path("~/acervo"))
    assert [Path(config.output), *map(Path, config.input)] == [ana / "acervo", ana / "textos/*.txt", Path("b~/c")]
    assert GenerateConfig(model="~/modelo", prompt="~/ é a sua pasta").prompt == ("~/ é a sua pasta",)


def test_options_of_a_group_come_after_a_commands_own():
    for config in COMMANDS.values():
        if issubclass(config, ComputeOptions):
            names = [item.name for item in options(config)]
            assert names[0] in ("model", "models", "run") and names[-2:] == ["dtype", "device"]
            assert list(config().to_dict()) == names
