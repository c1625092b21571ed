"""The flags of a command; their words, and the values of YAML files, are converted by the types of the fields."""

from __future__ import annotations

import contextlib
import difflib
import math
import types
import typing
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from inspect import get_annotations
from typing import Any, NoReturn

from cartilha.errors import UserError
from cartilha.settings import Settings, options

# What other trainers (Hugging Face's and its example scripts) call an option that has another name here.
NAMES_ELSEWHERE = {
    "batch_tokens": "batch_size train_batch_size gradient_accumulation_steps",
    "block_size": "max_length max_seq_length seq_length sequence_length context_length",
    "checkpoint_steps": "save_steps",
    "compile": "torch_compile",
    "dtype": "bf16 fp16 precision torch_dtype",
    "epochs": "num_epochs num_train_epochs",
    "input": "data_dir dataset dataset_name file train_file",
    "limit_documents": "limit max_eval_samples max_samples max_train_samples",
    "lr": "learning_rate",
    "max_new_tokens": "max_length max_tokens",
    "micro_batch_size": "batch_size per_device_batch_size per_device_train_batch_size",
    "mix": "weights probabilities interleave_probs",
    "model": "model_id model_name model_name_or_path pretrained_model_name_or_path tokenizer_name",
    "output": "output_dir",
    "resume": "resume_from_checkpoint",
    "schedule": "lr_scheduler_type",
    "store": "train_dataset",
    "text_column": "text_column_name",
    "tracker": "report_to",
    "validation_fraction": "test_size validation_split_percentage",
    "validation_input": "validation_file",
    "warmup_fraction": "warmup_ratio warmup_steps",
    "workers": "num_proc num_workers preprocessing_num_workers",
}


@dataclass(frozen=True)
class Option:
    """One option of a command: `lr`, or `train.lr` where it belongs to a stage of a job."""

    name: str
    field: Field[Any]
    hint: Any  # the type of its values
    group: str  # the heading above it in the help; empty for a command's own options

    @property
    def flags(self) -> list[str]:
        """Its spellings. Some commands take one model, others several: both spellings are valid everywhere."""
        return ["--model", "--models"] if self.name in ("model", "models") else [f"--{self.name}"]

    def read(self, value: Any) -> Any:
        """Convert a word of the command line, or a value of a YAML file; a UserError if it cannot be that."""
        try:
            return _convert(value, self.hint)
        except ValueError:
            raise UserError(f"--{self.name} cannot be {str(value)!r}; --help says what it takes.") from None

    def add_to(self, parser: Any, defaults: Mapping[str, Any]) -> None:
        """Add the flag to a parser or a group of it; `defaults` replace the field's own default in the help."""
        known, text = self.field.metadata, self.field.metadata["help"]
        if self.name in defaults or not known.get("required"):
            text += f" (default: {_show(defaults.get(self.name, self.field.default))})"
        flag: dict[str, Any] = {"help": SUPPRESS if known.get("hidden") else text.replace("%", "%%")}
        if typing.get_origin(self.hint) is tuple:
            flag |= {"nargs": "+", "action": "extend"}
        if known.get("positional"):
            parser.add_argument(self.name, **flag)
            return
        if self.hint is bool:
            flag["action"] = "store_true"
        else:
            flag["metavar"] = _takes(self.hint) or self.field.name.upper()
        # What is not given is not among the parsed values: the defaults are in the dataclass.
        parser.add_argument(*self.flags, dest=self.name, default=SUPPRESS, **flag)


