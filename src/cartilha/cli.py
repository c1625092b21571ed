"""The command line: results go to standard output, everything else to standard error."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cartilha.arguments import Parser, make_settings
from cartilha.config import COMMANDS, RunConfig
from cartilha.console import OptionNames, set_up_logging, silence_bars
from cartilha.errors import UserError, log
from cartilha.settings import Settings
from cartilha.storage import DISK_FAULTS, system_error

# These write files, and would write them twice under torchrun.
_ONE_PROCESS = ("demo", "run", "prepare", "vocab", "merge", "push")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0 (done), 2 (a user's error), 3 (a failed check) or 75 (interrupted, saved)."""
    for stream in (sys.stdout, sys.stderr):  # Windows consoles may speak another encoding; a text must always print
        reconfigure: Callable[..., None] = getattr(stream, "reconfigure", lambda **options: None)
        reconfigure(encoding="utf-8", errors="replace")
    set_up_logging()
    silence_bars()
    names = OptionNames()
    log.handlers[0].addFilter(names)
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv), names)
    except BrokenPipeError:  # the reader of our output went away (`cartilha ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        message, exit_code = "stopped.", 130
    except Exception as error:
        fault = system_error(error)
        if hasattr(error, "exit_code"):
            message, exit_code = names.named(str(error)), int(error.exit_code)
        elif fault is not None and fault.errno in DISK_FAULTS:
            place = f"{fault.filename2 or fault.filename or 'the disk'} ({fault.strerror})"
            stopped = UserError(
                f"Nothing can be written to {place}; check the path, its permissions and the free space."
            )
            message, exit_code = str(stopped), stopped.exit_code
        else:
            raise
    print(f"cartilha: {message}", file=sys.stderr)
    return exit_code


def _check_working_directory() -> None:
    try:
        os.getcwd()  # torch's libraries are not even loaded without one
    except FileNotFoundError as error:
        raise UserError("The working directory was removed; go to another with cd.") from error


def _dispatch(arguments: list[str], names: OptionNames) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("cartilha"))
        return 0
    name, words = arguments[0], arguments[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}."
        raise UserError(f"There is no command {name!r}; {hint}")
    if name in _ONE_PROCESS and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{name} works in one process; run it without torchrun (train and evaluate share their work).")
    parser = command_parser(name, words)
    try:
        values = parser.values(words)
    except SystemExit as exit_request:  # --help
        return int(exit_request.code or 0)
    names.flags = parser.flags
    as_json, print_config = values.pop("json"), values.pop("print_config")
    settings = _settings(name, values, parser)
    if print_config:
        import yaml

        print(yaml.safe_dump(_as_file(settings), sort_keys=False, allow_unicode=True), end="")
        return 0
    from cartilha.pipeline.preflight import preflight

    _check_working_directory()
    preflight(settings)  # a mistake is named before the command's module is imported, which takes seconds
    result = home(name)(settings)
    from cartilha.machine.processes import is_main_process
    from cartilha.storage import to_json
    from cartilha.terminal.results import show

    if not is_main_process():  # under torchrun every process has the result, and one prints it
        return 0
    if as_json:
        print(to_json(result.to_dict(), indent=2))
    else:
        show(name, result.to_dict())
    return int(getattr(result, "exit_code", 0))


def home(command: str) -> Callable[[Settings], Any]:
    """The function that does a command; its module is imported now."""
    module, function = ("job", "run") if COMMANDS[command] is RunConfig else (command, command)
    found: Callable[[Settings], Any] = getattr(importlib.import_module(f"cartilha.pipeline.{module}"), function)
    return found


def _summary(command: str) -> str:
    if command == "demo":
        return "The whole job on what ships with the package."
    return str(COMMANDS[command].__doc__).splitlines()[0]


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {_summary(name)}" for name in COMMANDS)
    return f"""\
cartilha: teach a pretrained causal language model to read Portuguese or another language, and measure it.

usage: cartilha COMMAND [options]     (cartilha COMMAND --help lists the options of a command)

{lines}

Every command takes --json (results on standard output) and --print_config."""


def command_parser(name: str, words: Sequence[str] = ()) -> Parser:
    """The parser of a command; of the words that follow, only `--help` and a recipe's name are looked at."""
    config, defaults = COMMANDS[name], {}
    if config is RunConfig and not {"-h", "--help"}.isdisjoint(words):  # the help shows the recipe's values
        recipe = "demo" if name == "demo" else words[0]
        defaults = {} if recipe.startswith("-") else _recipe_values(recipe)
    parser = Parser(f"cartilha {name}", _summary(name), config, defaults)
    if name == "run":
        parser.add_argument("recipe", help="a built-in recipe's name or a YAML file")
    if config is not RunConfig:
        more = "a YAML file of these options (RUN/config.yaml, or what --print_config prints); those given here win"
        parser.add_argument("--config", help=more)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings and stop")
    return parser


def _settings(name: str, values: dict[str, Any], parser: Parser) -> Any:
    """The configuration: the values of a recipe or of a --config file, and the command line's over them."""
    if COMMANDS[name] is RunConfig:
        return recipe_settings(values.pop("recipe", None), **values)
    if path := values.pop("config"):
        from cartilha.pipeline.recipes import read_settings

        contents = read_settings(path, f"The file {path}")
        contents = contents[name] if isinstance(contents.get(name), dict) else contents  # of all of it, or a section
        values = {**parser.file_values({key: it for key, it in contents.items() if it != []}, path), **values}
    return make_settings(COMMANDS[name], values)


def recipe_settings(recipe: str | None, **values: Any) -> Any:
    """The job of a recipe (None: the command `demo`), with other values over the recipe's."""
    stem = re.sub(r"\.ya?ml$", "", os.path.basename(recipe or ""))
    output = os.path.join("runs", stem) if recipe else "demo"
    return make_settings(RunConfig, {"output": output, **_recipe_values(recipe or "demo"), **values})


def _recipe_values(name: str) -> dict[str, Any]:
    from cartilha.pipeline.recipes import read_recipe

    return Parser("", "", RunConfig, {}).file_values(read_recipe(name), f"the recipe {name}")


def _as_file(settings: Settings) -> dict[str, Any]:
    """Settings as a file has them; a job's are a recipe, in which a list cannot be empty."""
    values = settings.to_dict()
    for name, stage in values.items():
        if isinstance(stage, dict):
            values[name] = {option: value for option, value in stage.items() if value != []}
    return values
