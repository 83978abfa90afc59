"""qwenvl export --out OUT, qwenvl evaluate --out OUT: the steps after training, alone, on an output that is there."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys


def parser(noun: str) -> argparse.ArgumentParser:
    about = {
        "export": "Write the newest model of an output to OUT/export in Hugging Face layout.",
        "evaluate": "Held-out losses and task scores of an output, into OUT/evaluate.",
    }
    made = argparse.ArgumentParser(prog=f"qwenvl {noun}", description=about[noun])
    made.add_argument("--out", dest="named", metavar="OUT", help="folder or s3:// address of a run's output")
    made.add_argument("out", metavar="OUT", nargs="?", help="the same without --out")
    made.add_argument(
        "--device",
        default=os.environ.get("QWENVL_DEVICE", "cpu"),
        choices=("cpu", "cuda"),
        help="where the model computes; default: QWENVL_DEVICE, else cpu",
    )
    made.add_argument("--threads", type=_some, default=2, help="threads of the process (default 2)")
    return made


def _some(word: str) -> int:
    """A number of threads; argparse tells what is none."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {word!r}")
    return int(word)


def output(asked: argparse.Namespace) -> str:
    """OUT, however it was given.

    Raises:
        UsageError: not at all, or twice.
    """
    given = [out for out in (asked.named, asked.out) if out is not None]
    if len(given) != 1 or not given[0].strip():
        from trainer.errors import UsageError

        raise UsageError("which output?", where="--out", expected="--out OUT, once", got=" ".join(given) or "nothing")
    return given[0].rstrip("/") or "/"


def main(words: list[str]) -> int:
    asked = parser(words[0]).parse_args(words[1:])
    from pipelines import lock
    from pipelines.settle import NAME, stored_recipe
    from trainer import storage
    from trainer.command import ProgramCall, merged, program_command

    out = output(asked)
    stored_recipe(out)  # there, and one that this version reads
    recipe = storage.join(out, NAME)
    made = program_command(
        ProgramCall(
            program=words[0],
            recipe=recipe,
            out=out,
            threads=asked.threads,
            device=asked.device,
            python=sys.executable,
        )
    )
    with lock.held(out):  # a run's own step starts the program itself
        code = subprocess.run(made.argv, env=merged(os.environ, made), check=False).returncode
    return code if code >= 0 else 128 - code