class Parser(ArgumentParser):
    """Parses the flags of a command, and raises our one-sentence errors."""

    def __init__(self, prog: str, description: str, config: type[Settings], defaults: Mapping[str, Any]) -> None:
        # An abbreviation would change its meaning with each option that is added.
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self._options = {option.name: option for option in _options(config)}
        self._by_flag = {flag: option for option in self._options.values() for flag in option.flags}
        groups: dict[str, Any] = {"": self}
        for option in self._options.values():
            if option.group not in groups:
                groups[option.group] = self.add_argument_group(option.group)
            option.add_to(groups[option.group], defaults)

    @property
    def flags(self) -> list[str]:
        """Every spelling of every flag."""
        return list(self._option_string_actions)

    def values(self, words: Sequence[str]) -> dict[str, Any]:
        """What the command line gives, by option name."""
        given = vars(self.parse_args(words))
        return {name: self._options[name].read(it) if name in self._options else it for name, it in given.items()}

    def file_values(self, contents: Mapping[str, Any], place: str) -> dict[str, Any]:
        """What a YAML file gives, by option name; a null leaves the default. `place` is its name in messages."""
        found = {}
        try:
            for name, value in _flatten(contents):
                option = self._by_flag.get(f"--{name}")
                if option is None:
                    raise self._no_such_option(f"--{name}")
                if value is not None:
                    found[option.name] = option.read(value)
        except UserError as error:
            raise UserError(f"In {place}: {error}") from error
        return found

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a `UserError`, with the nearest flag where an unknown one was given."""
        unknown = message.partition("unrecognized arguments: ")[2]
        for flag in (word.split("=")[0] for word in unknown.split()):
            if flag.startswith("--") and flag != "--" and flag not in self.flags:
                raise self._no_such_option(flag)
        raise UserError(f"{unknown!r} was not expected here; --help lists the options." if unknown else f"{message}.")

    def _no_such_option(self, flag: str) -> UserError:
        wanted = flag.removeprefix("--")
        stage, _, word = wanted.rpartition(".")
        same = [word, *(n for n, theirs in NAMES_ELSEWHERE.items() if word.replace("-", "_") in theirs.split())]
        ours = [known[2:] for known in self.flags if known != flag]
        beginning = [name for name in ours if name.startswith(wanted)]
        elsewhere = [name for name in ours if name.startswith(stage) and name.rpartition(".")[2] in same]
        # A beginning of one name (--epoch), else the name of it here, else the one that is spelt most like it.
        close = beginning or elsewhere or difflib.get_close_matches(wanted, ours, 1, 0.8)
        if not close:
            return UserError(f"There is no option {flag}; --help lists the options.")
        meaning = f" ({self._by_flag[f'--{close[0]}'].field.metadata['help']})" if close is elsewhere else ""
        return UserError(f"There is no option {flag}; did you mean --{close[0]}{meaning}?")

    def _parse_optional(self, arg_string: str) -> Any:
        # A word with a single dash is a value (`--prompt -Olá`, `--lr -1`): the only flag of this kind is -h.
        is_value = arg_string[0:1] == "-" != arg_string[1:2] and arg_string != "-h"
        return None if is_value else super()._parse_optional(arg_string)


def make_settings(config: type[Any], values: Mapping[str, Any]) -> Any:
    """A configuration from values by option name, with the stages of a job."""
    given = {name: value for name, value in values.items() if "." not in name}
    for item in fields(config):
        if "set_by_job" in item.metadata:
            start = f"{item.name}."
            stage = {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}
            given[item.name] = make_settings(typing.get_type_hints(config)[item.name], stage)
    return config(**given)


def _options(config: type[Settings]) -> Iterator[Option]:
    hints = typing.get_type_hints(config)
    for item in options(config):
        if "set_by_job" in item.metadata:
            for option in _options(hints[item.name]):
                if option.name not in item.metadata["set_by_job"]:
                    yield replace(option, name=f"{item.name}.{option.name}", group=item.metadata["help"])
        else:
            owner = next(base for base in config.__mro__ if item.name in get_annotations(base))
            yield Option(item.name, item, hints[item.name], "" if owner is config else str(owner.__doc__).rstrip("."))


def _convert(value: Any, hint: Any) -> Any:
    """A value as the type that a field declares; a `ValueError` where it is none."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if types.NoneType in parts and value in ("null", "~"):
            return None
        for part in parts:
            with contextlib.suppress(ValueError):
                return _convert(value, part)
    elif origin is tuple and value != []:
        return tuple(_convert(each, parts[0]) for each in (value if isinstance(value, list) else [value]))
    elif value in parts if parts else hint is bool and isinstance(value, bool):
        return value
    elif hint in (int, float, str) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        converted = hint(str(value))
        if hint is not float or math.isfinite(converted):
            return converted
    raise ValueError(value)


def _takes(hint: Any) -> str:
    """What the help shows for a value: INTEGER, NUMBER|auto, auto|cpu; nothing for a text."""
    if isinstance(hint, str):
        return hint
    shown = [_takes(part) for part in typing.get_args(hint)] or [{int: "INTEGER", float: "NUMBER"}.get(hint, "")]
    return "|".join(filter(None, shown))


def _show(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(repr, default)) or "none"
    return "none" if default in (None, "") else str(default)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
