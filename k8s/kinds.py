"""What differs between the kinds of jobs that an attempt may be: PyTorchJob, TrainJob, Job and RayJob.

kinds_of(cluster)         where jobs of a run may be
num_pods(job)             how many have to be there before it is at work
container_of(job)         whose log is the step's
pods_of(job, pods)        the pods of this very job
suspension(job, True)     the part of a spec that suspends it
marked(rendered, text)    with the label by which its pods are known
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from k8s import names, rayjob, trainjob
from k8s.client import JOBS, PYTORCH_JOBS, RAY_JOBS, RUNTIMES, TRAIN_JOBS, Kind
from k8s.cluster import Cluster
from k8s.pytorchjob import Rendered, templates_in

Json = dict[str, Any]

DEFAULT_KINDS: tuple[Kind, ...] = (PYTORCH_JOBS, JOBS)
"""What the launcher may look at without the chart's rbac.kinds."""
KEPT = {"RayJob", "TrainJob"}
"""Kinds whose objects no controller removes when they have ended: the reaper does."""


def kinds_of(cluster: Cluster) -> tuple[Kind, ...]:
    """Where jobs of this cluster file may be; those of an earlier choice of job_kind among the default kinds too."""
    more = [TRAIN_JOBS] if cluster.job_kind == "TrainJob" else []
    return (*DEFAULT_KINDS, *more, *([RAY_JOBS] if cluster.ray is not None else []))


def num_pods(job: Json) -> int:
    spec = job["spec"]
    match job["kind"]:
        case "PyTorchJob":
            return spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
        case "TrainJob":
            return spec["trainer"]["numNodes"]
        case "RayJob":  # the submitter comes when these are ready
            return 1 + sum(group["replicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"])
    return 1


def container_of(job: Json) -> str:
    if job["kind"] == "RayJob":
        return rayjob.SUBMITTER
    return trainjob.NODE if job["kind"] == "TrainJob" else templates_in(job["spec"])[0]["spec"]["containers"][0]["name"]


def pods_of(job: Json, pods: Sequence[Json]) -> list[Json]:
    """The pods of this very job: one that was deleted and made again under its name has others."""
    uid, mark = job["metadata"]["uid"], job["metadata"].get("labels", {}).get(names.CREATION)
    return [
        pod
        for pod in pods
        if any(one["uid"] == uid for one in pod["metadata"].get("ownerReferences", []))
        or (mark is not None and pod["metadata"].get("labels", {}).get(names.CREATION) == mark)
    ]


def marked(rendered: Rendered, text: str) -> Rendered:
    """Jobs that own their pods only through others carry a label that is another at each creation, as their pods do."""
    if rendered.job["kind"] not in KEPT:
        return rendered
    rendered = replace(rendered, job=copy.deepcopy(rendered.job), runtime=copy.deepcopy(rendered.runtime))
    for one in (rendered.job, rendered.runtime, *rendered.templates()):
        if one is not None:
            one["metadata"].setdefault("labels", {})[names.CREATION] = text
    return rendered


def runtime_of(job: Json) -> tuple[Kind, str] | None:
    """Kind and name of the object that holds a job's pods, where that is another."""
    return (RUNTIMES, job["spec"]["runtimeRef"]["name"]) if job["kind"] == "TrainJob" else None


def suspension(job: Json, suspend: bool) -> Json:
    """The part of a spec that suspends or resumes it."""
    return {"runPolicy": {"suspend": suspend}} if job["kind"] == "PyTorchJob" else {"suspend": suspend}
