"""`qwenvl`: the command line, one file a noun; each noun is imported only when it is asked for.

Exit codes are those of trainer/errors.py; an error is one message on stderr.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from itertools import pairwise

COMMANDS = {
    "run": ("run", "run a recipe on this machine, every stage"),
    "submit": ("submit", "start a recipe on Kubeflow Pipelines and follow it"),
    "runs": ("runs", "runs on Kubeflow Pipelines: list, status, logs, stop, retry"),
    "job": ("job", "one step on a cluster, without Kubeflow Pipelines: render, create, watch, logs, stop"),
    "recipe": ("recipe", "show, check or compare recipes; their JSON Schema"),
    "data": ("data", "bring, check, count, look at and prepare data"),
    "fetch": ("fetch", "bring a model or data set from a hub into storage, pinned and verified"),
    "convert": ("convert", "published weights (.bin or safetensors) as the trainer reads them"),
    "export": ("after", "write the final model of an output in Hugging Face layout"),
    "evaluate": ("after", "held-out losses and task scores of an output"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the script `qwenvl`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("qwenvl-train"))
        return 0
    if words[0] not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"error: no such command: {words[0]}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    if (empty := _empty(words)) is not None:
        print(
            f"error: an empty argument\n  where: {empty}\n  do: is a variable of your script not set?", file=sys.stderr
        )
        return 2
    module = importlib.import_module(f"pipelines.cli.{COMMANDS[words[0]][0]}")
    return edge(module.main, words)


def _empty(words: Sequence[str]) -> str | None:
    """Where an argument is empty: an address that is would mean the folder at hand. No base model is one."""
    for before, word in pairwise(words):
        option, equals, value = word.partition("=")
        if not word.strip() and before != "--base-model":
            return before if before.startswith("--") else f"behind {before}"
        if option.startswith("--") and equals and not value.strip() and option != "--base-model":
            return option
    return None


def edge(command, words: list[str]) -> int:
    """Run a command; turn its errors into a message and an exit code."""
    from trainer.errors import QwenVLError, of_system

    try:
        return command(words) or 0
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # `qwenvl recipe show | head`
        sys.stderr.close()
        return 0
    except OSError as error:
        told = of_system(error)
        print(f"error: {told}", file=sys.stderr)
        return told.code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def usage() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qwenvl COMMAND ...      (qwenvl COMMAND --help says more)",
            "",
            *lines,
            "",
            "try it:  qwenvl run tiny --out out/tiny",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
