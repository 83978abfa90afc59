"""qwenvl submit RECIPE --out s3://... --cluster FILE: start a recipe on Kubeflow Pipelines and follow it.

Exits with 0 when the run succeeded, with 1 when it failed; Ctrl-C leaves the run alone. A token comes from KFP_TOKEN.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.cli.changes import add_changes
from pipelines.cli.kfp_place import add_place, place_of


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="qwenvl submit", description=__doc__)
    made.add_argument("recipe", help="shipped name, file (sent inline) or URI")
    made.add_argument("--out", required=True, help="s3:// address of everything that the run makes")
    made.add_argument("--cluster", required=True, help="shipped cluster, file (sent inline) or URI")
    add_changes(made)
    made.add_argument("--experiment", help="default: the recipe's name")
    made.add_argument("--run-name", help="default: recipe and time")
    made.add_argument("--service-account", help="of the steps' pods; default: what Kubeflow Pipelines gives them")
    made.add_argument("--detach", action="store_true", help="do not follow it")
    add_place(made)
    return made


def main(words: list[str]) -> int:
    asked = parser().parse_args(words[1:])
    from pipelines.submit import Asked, submit

    return submit(
        place_of(asked),
        Asked(
            recipe=_inline(asked.recipe),
            out=asked.out,
            cluster=_inline(asked.cluster),
            overrides=tuple(asked.overrides),
            base_model=asked.base_model,
            accept_changes=tuple(asked.accept_changes),
            experiment=asked.experiment,
            run_name=asked.run_name,
            service_account=asked.service_account,
        ),
        wait=not asked.detach,
    )


def _inline(ref: str) -> str:
    """A file of this machine as its text: a cluster cannot read it."""
    return Path(ref).read_text(encoding="utf-8") if Path(ref).is_file() else ref
