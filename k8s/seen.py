"""What the API shows of one attempt at one moment, as few plain facts: read(job, pods, events) -> Seen.

PyTorchJob, Job and TrainJob say in conditions what became of them (Suspended; Succeeded or Complete; Failed). A RayJob
has two words for it (KubeRay v1.5.1, controllers/ray/rayjob_controller.go): jobDeploymentStatus is the operator's work,
jobStatus the step's, and a step that was stopped is Complete as well. Its pods are Ray's and come and go: none of their
exit codes is the step's. That one is in the message that Ray writes (Ray 2.59, job_supervisor.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from k8s.kinds import container_of, num_pods
from k8s.mirror import Event
from k8s.rayjob import HEAD
from trainer.errors import OutOfMemory
from trainer.heartbeat import Termination

Json = dict[str, Any]

NUM_LINES = 15
"""Of the end of a RayJob's message, which has the step's last 20,000 characters."""


@dataclass(frozen=True)
class Worker:
    """One pod."""

    name: str
    uid: str
    node: str | None
    phase: str
    waiting: str = ""
    """Reason and message of a container that does not start."""
    unschedulable: str = ""
    code: int | None = None
    oom: bool = False
    disrupted: bool = False
    """DisruptionTarget: the platform took it away."""
    termination: Termination | None = None
    started: str = ""
    """When its container started, by the node's clock."""
    note: str = ""
    """The newest warning about this pod: a volume, an image, a probe."""
    container: str = ""
    image: str = ""
    pulled: bool = False
    """Its image was there: the container started, now or before."""
    host: str = ""
    """What the pod calls itself, where that is not its name: pods of a TrainJob have a name that is made up."""

    @property
    def node_name(self) -> str:
        """As heartbeats and records in storage have it."""
        return self.host or self.name

    @property
    def over(self) -> bool:
        """Its container runs no more, and will not again."""
        return self.phase in ("Succeeded", "Failed") or self.code is not None or self.termination is not None


@dataclass(frozen=True)
class Seen:
    exists: bool
    suspended: bool = False
    suspensions: str = ""
    """When it was last suspended or resumed: another value means that its pods were taken away on purpose."""
    outcome: Literal["succeeded", "failed"] | None = None
    message: str = ""
    code: int | None = None
    """Exit code of the step, where the job itself says it."""
    refused: bool = False
    """Its operator refuses the job as it is."""
    at_work: bool = False
    """The job itself says that the step runs: pods that are missing are its operator's to replace."""
    workers: tuple[Worker, ...] = ()
    wanted: int = 1
    queue_note: str = ""
    """Why the queue lets it wait."""
    note: str = ""
    """The newest warning about the job itself: pods that quota or a policy refuses."""


def read(job: Json | None, pods: Sequence[Json], events: Sequence[Event] = ()) -> Seen:
    """A job of any kind, its pods and what was said about them, oldest first.

    One that is being deleted does not exist any more: its operator may hold it back for a while (finalizers).
    """
    if job is None:
        return Seen(exists=False)
    name, first = job["metadata"]["name"], container_of(job)
    workers = sorted((_worker(pod, events) for pod in pods), key=lambda one: (one.container != first, one.name))
    ray = job["kind"] == "RayJob"
    seen = Seen(
        exists="deletionTimestamp" not in job["metadata"],
        workers=tuple(_of_ray(one) for one in workers) if ray else tuple(workers),
        wanted=num_pods(job),
        queue_note=_newest([one for one in events if one.kind == "Workload" and f"-{name}-" in one.name]),
        note=_newest([one for one in events if one.warning and one.name == name]),
    )
    return (_told_by_ray if ray else _told_by_conditions)(seen, job.get("status") or {})


def _told_by_conditions(seen: Seen, status: Json) -> Seen:
    conditions = {one["type"]: one for one in status.get("conditions") or []}
    true = {kind: one for kind, one in conditions.items() if one.get("status") == "True"}
    failed, done = true.get("Failed"), true.get("Succeeded") or true.get("Complete")
    return replace(
        seen,
        suspended="Suspended" in true and failed is None and done is None,
        suspensions=conditions.get("Suspended", {}).get("lastTransitionTime", ""),
        outcome="failed" if failed else "succeeded" if done else None,
        message=(failed or done or {}).get("message", ""),
    )


def _told_by_ray(seen: Seen, status: Json) -> Seen:
    deployed, step, message = (status.get(key, "") for key in ("jobDeploymentStatus", "jobStatus", "message"))
    outcome: Literal["succeeded", "failed"] | None = None
    if deployed in ("Complete", "Failed", "ValidationFailed"):
        outcome = "succeeded" if (deployed, step) == ("Complete", "SUCCEEDED") else "failed"
    code = re.search(r"failed with exit code (-?\d+)", message) if step == "FAILED" else None
    head, *rest = message.splitlines() or [""]
    told = [step.lower() if step == "STOPPED" else "", status.get("reason", ""), head]
    return replace(
        seen,
        suspended=deployed in ("Suspending", "Suspended"),
        suspensions=status.get("rayClusterName", ""),  # another one after each suspension
        outcome=outcome,
        message="\n".join([": ".join(part for part in told if part), *rest[-NUM_LINES:]]),
        code=int(code[1]) if code and outcome == "failed" else None,
        refused=deployed == "ValidationFailed",
        at_work=deployed == "Running" and step == "RUNNING",
    )


def _of_ray(worker: Worker) -> Worker:
    """A pod of a RayJob: how Ray's own processes ended is not how the step did. The step's process is in the head's
    pod: with it the step is lost, and that the platform took it away or that its memory was short is told of both."""
    code = OutOfMemory.code if worker.container == HEAD and worker.oom else None
    return replace(worker, code=code, disrupted=worker.disrupted and worker.container == HEAD, termination=None)


def _worker(pod: Json, events: Sequence[Event]) -> Worker:
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    conditions = {one["type"]: one for one in status.get("conditions") or []}
    scheduled, spec = conditions.get("PodScheduled", {}), pod.get("spec", {})
    about = next(iter(status.get("containerStatuses") or []), {})
    state = about.get("state", {})
    ended, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    container = next(iter(spec.get("containers") or []), {})
    return Worker(
        name=name,
        uid=pod["metadata"]["uid"],
        node=spec.get("nodeName"),
        phase=status.get("phase", "Pending"),
        waiting=": ".join(part for part in (waiting.get("reason", ""), waiting.get("message", "")) if part),
        unschedulable=scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else "",
        code=ended.get("exitCode"),
        oom=ended.get("reason") == "OOMKilled",
        disrupted=conditions.get("DisruptionTarget", {}).get("status") == "True",
        termination=_termination(ended.get("message")),
        started=(ended.get("startedAt") or (state.get("running") or {}).get("startedAt")) or "",
        note=_newest([one for one in events if one.warning and one.name == name]),
        container=container.get("name", ""),
        image=container.get("image", ""),
        pulled=bool(about.get("imageID")) or "running" in state,
        host=spec.get("hostname", ""),
    )


def _newest(events: Sequence[Event]) -> str:
    return f"{events[-1].reason}: {events[-1].message}" if events else ""


def _termination(message: str | None) -> Termination | None:
    try:
        return Termination.model_validate_json(message) if message else None
    except ValidationError:
        return None
