"""Removing jobs: what a run still owns, what a person stops, what nobody watches any more.

    clean_up("onprem", out="s3://...", run_id=...)     the exit task of a pipeline; looks at the jobs themselves
    stop(api, out=..., step="sft")                     a person: whoever owns it
    reap(api, after=6)                                 python -m k8s.reaper, every few minutes

All delete the version that was looked at: a job that was taken over meanwhile is looked at again. None touches a job
that has ended: it is there to be read until its TTL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from k8s import names
from k8s.attempts import NEVER, attempt_of, delete_as_seen
from k8s.client import PODS, Api, Conflict, Json, Kind, connect, kind_of
from k8s.cluster import load_cluster
from k8s.kinds import DEFAULT_KINDS, KEPT, container_of, kinds_of, pods_of, suspension
from k8s.seen import read
from trainer.errors import UsageError
from trainer.resolve import digest

RUN_ID = "QWENVL_RUN_ID"
KEEP = 144
"""Looks for which a job that has ended stays: a day of the chart's CronJob."""
ENDED = "ended"
MANAGED = {"app.kubernetes.io/managed-by": f"{names.PREFIX}-launcher"}


def clean_up(cluster: str, *, out: str, run_id: str) -> None:
    """Remove the jobs into `out` that `run_id` still owns and that have not ended; what another run took over stays."""
    offered = load_cluster(cluster)
    owner, kinds = run_id or default_run_id(out), kinds_of(offered)
    removed = remove_owned(connect(offered.namespace), out=out, owner=owner, kinds=kinds)
    print(f"clean-up: {', '.join(removed) if removed else 'nothing of this run was left'}", flush=True)


def default_run_id(out: str) -> str:
    return os.environ.get(RUN_ID) or f"out-{digest(out.rstrip('/'))[:8]}"


def remove_owned(api: Api, *, out: str, owner: str, kinds: Sequence[Kind] = DEFAULT_KINDS) -> list[str]:
    """Names of the jobs that were deleted."""

    def mine(job: Json) -> bool:
        return _into(job, out) and _marks(job).get(names.OWNER) == owner

    return [job["metadata"]["name"] for job in under_way(api, kinds) if delete_as_seen(api, job, mine)]


def stop(
    api: Api, *, out: str, step: str | None = None, suspend: bool = False, kinds: Sequence[Kind] = DEFAULT_KINDS
) -> list[str]:
    """Remove or suspend every job of an output, or of one of its steps, that has not ended; their names.

    Raises:
        UsageError: a job that waits in a queue cannot be suspended: the queue would resume it.
    """
    found = [job for job in under_way(api, kinds) if _into(job, out)]
    if step is not None:
        found = [job for job in found if job["metadata"]["labels"][names.STEP] == names.label(step)]
    if not suspend:
        return [job["metadata"]["name"] for job in found if delete_as_seen(api, job, lambda job: True)]
    for job in found:
        if "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]:
            name = job["metadata"]["name"]
            raise UsageError("Kueue decides what it suspends", where=name, do="stop it without --suspend")
        change: Json = {"metadata": {"annotations": {names.SUSPENDED: "true"}}, "spec": suspension(job, True)}
        api.patch(kind_of(job), job["metadata"]["name"], change)
    return [job["metadata"]["name"] for job in found]


def reap(
    api: Api, *, after: int, dry_run: bool = False, kinds: Sequence[Kind] = DEFAULT_KINDS, keep: int = KEEP
) -> Iterator[str]:
    """One look at every job under way, and at those that have ended and that no controller removes; says what it
    removes.

    A launcher writes something new into its job every few minutes. A job where nothing new stood `after` looks in a row
    has no launcher any more, and nobody took it over. No clock is read, so that none can be wrong. What a person
    suspended is kept: it holds no node. RayJobs and TrainJobs that have ended stay for `keep` looks; the others have a
    TTL of their own.
    """
    for job in _managed(api, kinds):
        marks, ended = _marks(job), read(job, []).outcome is not None
        renewed = ENDED if ended else marks.get(names.RENEWED, "")
        if renewed == NEVER or (names.SUSPENDED in marks and not ended) or (ended and job["kind"] not in KEPT):
            continue
        before, _, count = marks.get(names.REAPER, "").rpartition(" ")
        looks, limit = int(count) + 1 if before == renewed and count.isdigit() else 1, keep if ended else after
        if looks <= limit:
            if not dry_run:
                _remember(api, job, f"{renewed} {looks}")
            continue
        why = f"ended {limit} looks ago" if ended else f"not watched for {limit} looks"
        text = f"{job['metadata']['name']}: owner {marks.get(names.OWNER)}, {why}"
        if dry_run:
            yield f"would remove {text}"
        elif _reaped(api, job, renewed):
            yield f"removed {text}"


def _reaped(api: Api, job: Json, renewed: str) -> bool:
    if renewed == ENDED:
        return api.delete(kind_of(job), job["metadata"]["name"], uid=job["metadata"]["uid"])
    return delete_as_seen(api, job, lambda one: _marks(one).get(names.RENEWED, "") == renewed)


def _remember(api: Api, job: Json, text: str) -> None:
    change = {"metadata": {"annotations": {names.REAPER: text}}}
    try:
        api.patch(kind_of(job), job["metadata"]["name"], change)
    except Conflict:
        return  # gone meanwhile


def first_pod(
    api: Api, *, out: str, step: str, attempt: int | None = None, kinds: Sequence[Kind] = DEFAULT_KINDS
) -> tuple[str, str] | None:
    """(rank 0's pod, its container) of a step's newest attempt, or of the one with this number, while it is there."""
    labels = {**MANAGED, names.STEP: names.label(step)} | ({names.ATTEMPT: str(attempt)} if attempt else {})
    jobs = [job for kind in kinds for job in api.list(kind, labels) if _into(job, out)]
    for job in sorted(jobs, key=attempt_of, reverse=True):
        pods = pods_of(job, api.list(PODS, {names.STEP: names.label(step), names.ATTEMPT: str(attempt_of(job))}))
        first = next((one for one in read(job, pods).workers if one.container == container_of(job)), None)
        if first is not None:
            return first.name, first.container
    return None


def under_way(api: Api, kinds: Sequence[Kind] = DEFAULT_KINDS) -> Iterator[Json]:
    """Jobs of any run that have neither ended nor are being deleted."""
    return (job for job in _managed(api, kinds) if read(job, []).outcome is None)


def _managed(api: Api, kinds: Sequence[Kind]) -> Iterator[Json]:
    for kind in kinds:
        for job in api.list(kind, MANAGED):
            if "deletionTimestamp" not in job["metadata"]:
                yield job


def _marks(job: Json) -> dict[str, str]:
    return job["metadata"].get("annotations", {})


def _into(job: Json, out: str) -> bool:
    return _marks(job).get(names.OUT, "").rstrip("/") == out.rstrip("/")
