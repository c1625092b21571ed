"""The command line: the only module that reads arguments.

Each command's flags are made from its configuration's fields (name, type, default, help), so that an option is
documented where it is defined. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import logging
import os
import re
import sys
import typing
from argparse import Action
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import SUPPRESS, ArgumentParser

from cartilha import config as configs
from cartilha.console import OptionNames, named_options, set_up_logging, silence_bars
from cartilha.errors import UserError
from cartilha.storage import DISK_FAULTS, system_error

log = logging.getLogger("cartilha")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        config: Its configuration; the flags are made from the fields.
        home: The module of the function that does it, and the function's name; imported when it is run.
        summary: One line for the help.
    """

    config: type[Any]
    home: tuple[str, str]
    summary: str


COMMANDS = {
    name: Command(
        config,
        (f"cartilha.pipeline.{'job' if config is configs.RunConfig else name}", "run" if name == "demo" else name),
        summary,
    )
    for name, config, summary in (
        ("demo", configs.RunConfig, "the whole job on what ships with the package"),
        ("run", configs.RunConfig, "the whole job, as a recipe says (built-in name or YAML file)"),
        ("prepare", configs.PrepareConfig, "text to a token store"),
        ("inspect", configs.InspectConfig, "what a store, or the primer, holds"),
        ("check", configs.CheckConfig, "is the set-up right, before the money is spent?"),
        ("plan", configs.PlanConfig, "memory, speed, hours and money of a training, before a card is rented"),
        ("train", configs.TrainConfig, "continue a model's training on a store"),
        ("evaluate", configs.EvaluateConfig, "perplexity and bits per byte of models on held-out text"),
        ("compare", configs.CompareConfig, "two models on the same documents"),
        ("generate", configs.GenerateConfig, "text written by a model"),
        ("vocab", configs.VocabConfig, "what a text costs under a model's vocabulary; extend it; whether that pays"),
        ("report", configs.ReportConfig, "one offline page about runs"),
        ("explore", configs.ExploreConfig, "a local page: models token by token, a store"),
        ("push", configs.PushConfig, "a model onto the hub, with its card"),
    )
}


# What writes files and would write them twice under torchrun.
_ONE_PROCESS = ("demo", "run", "prepare", "vocab", "push")


class _Parser(ArgumentParser):
    """Raises our one-sentence errors instead of printing a usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_one_sentence(message, self)) from ex


class _Accumulate(Action):
    """A repeated list option adds to the list; argparse's own `extend` forgets it where the name has a dot."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace[self.dest] = [*(namespace.get(self.dest) or ()), *values]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0 (done), 2 (a user's error), 3 (a failed check) or 75 (interrupted, saved)."""
    _use_utf8()
    set_up_logging()
    silence_bars()
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"cartilha: {named_options(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away (`cartilha ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("cartilha: stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        fault = system_error(error)
        if fault is not None and fault.errno in DISK_FAULTS:
            place = fault.filename2 or fault.filename
            print(
                f"cartilha: Nothing can be written{f' to {place}' if place else ''} ({fault.strerror}); "
                "check the path, its permissions and the free space.",
                file=sys.stderr,
            )
            return 2
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        print(f"cartilha: {named_options(str(error))}", file=sys.stderr)
        return int(exit_code)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("cartilha"))
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}."
        raise UserError(f"There is no command {name!r}; {hint}")
    if name in _ONE_PROCESS and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{name} works in one process; run it without torchrun (train and evaluate share their work).")
    command = COMMANDS[name]
    parser = _parser(name, command, rest)
    try:
        values = vars(parser.parse_args(_tied(rest, parser)).as_flat())
    except SystemExit as exit_request:  # --help
        return int(exit_request.code or 0)
    homes = {name: it.config for name, it in COMMANDS.items() if it.config is not configs.RunConfig}
    log.handlers[0].addFilter(OptionNames(_flags(parser), homes))
    as_json = bool(values.pop("json", False))
    print_config = bool(values.pop("print_config", False))
    if "config" in values:
        values = {**_config_values(values.pop("config"), name, parser), **values}
    settings = _job_settings(name, values) if command.config is configs.RunConfig else command.config(**values)
    if print_config:
        import yaml

        print(yaml.safe_dump(_settable(settings), sort_keys=False, allow_unicode=True), end="")
        return 0
    from cartilha.pipeline.preflight import preflight

    preflight(settings)  # a mistake is named before the command's module is imported, which takes seconds
    module, function = command.home
    result = getattr(importlib.import_module(module), function)(settings)
    from cartilha.machine.processes import is_main_process
    from cartilha.storage import to_json

    if not is_main_process():  # under torchrun every process has the result, and one says it
        return 0
    if as_json:
        print(to_json(result.to_dict(), indent=2))
    else:
        from cartilha.terminal.results import show

        show(name, result.to_dict())
    return int(getattr(result, "exit_code", 0))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "cartilha: teach a pretrained causal language model to read Portuguese, and measure the result.",
            "",
            "usage: cartilha COMMAND [options]     (cartilha COMMAND --help lists the options of a command)",
            "",
            *lines,
            "",
            "Every command takes --json (results on standard output) and --print_config.",
        ]
    )


def _parser(name: str, command: Command, words: Sequence[str] = ()) -> _Parser:
    """The parser of a command; of what follows its name only `--help` and a recipe's name are looked at."""
    parser = _new_parser(f"cartilha {name}", (command.config.__doc__ or "").split("\n")[0])
    if name == "run":
        parser.add_argument("recipe", help="a built-in recipe's name or a YAML file")
    if command.config is configs.RunConfig:
        recipe = "demo" if name == "demo" else words[0] if words and not words[0].startswith("-") else None
        asks_help = not {"-h", "--help"}.isdisjoint(words)
        _add_job_flags(parser, _recipe_values(recipe) if recipe and asks_help else {})
    else:
        _add_flags(parser, command.config, "", {})
        more = "a YAML file of these options (RUN/config.yaml, or what --print_config prints); those given here win"
        parser.add_argument("--config", type=str, default=SUPPRESS, help=more)
    parser.add_argument("--json", action="store_true", default=SUPPRESS, help="print the result as one JSON object")
    parser.add_argument(
        "--print_config", action="store_true", default=SUPPRESS, help="print the resolved settings and stop"
    )
    return parser


