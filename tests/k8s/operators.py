"""What KubeRay and Kubeflow Trainer make of a RayJob and a TrainJob, on the API in memory: pods that the job owns only
through others, and the status as their controllers write it. Every status is checked against the CRD.

From the sources of KubeRay v1.5.1 (controllers/ray/rayjob_controller.go, raycluster_controller.go, common/pod.go),
Trainer v2.2.0 (pkg/controller/trainjob_controller.go, framework/plugins/jobset), JobSet v0.11.1 and Ray 2.59
(dashboard/modules/job/job_supervisor.py).
"""

from __future__ import annotations

import copy
from typing import Any

from k8s.client import Json
from k8s.schemas.validate import problems
from tests.k8s.memory import MemoryApi

AT = "2026-11-22T00:00:00Z"


def the_exit_message(code: int, told: str = "Traceback") -> str:
    return (
        f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n{told}"
    )


class KubeRay:
    """`cluster` is the name that the operator made up for this life of the RayJob."""

    def __init__(self, api: MemoryApi, cluster: str = "x1"):
        self.api, self.cluster = api, cluster

    def status(self, deployed: str, step: str = "", message: str = "", reason: str = "") -> None:
        job = self.api.job()
        status = {"jobDeploymentStatus": deployed, "jobStatus": step, "message": message, "reason": reason}
        name = "" if deployed == "Suspended" else f"{job['metadata']['name']}-{self.cluster}"
        job["status"] = {"rayClusterName": name, "startTime": AT} | {key: one for key, one in status.items() if one}
        assert problems(_as_sent(job)) == []
        self.api._touch(job)

    def pods(self, *, submitter: bool = True, workers: int = 2, **status: Any) -> None:
        """The head, its workers and, once they are ready, the submitter."""
        job, owner = self.api.job(), {"kind": "RayCluster", "name": self.cluster, "uid": f"{self.cluster}-uid"}
        ray, name = job["spec"]["rayClusterSpec"], job["metadata"]["name"]
        head, group = ray["headGroupSpec"]["template"], ray["workerGroupSpecs"][0]["template"]
        self.pod(f"{name}-{self.cluster}-head-abcde", head, owner, **status)
        for index in range(workers):
            self.pod(f"{name}-{self.cluster}-workers-worker-{index}", group, owner, **status)
        if submitter:
            about = {"kind": "Job", "name": name, "uid": f"{name}-{self.cluster}-submitter"}
            self.pod(f"{name}-zzzzz", job["spec"]["submitterPodTemplate"], about, **status)

    def pod(self, name: str, template: Json, owner: Json, **status: Any) -> None:
        _pod(self.api, name, template, owner, {}, status)

    def shut_down(self) -> None:
        """After the end: the cluster goes, the submitter's pod stays."""
        for key in [key for key in self.api.objects if key[0] == "pods" and f"-{self.cluster}-" in key[1]]:
            del self.api.objects[key]


class Trainer:
    """Trainer and JobSet."""

    def __init__(self, api: MemoryApi):
        self.api = api

    def condition(self, kind: str, status: str = "True", reason: str = "", message: str = "", at: str = AT) -> None:
        """Failed and Complete are the JobSet's conditions, copied; Suspended is the Trainer's own."""
        job = self.api.job()
        known = [one for one in job.setdefault("status", {}).get("conditions", []) if one["type"] != kind]
        made = {"type": kind, "status": status, "reason": reason or kind, "message": message, "lastTransitionTime": at}
        job["status"]["conditions"] = [*known, made]
        assert problems(_as_sent(job)) == []
        self.api._touch(job)

    def collect(self) -> bool:
        """Whether no job is there; what its pods were owned by went with it."""
        if any(plural == "trainjobs" for plural, _ in self.api.objects):
            return False
        for key in [key for key in self.api.objects if key[0] == "pods"]:
            del self.api.objects[key]
        return True

    def pods(self, *indices: int) -> None:
        for index in indices:
            self.pod(index)

    def pod(self, index: int, suffix: str = "abcde", **status: Any) -> str:
        """Its host name, by which it knows itself; its own name has a part that is made up."""
        job = self.api.job()
        name = job["metadata"]["name"]
        runtime = self.api.objects["trainingruntimes", job["spec"]["runtimeRef"]["name"]]
        (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        owner, host = {"kind": "Job", "name": f"{name}-node-0", "uid": f"{name}-uid"}, f"{name}-node-0-{index}"
        template = replicated["template"]["spec"]["template"]
        _pod(self.api, f"{host}-{suffix}", template, owner, {"hostname": host, "subdomain": name}, status)
        return host


def _as_sent(job: Json) -> Json:
    """Without what only a server writes into metadata."""
    return {**job, "metadata": {k: v for k, v in job["metadata"].items() if k not in ("uid", "resourceVersion")}}


def _pod(api: MemoryApi, name: str, template: Json, owner: Json, more: Json, status: Json) -> None:
    template = copy.deepcopy(template)
    api.objects["pods", name] = {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "uid": f"{name}-uid",
            "labels": template["metadata"]["labels"],
            "ownerReferences": [owner],
        },
        "spec": {**template["spec"], "nodeName": "node-a", **more},
        "status": {"phase": "Running", **status},
    }
