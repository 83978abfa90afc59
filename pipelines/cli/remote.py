"""qwenvl submit RECIPE, qwenvl status|logs|stop RUN: runs on Kubeflow Pipelines.

The API's address comes from --host or KF_PIPELINES_ENDPOINT, as kfp itself reads it; a token from KFP_TOKEN.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def parser(noun: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"qwenvl {noun}", description=__doc__)
    if noun == "submit":
        made.add_argument("recipe", help="shipped name, file (sent inline) or URI")
        made.add_argument("--out", required=True, help="s3:// address of everything that the run makes")
        made.add_argument("--cluster", required=True, help="shipped cluster, file (sent inline) or URI")
        made.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
        made.add_argument("--base-model", default="", metavar="URI")
        made.add_argument("--accept-change", dest="accept_changes", action="append", default=[], metavar="FIELD")
        made.add_argument("--experiment", help="default: the recipe's name")
        made.add_argument("--run-name", help="default: recipe and time")
        made.add_argument("--wait", action="store_true", help="follow it; exits with 1 if it fails")
    else:
        made.add_argument("run", help="the run's id, as submit printed it")
    if noun == "logs":
        made.add_argument("--step", help="one step, e.g. stage1; default: all of them")
        made.add_argument("--tail", type=int, default=200, help="lines per step")
    made.add_argument("--host", default=os.environ.get("KF_PIPELINES_ENDPOINT"), help="address of the KFP API")
    made.add_argument("--namespace", default=os.environ.get("QWENVL_NAMESPACE", "kubeflow"))
    return made


def main(words: list[str]) -> int:
    asked = parser(words[0]).parse_args(words[1:])
    from pipelines import remote

    where = remote.Place(asked.host, asked.namespace, os.environ.get("KFP_TOKEN"))
    if words[0] == "submit":
        return remote.submit(
            where,
            recipe=_inline(asked.recipe),
            out=asked.out,
            cluster=_inline(asked.cluster),
            overrides=asked.overrides,
            base_model=asked.base_model,
            accept_changes=asked.accept_changes,
            experiment=asked.experiment,
            run_name=asked.run_name,
            wait=asked.wait,
        )
    if words[0] == "status":
        return remote.status(where, asked.run)
    if words[0] == "logs":
        return remote.logs(where, asked.run, step=asked.step, tail=asked.tail)
    return remote.stop(where, asked.run)


def _inline(ref: str) -> str:
    """A file of this machine as its text: a cluster cannot read it."""
    return Path(ref).read_text(encoding="utf-8") if Path(ref).is_file() else ref