def _tied(words: Sequence[str], parser: _Parser) -> list[str]:
    """Tie values that begin with a dash to their options (`--prompt=-Olá`): argparse would take them for options."""
    takes = {flag: action.nargs for action in parser._actions if action.nargs != 0 for flag in action.option_strings}
    tied: list[str] = []
    option, again = "", False
    for word in words:
        name = word.split("=")[0]
        if name in _flags(parser) or (name.startswith("--") and " " not in name):
            option, again = word if word in takes else "", False
        elif option:
            if again or word.startswith("-"):
                if tied[-1] == option:
                    tied.pop()
                word, again = f"{option}={word}", True
            option = option if takes[option] == "+" else ""  # one value is all that the others take
        tied.append(word)
    return tied


def _new_parser(prog: str, description: str = "") -> _Parser:
    # jsonargparse gives --print_config a meaning of its own unless it is told not to.
    # Abbreviations would change their meaning with each option that is added.
    return _Parser(prog=prog, description=description, exit_on_error=False, print_config=None, allow_abbrev=False)


# Of a job's stages, what the job itself sets.
_SET_BY_JOB = {"prepare": ("model", "output"), "train": ("model", "store", "output", "resume"), "generate": ("model",)}


def _add_job_flags(parser: _Parser, recipe: dict[str, Any]) -> None:
    _add_flags(parser, configs.RunConfig, "", recipe, skip=tuple(_SET_BY_JOB))
    for stage, hidden in _SET_BY_JOB.items():
        _add_flags(parser, _stage_type(stage), f"{stage}.", recipe, skip=hidden)


def _stage_type(stage: str) -> type[Any]:
    stage_type = typing.get_type_hints(configs.RunConfig)[stage]
    assert isinstance(stage_type, type)
    return stage_type


def _add_flags(
    parser: _Parser, config: type[Any], prefix: str, defaults: dict[str, Any], *, skip: tuple[str, ...] = ()
) -> None:
    """A flag a field. Defaults stay in the dataclass: what was not given is not in the parsed values.

    `defaults` are shown by the help instead of the fields' own.
    """
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        if item.name in skip:
            continue
        name, hint = f"{prefix}{item.name}", hints[item.name]
        is_list = typing.get_origin(hint) is tuple
        help_text, hidden = str(item.metadata["help"]), item.metadata.get("hidden")
        if name in defaults or not item.metadata.get("required"):
            help_text += f" (default: {_show_default(defaults.get(name, item.default))})"
        # One command or another takes one model or several: both spellings are understood everywhere.
        flags = ["--model", "--models"] if name in ("model", "models") else [f"--{name}"]
        flag: dict[str, Any] = {"dest": name, "default": SUPPRESS, "help": SUPPRESS if hidden else help_text}
        if item.metadata.get("positional"):
            parser.add_argument(item.name, type=str, nargs="+" if is_list else None, help=help_text)
        elif hint is bool:
            parser.add_argument(*flags, action="store_true", **flag)
        elif is_list:
            parser.add_argument(*flags, type=str, nargs="+", action=_Accumulate, **flag)
        else:
            parser.add_argument(*flags, type=hint, **flag)


