"""qwenvl run RECIPE --out DIR: every step of a recipe on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pipelines.cli.changes import add_changes
from trainer.errors import UsageError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="qwenvl run", description=__doc__)
    made.add_argument("recipe", help="name of a shipped recipe, a file or a URI")
    made.add_argument("--out", required=True, help="folder for everything that the run makes")
    add_changes(made)
    made.add_argument("--cluster", default="local", help="local (qwenvl submit starts runs elsewhere)")
    made.add_argument(
        "--device", default=os.environ.get("QWENVL_DEVICE", "cpu"), help="cpu or cuda; default: QWENVL_DEVICE, else cpu"
    )
    return made


def main(words: list[str]) -> int:
    asked = parser().parse_args(words[1:])
    if asked.cluster != "local":
        raise UsageError(
            "this command runs on this machine",
            where=f"--cluster {asked.cluster}",
            do="use qwenvl submit for a cluster",
        )
    from pipelines.run import RunCall, run_here

    recipe = str(Path(asked.recipe).resolve()) if Path(asked.recipe).is_file() else asked.recipe
    out = asked.out if "://" in asked.out else str(Path(asked.out).resolve())
    return run_here(
        RunCall(
            recipe=recipe,
            out=out,
            overrides=tuple(asked.overrides),
            base_model=asked.base_model,
            accept_changes=tuple(asked.accept_changes),
            device=asked.device,
        )
    )
