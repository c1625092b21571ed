"""The messages of our errors, found in the code, and their page: what is wrong, and what to do.

A message in the code is one sentence, `what is wrong; what to do`, with values in it. `messages.pt.yaml` has every one
in Portuguese, by module; a test fails where one is missing or left over.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import yaml

from pages import ROOT, TEXTS

SOURCE = ROOT / "src" / "cartilha"
TRANSLATIONS = ROOT / "docs" / "site" / "messages.pt.yaml"
ERRORS = re.compile(r"(User|Unfinished|HubUnreachable|CheckFailed|OutOfMemory|InterruptedRun)Error")


@dataclass(frozen=True)
class Translation:
    """A message in Portuguese; `en` says what to do where the English sentence does not, `message` what code gives."""

    pt: str
    en: str = ""
    message: str = ""


@dataclass(frozen=True)
class Message:
    """A message as the code has it: values stand as names in capitals."""

    module: str  # corpus/sources.py
    text: str
    is_code: bool  # the message is made elsewhere, and `text` is the expression


@cache
def messages() -> list[Message]:
    """Every message of an error that a user can meet, in the order of the modules."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
    assignments = [node for tree in trees.values() for node in tree.body if isinstance(node, ast.Assign)]
    constants = {ast.unparse(target): node.value for node in assignments for target in node.targets}
    found: dict[Message, None] = {}  # in order, each once
    for path, tree in trees.items():
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
        for call in calls:
            if isinstance(call.func, ast.Name) and ERRORS.fullmatch(call.func.id):
                for text, is_code in _shown(call.args[0], constants):
                    found[Message(path.relative_to(SOURCE).as_posix(), text, is_code)] = None
    return list(found)


def _shown(node: ast.expr, constants: dict[str, ast.expr]) -> Iterator[tuple[str, bool]]:
    """The texts that an expression can give, and whether that is only known as code."""
    named = [constants[part.id] for part in ast.walk(node) if isinstance(part, ast.Name) and part.id in constants]
    if isinstance(node, ast.IfExp):
        yield from _shown(node.body, constants)
        yield from _shown(node.orelse, constants)
    elif isinstance(node, ast.Constant | ast.JoinedStr):
        yield re.sub(r"\s+", " ", _text(node)).strip(), False
    elif isinstance(node, ast.Name) and named:
        yield from _shown(named[0], constants)
    elif named and isinstance(named[0], ast.Dict):  # a table of messages
        for value in named[0].values:
            yield from _shown(value, constants)
    else:
        yield ast.unparse(node), True


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "counted":
        noun, *_, many = [*map(_text, node.args[1:]), ""] if len(node.args) < 4 else map(_text, node.args[1:])
        return f"N {noun}s {many}".rstrip()
    names = [part for part in re.findall(r"[A-Za-z_]+", ast.unparse(node)) if part not in _NOT_NAMES]
    return (names[-1] if names else "...").strip("_").upper()


_NOT_NAMES = {"self", "join", "str", "len", "num", "first_line", "lower", "upper", "format", "get", "path_", "f", "r"}


def translations() -> dict[str, dict[str, Translation]]:
    """What `messages.pt.yaml` says, by module and English message."""
    read = yaml.safe_load(TRANSLATIONS.read_text(encoding="utf-8"))
    return {
        module: {text: Translation(**(it if isinstance(it, dict) else {"pt": it})) for text, it in entries.items()}
        for module, entries in read.items()
    }


def messages_page(language: str) -> str:
    """The page: the messages of each room of the code, with what to do."""
    words, told = TEXTS[language], translations()
    columns = words["messages_columns"]
    tables = [[f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"] for _ in ROOMS]
    for message in messages():
        room = next(number for number, modules in enumerate(ROOMS) if re.match(modules, message.module))
        known = told.get(message.module, {}).get(message.text, Translation(""))
        tables[room].append(_row(message, known, language))
    parts = [f"# {words['messages']}", words["messages_text"]]
    for title, table in zip(words["rooms"], tables, strict=True):
        parts += [f"## {title}", "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def _row(message: Message, told: Translation, language: str) -> str:
    fault, _, remedy = message.text.partition("; ")
    if language == "pt":
        columns = [told.message or message.text, *told.pt.partition("; ")[::2]]
    elif told.en and not re.fullmatch(r"[A-Z_]*\.?", remedy):
        columns = [told.message or message.text, told.en]
    else:
        columns = [told.message or fault, told.en or remedy]
    return "| " + " | ".join(_cell(column) for column in columns) + " |"


def _cell(text: str) -> str:
    """A text in a table: a sentence of its own, with options as code."""
    parts = re.split(r"(`[^`]*`)", text.strip().rstrip(".").replace("|", "\\|"))
    for number, part in enumerate(parts[::2]):
        escaped = re.sub(r"\[(?![^\]]*\]\()", r"\\[", part.replace("<", "&lt;"))
        parts[2 * number] = re.sub(r"(?<!\w)(--[a-z_.]+)", r"`\1`", escaped)
    shown = "".join(parts)
    return shown[:1].upper() + shown[1:] + ("" if shown[-1:] in "?" else ".")


# What the modules of a table have in common, in the order of the tables' titles in texts.yaml; the first that matches.
ROOMS = [
    r"arguments|cli|units|pipeline/(preflight|recipes)|storage|errors",
    r"corpus",
    r"preparation|pipeline/prepare|tokens/store",
    r"model|tokens|machine|hub",
    r"training|runs|pipeline/(train|check|plan)|checks",
    r"evaluation|pipeline/compare",
    r"",
]
