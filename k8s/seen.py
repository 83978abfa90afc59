"""What the API shows of one attempt at one moment, as few plain facts: read(job, pods, events) -> Seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from k8s.mirror import Event
from trainer.heartbeat import Termination

Json = Mapping[str, Any]


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
    workers: tuple[Worker, ...] = ()
    wanted: int = 1
    queue_note: str = ""
    """Why the queue lets it wait."""
    note: str = ""
    """The newest warning about the job itself: pods that quota or a policy refuses."""


def read(job: Json | None, pods: Sequence[Json], events: Sequence[Event] = ()) -> Seen:
    """PyTorchJob or Job, its pods and what was said about them, oldest first."""
    if job is None:
        return Seen(exists=False)
    conditions = {one["type"]: one for one in job.get("status", {}).get("conditions") or []}
    true = {kind: one for kind, one in conditions.items() if one.get("status") == "True"}
    failed, done = true.get("Failed"), true.get("Succeeded") or true.get("Complete")
    spec, name = job["spec"], job["metadata"]["name"]
    return Seen(
        exists=True,
        suspended="Suspended" in true and failed is None and done is None,
        suspensions=conditions.get("Suspended", {}).get("lastTransitionTime", ""),
        outcome="failed" if failed else "succeeded" if done else None,
        message=(failed or done or {}).get("message", ""),
        workers=tuple(sorted((_worker(pod, events) for pod in pods), key=lambda one: one.name)),
        wanted=spec["pytorchReplicaSpecs"]["Worker"]["replicas"] if "pytorchReplicaSpecs" in spec else 1,
        queue_note=_newest([one for one in events if one.kind == "Workload" and f"-{name}-" in one.name]),
        note=_newest([one for one in events if one.warning and one.name == name]),
    )


def _worker(pod: Json, events: Sequence[Event]) -> Worker:
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    conditions = {one["type"]: one for one in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled", {})
    state = next((one.get("state", {}) for one in status.get("containerStatuses") or []), {})
    ended, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    return Worker(
        name=name,
        uid=pod["metadata"]["uid"],
        node=pod.get("spec", {}).get("nodeName"),
        phase=status.get("phase", "Pending"),
        waiting=": ".join(part for part in (waiting.get("reason", ""), waiting.get("message", "")) if part),
        unschedulable=scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else "",
        code=ended.get("exitCode"),
        oom=ended.get("reason") == "OOMKilled",
        disrupted=conditions.get("DisruptionTarget", {}).get("status") == "True",
        termination=_termination(ended.get("message")),
        started=(ended.get("startedAt") or (state.get("running") or {}).get("startedAt")) or "",
        note=_newest([one for one in events if one.warning and one.name == name]),
    )


def _newest(events: Sequence[Event]) -> str:
    return f"{events[-1].reason}: {events[-1].message}" if events else ""


def _termination(message: str | None) -> Termination | None:
    try:
        return Termination.model_validate_json(message) if message else None
    except ValidationError:
        return None
