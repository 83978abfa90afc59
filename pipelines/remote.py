"""Runs on Kubeflow Pipelines: start, ask, read, stop. kfp's own client does the talking.

submit    compiles the definition, checks recipe and cluster here first, and creates a run
status    one line a step
logs      what the steps' pods printed, from the cluster itself (kfp's API has no call for it)
stop      terminates the run, then removes what it still owns: kfp's terminate alone deletes nothing
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.settle import asked_recipe
from trainer.errors import ClusterError, QwenVLError, RecipeError, UsageError

ENDED = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"}
WAIT_S = 10.0
IMPLEMENTATION = "system-container-impl"  # pods of kfp's drivers print nothing of ours
RUN_LABEL = "pipeline/runid"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where Kubeflow Pipelines answers."""

    host: str | None
    namespace: str
    token: str | None = None


def client_of(place: Place) -> Any:
    try:
        from kfp.client import Client
    except ImportError as error:
        raise UsageError("this needs the kfp client", got=str(error), do="install qwenvl-train[pipelines]") from error
    if not place.host:
        raise UsageError(
            "where is Kubeflow Pipelines?", where="--host", do="give --host URL or set KF_PIPELINES_ENDPOINT"
        )
    with told(place):
        return Client(host=place.host, namespace=place.namespace, existing_token=place.token)


@contextmanager
def told(place: Place) -> Iterator[None]:
    """Errors of the API as one message."""
    try:
        yield
    except QwenVLError:
        raise
    except Exception as error:
        status = getattr(error, "status", None)
        body = str(getattr(error, "body", "") or error).strip().split("\n")[0]
        if status == 404:
            raise UsageError("Kubeflow Pipelines knows no such run", where=place.host, got=body[:300]) from error
        raise ClusterError(
            "Kubeflow Pipelines did not do it", where=place.host, got=body[:300] or repr(error)
        ) from error


def submit(
    place: Place,
    *,
    recipe: str,
    out: str,
    cluster: str,
    overrides: list[str],
    base_model: str = "",
    accept_changes: list[str] | None = None,
    experiment: str | None = None,
    run_name: str | None = None,
    wait: bool = False,
    say: Say = print,
) -> int:
    """Start a run; its id is the last line printed. With `wait` 0 when it succeeded, else 1."""
    checked = checked_recipe(recipe, overrides, cluster, out, base_model)
    client = client_of(place)
    from pipelines.full_recipe import compile_to

    arguments = {
        "recipe": recipe,
        "out": out,
        "cluster": cluster,
        "overrides": overrides,
        "base_model": base_model,
        "accept_changes": accept_changes or [],
    }
    with tempfile.TemporaryDirectory() as folder, told(place):
        package = Path(folder) / "full_recipe.yaml"
        compile_to(package)
        run = client.create_run_from_pipeline_package(
            str(package),
            arguments=arguments,
            run_name=run_name or f"{checked} {time.strftime('%Y-%m-%d %H:%M')}",
            experiment_name=experiment or checked,
            namespace=place.namespace,
            enable_caching=False,
        )
    say(f"{place.host}/#/runs/details/{run.run_id}")
    say(f"follow it: qwenvl status {run.run_id}    stop it: qwenvl stop {run.run_id}")
    say(run.run_id)
    return follow(place, client, run.run_id, say=say) if wait else 0


def checked_recipe(recipe: str, overrides: list[str], cluster: str, out: str, base_model: str = "") -> str:
    """Name of a recipe that is valid for the cluster: every problem is told here, not by a pod an hour later."""
    from k8s.cluster import check, load_cluster

    if "://" not in out:
        raise UsageError("the pods of a cluster share no folder", where=f"--out {out}", expected="s3://BUCKET/PREFIX")
    checked = asked_recipe(recipe, overrides, base_model)
    problems = check(checked, load_cluster(cluster))
    if problems:
        raise RecipeError([("on this cluster", problem) for problem in problems])
    return checked.name


def status(place: Place, run_id: str, *, say: Say = print) -> int:
    """Print a run's state and its steps; 1 when it failed."""
    with told(place):
        run = client_of(place).get_run(run_id)
    say(f"{run.display_name}: {run.state}")
    for task in tasks(run):
        say(f"  {task.display_name:28} {task.state or 'PENDING':10} {_seconds(task)}")
    return 1 if run.state == "FAILED" else 0


def tasks(run: Any) -> list[Any]:
    """The steps, without kfp's drivers and groups, in the order they were made."""
    details = (run.run_details.task_details if run.run_details else None) or []
    own = [task for task in details if task.pod_name or task.executor_detail or task.state]
    hidden = ("driver", "executor", "root", "whole-run", "exit-handler")
    return [task for task in own if not any(word in (task.display_name or "") for word in hidden)]


def _seconds(task: Any) -> str:
    if not task.start_time or not task.end_time or task.end_time < task.start_time:
        return ""
    return f"{(task.end_time - task.start_time).total_seconds():.0f} s"


def follow(place: Place, client: Any, run_id: str, *, say: Say, sleep: Callable[[float], None] = time.sleep) -> int:
    """Tell every change of a step until the run has ended."""
    known: dict[str, str] = {}
    while True:
        with told(place):
            run = client.get_run(run_id)
        for task in tasks(run):
            if task.state and known.get(task.display_name) != task.state:
                known[task.display_name] = task.state
                say(f"{time.strftime('%H:%M:%S')} {task.display_name}: {task.state}")
        if run.state in ENDED:
            say(f"run {run_id}: {run.state}")
            return 0 if run.state == "SUCCEEDED" else 1
        sleep(WAIT_S)


def logs(place: Place, run_id: str, *, step: str | None = None, tail: int = 200, say: Say = print) -> int:
    """The last lines of every step's pod."""
    from kubernetes import client, config

    with told(place):
        try:
            config.load_incluster_config()
        except config.ConfigException:
            config.load_kube_config()
        core = client.CoreV1Api()
        pods = core.list_namespaced_pod(place.namespace, label_selector=f"{RUN_LABEL}={run_id}").items
        shown = 0
        for pod in sorted(pods, key=lambda pod: pod.metadata.creation_timestamp):
            name = (pod.metadata.annotations or {}).get("workflows.argoproj.io/node-name", pod.metadata.name)
            if IMPLEMENTATION not in pod.metadata.name or (step and step not in name):
                continue
            say(f"==> {name} ({pod.status.phase})")
            say(core.read_namespaced_pod_log(pod.metadata.name, place.namespace, container="main", tail_lines=tail))
            shown += 1
    if not shown:
        raise UsageError("no pod of this run is left", where=run_id, do="training's own logs lie in OUT/STAGE/attempts")
    return 0


def stop(place: Place, run_id: str, *, say: Say = print) -> int:
    """Terminate a run and remove what it still owns on the cluster."""
    client = client_of(place)
    with told(place):
        run = client.get_run(run_id)
        if run.state not in ENDED:
            client.terminate_run(run_id)
            say(f"{run_id}: terminated")
    given = (run.runtime_config.parameters if run.runtime_config else None) or {}
    out, cluster = given.get("out"), given.get("cluster")
    if out and cluster and cluster != "local":
        from k8s import launcher

        launcher.clean_up(cluster, out=out, run_id=run_id)
    return 0
