"""What a rank is asked to do. Without torch: a stage that is finished already is told without importing it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from trainer import resolve, storage
from trainer.errors import UsageError
from trainer.heartbeat import ATTEMPT
from trainer.recipe import Recipe, Stage


@dataclass(frozen=True)
class Job:
    recipe: Recipe
    name: str
    stage: Stage
    out: str
    accept: tuple[str, ...] = ()
    """Result fields whose change a begun stage accepts."""
    attempt: int = 1

    @property
    def uri(self) -> str:
        """OUT/STAGE."""
        return storage.join(self.out, self.name)


def parse(argv: Sequence[str] | None, about: str | None) -> Job:
    """
    Raises:
        UsageError, RecipeError
    """
    parser = argparse.ArgumentParser(prog="python -m trainer.train", description=about, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, help="shipped name, file or URI, also of a resolved recipe")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--out", required=True, help="folder or s3://bucket/prefix")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE", dest="overrides")
    parser.add_argument("--accept-change", action="append", default=[], metavar="FIELD", dest="accept")
    args = parser.parse_args(argv)
    recipe = resolve.load_recipe(args.recipe, args.overrides)
    stages = recipe.stages.named()
    if args.stage not in stages:
        raise UsageError("the recipe has no such stage", where=args.stage, expected=", ".join(stages))
    attempt = os.environ.get(ATTEMPT, "1")
    if not attempt.isdecimal():
        raise UsageError("not the number of an attempt", where=ATTEMPT, expected="1, 2, ...", got=attempt)
    return Job(recipe, args.stage, stages[args.stage], args.out.rstrip("/"), tuple(args.accept), int(attempt))
