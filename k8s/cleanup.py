"""Removing jobs: what a run still owns, what a person stops, what nobody watches any more.

    clean_up("onprem", out="s3://...", run_id=...)     the exit task of a pipeline; looks at the jobs themselves
    stop(api, out=..., step="sft")                     a person: whoever owns it
    reap(api, after=6)                                 python -m k8s.reaper, every few minutes

All delete the version that was looked at: a job that was taken over meanwhile is looked at again. None touches a job
that has ended: it is there to be read until its TTL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from k8s import names
from k8s.attempts import NEVER, NUM_TRIES, attempt_of, container_of, pods_of, suspension
from k8s.client import JOBS, PODS, PYTORCH_JOBS, Api, Conflict, Json, connect, kind_of
from k8s.cluster import load_cluster
from k8s.seen import read
from trainer.errors import ClusterError, UsageError
from trainer.resolve import digest

RUN_ID = "QWENVL_RUN_ID"
MANAGED = {"app.kubernetes.io/managed-by": f"{names.PREFIX}-launcher"}


def clean_up(cluster: str, *, out: str, run_id: str) -> None:
    """Remove the jobs into `out` that `run_id` still owns and that have not ended; what another run took over stays."""
    offered = load_cluster(cluster)
    removed = remove_owned(connect(offered.namespace), out=out, owner=run_id or default_run_id(out))
    print(f"clean-up: {', '.join(removed) if removed else 'nothing of this run was left'}", flush=True)


def default_run_id(out: str) -> str:
    return os.environ.get(RUN_ID) or f"out-{digest(out.rstrip('/'))[:8]}"


def remove_owned(api: Api, *, out: str, owner: str) -> list[str]:
    """Names of the jobs that were deleted."""

    def mine(job: Json) -> bool:
        return _into(job, out) and _marks(job).get(names.OWNER) == owner

    return [job["metadata"]["name"] for job in under_way(api) if _delete(api, job, mine)]


def stop(api: Api, *, out: str, step: str | None = None, suspend: bool = False) -> list[str]:
    """Remove or suspend every job of an output, or of one of its steps, that has not ended; their names.

    Raises:
        UsageError: a job that waits in a queue cannot be suspended: the queue would resume it.
    """
    found = [job for job in under_way(api) if _into(job, out)]
    if step is not None:
        found = [job for job in found if job["metadata"]["labels"][names.STEP] == names.label(step)]
    if not suspend:
        return [job["metadata"]["name"] for job in found if _delete(api, job, lambda job: True)]
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
    has no launcher any more, and nobody took it over. No clock is read, so that none can be wrong. What a person
    suspended is kept: it holds no node.
    """
    for job in under_way(api):
        name, marks = job["metadata"]["name"], _marks(job)
        renewed = marks.get(names.RENEWED, "")
        if renewed == NEVER or names.SUSPENDED in marks:
            continue
        before, _, count = marks.get(names.REAPER, "").rpartition(" ")
        looks = int(count) + 1 if before == renewed and count.isdigit() else 1
        if looks > after:
            text = f"{name}: owner {marks.get(names.OWNER)}, not watched for {after} looks"
            if dry_run:
                yield f"would remove {text}"
            elif _delete(api, job, lambda job, renewed=renewed: _marks(job).get(names.RENEWED, "") == renewed):
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


def _delete(api: Api, job: Json, wanted: Callable[[Json], bool]) -> bool:
    """Whether it was deleted, as what it is now: between our list and the deletion another run may take it over."""
    kind, name, uid = kind_of(job), job["metadata"]["name"], job["metadata"]["uid"]
    for _ in range(NUM_TRIES):
        if not wanted(job):
            return False
        try:
            return api.delete(kind, name, uid=uid, version=job["metadata"]["resourceVersion"])
        except Conflict:
            found = api.get(kind, name)
        if found is None or found["metadata"]["uid"] != uid or read(found, []).outcome is not None:
            return False
        job = found
    raise ClusterError("the job changes faster than it can be removed", where=name, do="run again")
