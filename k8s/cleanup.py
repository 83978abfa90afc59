"""Removing jobs: what a run still owns, what a person stops, what nobody watches any more.

    clean_up("onprem", out="s3://...", run_id=...)     the exit task of a pipeline; looks at the jobs themselves
    stop(api, out=..., step="sft")                     a person: whoever owns it
    reap(api, after=6)                                 python -m k8s.reaper, every few minutes

All delete with the uid that was looked at, and none touches a job that has ended: it is there to be read until its TTL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from k8s import names
from k8s.attempts import NEVER, attempt_of, container_of, pods_of, suspension
from k8s.client import JOBS, PODS, PYTORCH_JOBS, Api, Conflict, Json, connect, kind_of
from k8s.cluster import load_cluster
from k8s.seen import read
from trainer.errors import UsageError
from trainer.resolve import digest

RUN_ID = "QWENVL_RUN_ID"
MANAGED = {"app.kubernetes.io/managed-by": f"{names.PREFIX}-launcher"}


def clean_up(cluster: str, *, out: str, run_id: str) -> None:
    """Remove the jobs into `out` that `run_id` still owns and that have not ended; what another run took over stays."""
    offered = load_cluster(cluster)
    removed = remove_owned(connect(offered.namespace), out=out, owners={run_id, default_run_id(out)})
    print(f"clean-up: {', '.join(removed) if removed else 'nothing of this run was left'}", flush=True)


def default_run_id(out: str) -> str:
    return os.environ.get(RUN_ID) or f"out-{digest(out.rstrip('/'))[:8]}"


def remove_owned(api: Api, *, out: str, owners: set[str]) -> list[str]:
    """Names of the jobs that were deleted."""
    mine = (job for job in under_way(api) if _into(job, out) and _marks(job).get(names.OWNER) in owners)
    return [job["metadata"]["name"] for job in mine if _delete(api, job)]


def stop(api: Api, *, out: str, step: str | None = None, suspend: bool = False) -> list[str]:
    """Remove or suspend every job of an output, or of one of its steps, that has not ended; their names.

    Raises:
        UsageError: a job that waits in a queue cannot be suspended: the queue would resume it.
    """
    found = [job for job in under_way(api) if _into(job, out)]
    if step is not None:
        found = [job for job in found if job["metadata"]["labels"][names.STEP] == names.label(step)]
    if not suspend:
        return [job["metadata"]["name"] for job in found if _delete(api, job)]
    for job in found:
        if "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]:
            name = job["metadata"]["name"]
            raise UsageError("Kueue decides what it suspends", where=name, do="stop it without --suspend")
        change: Json = {"metadata": {"annotations": {names.SUSPENDED: "true"}}, "spec": suspension(job, True)}
        api.patch(kind_of(job), job["metadata"]["name"], change)
    return [job["metadata"]["name"] for job in found]


def reap(api: Api, *, after: int, dry_run: bool = False) -> Iterator[str]:
    """One look at every job under way; says what it removes.

    A launcher writes something new into its job every few minutes. A job where nothing new stood `after` looks in a row
    has no launcher any more, and nobody took it over. No clock is read, so that none can be wrong.
    """
    for job in under_way(api):
        name, marks = job["metadata"]["name"], _marks(job)
        renewed = marks.get(names.RENEWED, "")
        if renewed == NEVER:
            continue
        before, _, count = marks.get(names.REAPER, "").rpartition(" ")
        looks = int(count) + 1 if before == renewed and count.isdigit() else 1
        if looks > after:
            text = f"{name}: owner {marks.get(names.OWNER)}, not watched for {after} looks"
            if dry_run:
                yield f"would remove {text}"
            elif _delete(api, job):
                yield f"removed {text}"
            continue
        if not dry_run:
            _remember(api, job, f"{renewed} {looks}")


def _remember(api: Api, job: Json, text: str) -> None:
    change = {"metadata": {"annotations": {names.REAPER: text}}}
    try:
        api.patch(kind_of(job), job["metadata"]["name"], change)
    except Conflict:
        return  # gone meanwhile


def first_pod(api: Api, *, out: str, step: str, attempt: int | None = None) -> tuple[str, str] | None:
    """(rank 0's pod, its container) of a step's newest attempt, or of the one with this number, while it is there."""
    labels = {**MANAGED, names.STEP: names.label(step)} | ({names.ATTEMPT: str(attempt)} if attempt else {})
    jobs = [job for kind in (PYTORCH_JOBS, JOBS) for job in api.list(kind, labels) if _into(job, out)]
    for job in sorted(jobs, key=attempt_of, reverse=True):
        pods = pods_of(job, api.list(PODS, {names.STEP: names.label(step), names.ATTEMPT: str(attempt_of(job))}))
        if pods:
            return min(pod["metadata"]["name"] for pod in pods), container_of(job)
    return None


def under_way(api: Api) -> Iterator[Json]:
    """Jobs of any run that have neither ended nor are being deleted."""
    for kind in (PYTORCH_JOBS, JOBS):
        for job in api.list(kind, MANAGED):
            if read(job, []).outcome is None and "deletionTimestamp" not in job["metadata"]:
                yield job


def _marks(job: Json) -> dict[str, str]:
    return job["metadata"].get("annotations", {})


def _into(job: Json, out: str) -> bool:
    return _marks(job).get(names.OUT, "").rstrip("/") == out.rstrip("/")


def _delete(api: Api, job: Json) -> bool:
    return api.delete(kind_of(job), job["metadata"]["name"], uid=job["metadata"]["uid"])
