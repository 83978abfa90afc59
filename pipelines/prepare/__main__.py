"""One step of data preparation as a program: what a pod of the prepare image runs, and a way to try a step alone.

    python -m pipelines.prepare prepare-data  --recipe REF --out OUT
    python -m pipelines.prepare prepare-stage --recipe REF --out OUT --stage sft
    python -m pipelines.prepare requests | select ...

Here, as in every process edge, an error becomes one message and its exit code.
"""

from __future__ import annotations

import argparse
import sys

from trainer.command import PREPARE
from trainer.errors import QwenVLError
from trainer.recipe import Recipe
from trainer.resolve import load_recipe


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.prepare", description=__doc__)
    parser.add_argument("what", choices=PREPARE)
    parser.add_argument("--recipe", required=True, help="a resolved recipe (.json), or what a recipe can be named by")
    parser.add_argument("--out", required=True)
    parser.add_argument("--stage")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=VALUE")
    arguments = parser.parse_args(argv)
    if (arguments.stage is None) != (arguments.what == "prepare-data"):
        parser.error(f"{arguments.what} {'needs' if arguments.stage is None else 'takes no'} --stage")
    try:
        run(arguments.what, load_recipe(arguments.recipe, arguments.overrides), arguments.out, arguments.stage)
    except QwenVLError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.code
    return 0


def run(what: str, recipe: Recipe, out: str, stage: str | None) -> None:
    if what == "prepare-data":
        from pipelines.prepare.ingest import prepare_data

        prepare_data(recipe, out)
        return
    assert stage is not None
    if what == "prepare-stage":
        from pipelines.prepare.stage import prepare_stage

        prepare_stage(recipe, stage, out)
        return
    from pipelines.prepare.sampling import make_requests, select_answers

    (make_requests if what == "requests" else select_answers)(recipe, stage, out)


if __name__ == "__main__":
    sys.exit(main())
