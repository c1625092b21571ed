"""The pages that are made of the code: all options, all messages, the Python interface."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cartilha.cli import command_parser
from cartilha.config import COMMANDS, RunConfig
from messages import messages_page
from pages import ROOT, TEXTS


@dataclass(frozen=True)
class Generated:
    """A page that is made; `text` takes the language."""

    titles: dict[str, str]
    text: Callable[[str], str]


READMES = {"en": "README.md", "pt": "README.pt-BR.md"}
EXAMPLE = """```python
import cartilha

store = cartilha.prepare(cartilha.PrepareConfig(input="primer", model="random:tiny", output="store"))
(result,) = cartilha.evaluate(cartilha.EvaluateConfig(model="random:tiny", store=store.store)).models
print(result.evaluation.perplexity)
```"""


def commands_page(language: str) -> str:
    """All options of all commands; what a command does is told in the words of the README."""
    words = TEXTS[language]
    told = dict(
        re.findall(r"^\| `(\w+)[^|]*?` \| (.+) \|$", (ROOT / READMES[language]).read_text(encoding="utf-8"), re.M)
    )
    parts = [f"# {words['options']}", words["options_text"]]
    for name in COMMANDS:
        text = re.sub(r"\[([^\]]*)\]\((?:docs/)?(?:pt/)?([^)]*)\)", r"[\1](\2)", told[name])
        parts += [f"## cartilha {name}", text[0].upper() + text[1:] + "."]
        recipe = ["exercise-row-1", "--help"] if COMMANDS[name] is RunConfig and name == "run" else ["--help"]
        for group in command_parser(name, recipe)._action_groups:
            rows = [_row(action) for action in group._group_actions if action.help != argparse.SUPPRESS]
            if rows:
                own = group.title in ("positional arguments", "options")
                title = "" if own else f"### {name}: {words.get('groups', {}).get(group.title, group.title)}"
                columns = words["options_columns"]
                parts += [title, "\n".join([f"| {' | '.join(columns)} |", "|---|---|---|", *rows])]
    return "\n\n".join(filter(None, parts)) + "\n"


def _row(action: argparse.Action) -> str:
    name = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{str(action.dest).upper()}`"
    takes = ", ".join(f"`{word}`" for word in str(action.metavar or "").split("|") if word and action.option_strings)
    meaning = (action.help or "").replace("%%", "%").replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;")
    meaning = re.sub(r"(?<!`)(--[a-z_]+)", r"`\1`", meaning)
    return f"| {name} | {takes} | {meaning} |"


def api_page(language: str) -> str:
    """Each command's function with its docstring, and the fields of its result as the source has them."""
    words = TEXTS[language]
    parts = [f"# {words['python']}", words["python_text"], EXAMPLE]
    for name, config in COMMANDS.items():
        if name == "demo":
            continue
        source = (ROOT / f"src/cartilha/pipeline/{'job' if name == 'run' else name}.py").read_text(encoding="utf-8")
        tree = {node.name: node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        function: Any = tree[name]
        result: Any = tree[ast.unparse(function.returns)]
        signature = f"cartilha.{name}({ast.unparse(function.args)}) -> {result.name}"
        parts += [f"## cartilha.{name}", f"```python\n{signature}\n```", ast.get_docstring(function) or ""]
        parts += [f"`cartilha.{config.__name__}`: [cartilha {name}](commands.md#cartilha-{name})"]
        parts += [f"### {words['result']}: {result.name}", ast.get_docstring(result) or ""]
        fields = [node for node in result.body if isinstance(node, ast.AnnAssign)]
        lines = [source.splitlines()[node.lineno - 1].strip() for node in fields]
        parts += ["```python\n" + "\n".join(lines) + "\n```"]
    return "\n\n".join(parts) + "\n"


GENERATED = {
    "commands": Generated({name: texts["options"] for name, texts in TEXTS.items()}, commands_page),
    "messages": Generated({name: texts["messages"] for name, texts in TEXTS.items()}, messages_page),
    "api": Generated({name: texts["python"] for name, texts in TEXTS.items()}, api_page),
}
