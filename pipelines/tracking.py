"""Close the pipeline's own run in MLflow; the stages' runs below it are trainer/observe/tracking.py's, but for those
that nobody was left to close: when the run fails they end with it.

Importing MLflow takes seconds, so it happens in a process of its own, beside the writing of the report:

    closing = start(recipe, out, "FINISHED"); ...; closing.wait()

MLflow is a view: what fails here is told in one line and ends nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any, Literal

from trainer import storage, warm
from trainer.observe.tracking import LIMITS, end_run, run_id, tracking_uri
from trainer.recipe import Recipe

Status = Literal["FINISHED", "FAILED", "KILLED"]
LIMIT_S = 20.0


class Closing:
    """A process that sets a run's status, or nothing when there is no run."""

    def __init__(self, process: warm.Program | None):
        self.process = process

    def wait(self, limit_s: float = LIMIT_S) -> None:
        if self.process is None:
            return
        try:
            self.process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            print("MLflow did not answer: the pipeline's run stays as it was there", flush=True)


def log_funnel(client: Any, run: str, out: str) -> None:
    """data/funnel.json as an artifact, and its counts as metrics: funnel.SOURCE.SPLIT.read, kept, refused, and where
    the source was curated curated.kept, dropped.FILTER and, of conversations, domain.DOMAIN.SUB_DOMAIN (kept); where it
    was made from another one made.WHAT."""
    try:
        funnel = storage.read_json(storage.join(out, "data", "funnel.json"))
    except FileNotFoundError:
        return
    from mlflow.entities import Metric

    values: dict[str, float] = {}
    for source, splits in funnel.items():
        for split, found in splits.items():
            at = f"funnel.{source}.{split}"
            refused = sum(found.get("bad", {}).values())
            values |= {f"{at}.read": found["read"], f"{at}.kept": found["kept"], f"{at}.refused": refused}
            values |= {f"{at}.made.{what}": count for what, count in found.get("made", {}).items()}
            if curated := found.get("curated"):
                values[f"{at}.curated.kept"] = curated["kept"]
                values |= {f"{at}.dropped.{name}": count for name, count in curated["dropped"].items()}
                for domain, counts in curated.get("domains", {}).items():
                    values |= {f"{at}.domain.{domain}.{name}": one["kept"] for name, one in counts.items()}
    stamp = int(time.time() * 1000)
    metrics = [Metric(name, float(value), stamp, 0) for name, value in values.items()]
    for first in range(0, len(metrics), 900):
        client.log_batch(run, metrics=metrics[first : first + 900])
    client.log_dict(run, funnel, "funnel.json")


def start(recipe: Recipe, out: str, status: Status) -> Closing:
    uri, run = tracking_uri(recipe, out), run_id(out)
    if uri is None or run is None:
        return Closing(None)
    left = [run_id(storage.join(out, stage)) for stage in recipe.stages.named()] if status != "FINISHED" else []
    env = {**os.environ, **LIMITS, "OMP_NUM_THREADS": "1"}
    return Closing(warm.start("pipelines.tracking", [uri, status, run, out, *filter(None, left)], env=env))


def main(uri: str, status: str, run: str, out: str, *stages: str) -> int:
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(uri)
        for stage in stages:
            end_run(client, stage, status)
        log_funnel(client, run, out)
        client.set_terminated(run, status=status)
    except Exception as error:  # a view: whatever it is, the run itself is done
        print(f"MLflow: the pipeline's run was not closed: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
