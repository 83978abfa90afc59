"""Every command of `qwenvl` as its parsers have it, and the reference made from them (pipelines/cli/README.md)."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.cli.main import COMMANDS

REFERENCE = "pipelines/cli/README.md"
HEAD = """# qwenvl: every command and its options

Made from the parsers by `make generated`; the same as `qwenvl COMMAND --help`. The README's table says what for.
Exit codes: 0 done, 2 wrong arguments or a wrong recipe, 130 Ctrl-C, others as `trainer/errors.py` lists them.
"""


@dataclass(frozen=True)
class Command:
    """One that does something: `qwenvl data ingest`, not `qwenvl data`."""

    words: str
    help: str
    parser: argparse.ArgumentParser

    @property
    def arguments(self) -> list[argparse.Action]:
        return [action for action in self.parser._actions if action.dest != "help"]


def commands() -> list[Command]:
    found: list[Command] = []
    for noun, (module, told) in COMMANDS.items():
        make = importlib.import_module(f"pipelines.cli.{module}").parser
        found += _below(make(noun) if module == "after" else make(), f"qwenvl {noun}", told)
    return found


def _below(parser: argparse.ArgumentParser, words: str, told: str) -> Iterator[Command]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield Command(words, told, parser)
    for action in nested:
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, inner in action.choices.items():
            yield from _below(inner, f"{words} {name}", helps.get(name, ""))


def reference() -> str:
    """Markdown of all commands."""
    return "\n".join([HEAD, *(_section(command) for command in commands())])


def _section(command: Command) -> str:
    rows = [f"| `{_name(action)}` | {_cell(action.help or '')} |" for action in command.arguments]
    table = ["", "| argument | what |", "| --- | --- |", *rows] if rows else []
    return "\n".join([f"## {command.words}", "", f"{_cell(command.help)}", *table, ""])


def _name(action: argparse.Action) -> str:
    value = _value(action)
    if not action.option_strings:
        return f"[{value}]" if action.nargs == "?" else f"{value} ..." if action.nargs == "+" else value
    needed = "" if action.required else "[]"
    words = " ".join(filter(None, (action.option_strings[-1], value if action.nargs != 0 else "")))
    return f"{needed[:1]}{words}{needed[1:]}"


def _value(action: argparse.Action) -> str:
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


def _cell(text: str) -> str:
    return text.replace("%%", "%").replace("|", "\\|")