def _show_default(default: Any) -> str:
    if isinstance(default, tuple | list):
        return " ".join(repr(value) for value in default) or "none"
    return "none" if default is None or default == "" else str(default)


def _job_settings(name: str, values: dict[str, Any]) -> configs.RunConfig:
    """A recipe's values, then those of the command line over them."""
    recipe = "demo" if name == "demo" else str(values.pop("recipe"))
    merged = {**_recipe_values(recipe), **values}
    merged.setdefault(
        "output", "demo" if name == "demo" else os.path.join("runs", re.sub(r"\.ya?ml$", "", os.path.basename(recipe)))
    )
    own = {key: value for key, value in merged.items() if "." not in key}
    stages = {
        stage: _stage_type(stage)(
            **{key.removeprefix(f"{stage}."): value for key, value in merged.items() if key.startswith(f"{stage}.")}
        )
        for stage in _SET_BY_JOB
    }
    return configs.RunConfig(**own, **stages)


def _recipe_values(name: str) -> dict[str, Any]:
    from cartilha.pipeline.recipes import read_recipe

    parser = _new_parser(f"recipe {name}")
    _add_job_flags(parser, {})
    return _parsed(read_recipe(name), parser, f"the recipe {name}")


def _config_values(path: str, command: str, parser: _Parser) -> dict[str, Any]:
    """The values in a file given by --config: all of it, or the section that has the command's name."""
    from cartilha.pipeline.recipes import read_settings

    values = read_settings(path, f"The file {path}")
    section = values.get(command)
    values = section if isinstance(section, dict) else values
    return _parsed({key: value for key, value in values.items() if value != []}, parser, path)


def _parsed(values: dict[str, Any], parser: _Parser, place: str) -> dict[str, Any]:
    """A file's values as parsed flags: the same names, types and errors as on the command line."""
    words: list[str] = []
    try:
        for key, value in _flatten(values):
            if f"--{key}" not in _flags(parser):
                raise UserError(_no_such_option(f"--{key}", parser))
            if isinstance(value, list) and parser._option_string_actions[f"--{key}"].nargs == "+" and value:
                words += [f"--{key}={item}" for item in value]
            elif isinstance(value, list) or value is True:
                words += [f"--{key}", *(map(str, value) if isinstance(value, list) else ())]
            elif value is not None and value is not False:
                words.append(f"--{key}={value}")
        return vars(parser.parse_args(words).as_flat())
    except UserError as error:
        raise UserError(f"In {place}: {error}") from error


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def _settable(settings: Any) -> dict[str, Any]:
    """Settings as plain values; of a job's stages only what a recipe can set, so that the output is a recipe."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))  # tuples become lists
    if isinstance(settings, configs.RunConfig):
        for stage, hidden in _SET_BY_JOB.items():
            for name in hidden:
                del values[stage][name]
            # A flag without values cannot be given.
            values[stage] = {name: value for name, value in values[stage].items() if value != []}
    return values


def _one_sentence(message: str, parser: _Parser) -> str:
    """Jsonargparse's message as one line, with the nearest flag where an unknown one was given."""
    text = " ".join(line.strip() for line in message.strip().splitlines() if line.strip())
    wrong = re.search(r'[Pp]arser key "([^"]+)".*(?:Got value|Given value): *(.*?)\.?$', text)
    if wrong is not None:
        return f"--{wrong[1]} cannot be {wrong[2]!r}; --help says what it takes."
    unknown = [word for word in text.replace(",", " ").split() if word.startswith("--")]
    if "nrecognized" in text and unknown:
        return _no_such_option(unknown[0].split("=")[0], parser)
    if "nrecognized" in text:
        return f"{text.split(': ', 1)[-1]!r} was not expected here; --help lists the options."
    return text if text.endswith((".", "?")) else text + "."


def _no_such_option(name: str, parser: _Parser) -> str:
    helps = {flag[2:]: str(action.help) for action in parser._actions for flag in action.option_strings}
    wanted = name.removeprefix("--")
    stage, _, word = wanted.rpartition(".")
    same = [word, *(n for n, theirs in configs.NAMES_ELSEWHERE.items() if word.replace("-", "_") in theirs.split())]
    elsewhere = [n for n in helps if n.startswith(stage) and n.rpartition(".")[2] in same]
    # A beginning of one name (--epoch), else the name of it here, else the one that is spelt most like it.
    close = [n for n in helps if n.startswith(wanted)] or elsewhere or difflib.get_close_matches(wanted, helps, 1, 0.8)
    if not close:
        return f"There is no option {name}; --help lists the options."
    meaning = f" ({helps[close[0]].split(' (default')[0]})" if close is elsewhere else ""
    return f"There is no option {name}; did you mean --{close[0]}{meaning}?"


def _flags(parser: ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def _use_utf8() -> None:
    """Windows consoles may speak another encoding; a text must never fail to print."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")
