"""What the state of a job means and what to do next: pure functions over what was read, no client and no clock.

read(job, pods)            -> Seen      what the API shows of one attempt at one moment
judge(seen, trail, ...)    -> Wait      and for how long that may last
                            | Ended     with the decision of trainer/errors.py over all ranks
next_action(history, ...)  -> Again     after a pause, without suspected nodes
                            | Stop      with the error that tells why
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from k8s.cluster import Limits
from trainer.errors import (
    DONE,
    UNKNOWN,
    ClusterError,
    Decision,
    Hang,
    OutOfMemory,
    Preempted,
    QwenVLError,
    decide,
    first_cause,
)
from trainer.heartbeat import Termination

Json = Mapping[str, Any]

HOPELESS = {
    "CreateContainerConfigError": "a secret, ConfigMap or key that the pod refers to is missing",
    "CreateContainerError": "the container cannot be made",
    "ErrImageNeverPull": "the image is not on the node",
    "ImagePullBackOff": "the image cannot be pulled",
    "InvalidImageName": "the image's name is wrong",
    "RunContainerError": "the container cannot be started",
}
"""Reasons that no waiting cures."""
FAULTS = {-7, -11, 132, 135, 136, 139}
"""Illegal instruction, bus error, arithmetic error, segmentation fault: perhaps the node's hardware."""
UNRANKED = 1_000_000
"""Keys from here on are pods whose container left an exit code, but no record of its ranks."""
MARGIN_S = 60.0
"""Added to a phase's own limit, which the node itself watches: the launcher comes second."""


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


@dataclass(frozen=True)
class Seen:
    exists: bool
    suspended: bool = False
    outcome: Literal["succeeded", "failed"] | None = None
    message: str = ""
    workers: tuple[Worker, ...] = ()
    wanted: int = 1


@dataclass(frozen=True)
class Progress:
    """From the heartbeats in storage: what moves when the job does.

    Programs without heartbeats (preparation, export, ...) are not `watched`: only the deadline ends them.
    """

    watched: bool = True

    sequence: int = 0
    step: int = 0
    phase: str = ""
    limit_s: float | None = None
    committed_step: int | None = None


@dataclass
class Trail:
    """What has been seen over one attempt: pods vanish within seconds of the end, what they said must not."""

    started: float
    workers: dict[str, Worker] = field(default_factory=dict)
    waiting_for: str = ""
    waiting_since: float = 0.0
    progress: Progress = Progress()
    progress_since: float = 0.0


@dataclass(frozen=True)
class Wait:
    kind: Literal["queue", "schedule", "start", "run"]
    reason: str


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    decision: Decision
    code: int
    cause: str
    step: int = 0
    committed_step: int | None = None
    node: str | None = None
    """Where the first cause was."""
    suspect: bool = False
    """The node itself may be at fault."""


@dataclass(frozen=True)
class Again:
    delay_s: float
    exclude_nodes: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Stop:
    error: QwenVLError


# ---------------------------------------------------------------- reading


def read(job: Json | None, pods: Sequence[Json]) -> Seen:
    """PyTorchJob or Job, and its pods."""
    if job is None:
        return Seen(exists=False)
    true = {one["type"]: one for one in job.get("status", {}).get("conditions") or [] if one.get("status") == "True"}
    failed = true.get("Failed")
    done = true.get("Succeeded") or true.get("Complete")
    spec = job["spec"]
    wanted = spec["pytorchReplicaSpecs"]["Worker"]["replicas"] if "pytorchReplicaSpecs" in spec else 1
    return Seen(
        exists=True,
        suspended="Suspended" in true and failed is None and done is None,
        outcome="failed" if failed else "succeeded" if done else None,
        message=(failed or done or {}).get("message", ""),
        workers=tuple(sorted((_worker(pod) for pod in pods), key=lambda one: one.name)),
        wanted=wanted,
    )


def _worker(pod: Json) -> Worker:
    status = pod.get("status", {})
    conditions = {one["type"]: one for one in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled", {})
    state = next((one.get("state", {}) for one in status.get("containerStatuses") or []), {})
    ended, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    return Worker(
        name=pod["metadata"]["name"],
        uid=pod["metadata"]["uid"],
        node=pod.get("spec", {}).get("nodeName"),
        phase=status.get("phase", "Pending"),
        waiting=": ".join(part for part in (waiting.get("reason", ""), waiting.get("message", "")) if part),
        unschedulable=scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else "",
        code=ended.get("exitCode"),
        oom=ended.get("reason") == "OOMKilled",
        disrupted=conditions.get("DisruptionTarget", {}).get("status") == "True",
        termination=_termination(ended.get("message")),
    )


def _termination(message: str | None) -> Termination | None:
    try:
        return Termination.model_validate_json(message) if message else None
    except ValidationError:
        return None


# ---------------------------------------------------------------- judging


def judge(seen: Seen, trail: Trail, progress: Progress, limits: Limits, now: float) -> Wait | Ended:
    """What the attempt is doing, or how it ended. Keeps the trail."""
    if not seen.exists:
        error = "the job is gone: somebody deleted it, which means stop"
        return Ended("permanent", ClusterError.code, error, progress.step, progress.committed_step)
    if seen.suspended:
        trail.workers.clear()  # pods come back with other uids
        return _patience(Wait("queue", "suspended: waiting for quota"), trail, limits, now)
    if (replaced := _replaced(seen, trail)) is not None:
        # The new pod would wait in rendezvous for ranks that have gone on without it.
        return Ended(
            "retry",
            UNKNOWN,
            f"pod {replaced.name} was replaced in the middle",
            progress.step,
            progress.committed_step,
            replaced.node,
        )
    for worker in seen.workers:
        trail.workers[worker.name] = worker
    if seen.outcome == "succeeded":
        return Ended("done", DONE, "succeeded", progress.step, progress.committed_step)
    if seen.outcome == "failed":
        return cause_of_end(trail.workers.values(), seen.message, progress)
    for worker in seen.workers:
        if (reason := worker.waiting.partition(":")[0]) in HOPELESS:
            cause = f"pod {worker.name}: {HOPELESS[reason]} ({worker.waiting})"
            return Ended("permanent", ClusterError.code, cause, progress.step, progress.committed_step, worker.node)
    return _running(seen, trail, progress, limits, now)


def _replaced(seen: Seen, trail: Trail) -> Worker | None:
    known = trail.workers
    return next((one for one in seen.workers if one.name in known and known[one.name].uid != one.uid), None)


def _running(seen: Seen, trail: Trail, progress: Progress, limits: Limits, now: float) -> Wait | Ended:
    """Not ended by its own account: waiting for nodes, for containers, or at work."""
    nodeless = next((one for one in seen.workers if one.node is None), None)
    if len(seen.workers) < seen.wanted or nodeless is not None:
        reason = nodeless.unschedulable if nodeless and nodeless.unschedulable else "no node yet"
        return _patience(
            Wait("schedule", f"{_bound(seen)} of {seen.wanted} pods have a node: {reason}"), trail, limits, now
        )
    idle = next((one for one in seen.workers if one.phase == "Pending"), None)
    if idle is not None:
        return _patience(Wait("start", f"{idle.name} on {idle.node}: {idle.waiting or 'starting'}"), trail, limits, now)
    if progress != trail.progress or trail.waiting_for != "run":
        trail.progress, trail.progress_since, trail.waiting_for = progress, now, "run"
    if not progress.watched:
        return Wait("run", "at work")
    silence = now - trail.progress_since
    limit = max(limits.silence_s, progress.limit_s + MARGIN_S if progress.limit_s else 0)
    if silence > limit:
        cause = f"no progress for {silence:.0f} s in phase {progress.phase or 'start'} (limit {limit:.0f} s)"
        return Ended("retry", Hang.code, cause, progress.step, progress.committed_step)
    return Wait("run", f"{progress.phase or 'starting'}, step {progress.step}")


def _bound(seen: Seen) -> int:
    return sum(one.node is not None for one in seen.workers)


def _patience(wait: Wait, trail: Trail, limits: Limits, now: float) -> Wait | Ended:
    """Waiting of one kind has one time-out, counted from when it began."""
    if trail.waiting_for != wait.kind:
        trail.waiting_for, trail.waiting_since = wait.kind, now
    limit = {"queue": limits.queue_s, "schedule": limits.schedule_s, "start": limits.start_s}[wait.kind]
    if now - trail.waiting_since <= limit:
        return wait
    cause = f"{wait.reason} (waited {now - trail.waiting_since:.0f} s, limits.{wait.kind}_s is {limit})"
    # A container that hangs in starting may do better elsewhere; no quota and no node will not come by trying again.
    return Ended("retry" if wait.kind == "start" else "permanent", ClusterError.code, cause)


def cause_of_end(workers: Any, message: str, progress: Progress) -> Ended:
    """The decision over all ranks of all pods."""
    codes: dict[int, int] = {}
    place: dict[int, Worker] = {}
    errors: dict[int, str] = {}
    platform = False
    for index, worker in enumerate(sorted(workers, key=lambda one: one.name)):
        found = (
            dict(worker.termination.codes)
            if worker.termination and worker.termination.codes
            else {UNRANKED + index: worker.code}
        )
        platform |= worker.disrupted
        for rank, code in found.items():
            if code is None:
                continue
            codes[rank] = OutOfMemory.code if worker.oom and code in (137, -9) else code
            place[rank] = worker
            errors[rank] = worker.termination.error if worker.termination and worker.termination.rank == rank else ""
    committed = max(
        (
            w.termination.committed_step
            for w in place.values()
            if w.termination and w.termination.committed_step is not None
        ),
        default=None,
    )
    step = max([progress.step, *(w.termination.step for w in place.values() if w.termination)])
    rank, code = first_cause(codes)
    decision = decide(codes.values())
    if decision == "done":  # the job failed, but no pod says why: taken away, or its node is gone
        decision, code = ("preempted", Preempted.code) if platform else ("retry", UNKNOWN)
    elif decision == "preempted" and not platform and committed is None:
        decision = "retry"  # says it was stopped in time, but nothing shows it
    elif platform and decision in ("retry", "retry-once"):
        decision = "preempted"  # eviction shows as 137, and the peers as lost
    where = place.get(rank)
    pod = f"pod {where.name} on {where.node}" if where else "no pod said why"
    told = errors.get(rank) or message
    cause = f"rank {rank} ended with {code}" if 0 <= rank < UNRANKED else f"exit code {code}"
    return Ended(
        decision,
        code,
        f"{cause} ({pod}){': ' + told if told else ''}",
        step=step,
        committed_step=committed if committed is not None else progress.committed_step,
        node=where.node if where else None,
        suspect=code in FAULTS or bool(where and where.phase == "Unknown"),
    )


# ---------------------------------------------------------------- what next


def next_action(history: Sequence[Ended], limits: Limits, elapsed_s: float) -> Again | Stop:
    """After an attempt that did not finish the step. `history` is of all attempts, oldest first."""
    last = history[-1]
    counted = [one for one in history if one.decision != "preempted"]
    if last.decision == "permanent":
        return Stop(_error("the step failed, and trying again would not help", last, history))
    if elapsed_s > limits.deadline_s:
        return Stop(_error(f"not finished within limits.deadline_s {limits.deadline_s}", last, history))
    if last.decision == "preempted":
        return Again(0.0, _suspects(history), f"preempted: {last.cause}")
    if len(counted) >= limits.attempts:
        return Stop(_error(f"all {limits.attempts} attempts failed (limits.attempts)", last, history))
    if last.decision in ("retry-once", "done") and _same_again(counted):
        return Stop(_error("the same error came back", last, history))
    if (without := _without_progress(counted)) >= limits.without_progress:
        return Stop(
            _error(f"{without} attempts in a row committed nothing new (limits.without_progress)", last, history)
        )
    delay = min(limits.backoff_s * 2 ** min(without, 20), limits.backoff_max_s)
    return Again(float(delay), _suspects(history), last.cause)


def _same_again(counted: Sequence[Ended]) -> bool:
    if len(counted) < 2:
        return False
    one, two = counted[-2:]
    return (one.code, one.step) == (two.code, two.step) or one.code == two.code == OutOfMemory.code


def _without_progress(counted: Sequence[Ended]) -> int:
    """Attempts at the end of the history that committed nothing beyond what was committed before them."""
    best, since = -1, 0
    for one in counted:
        if one.committed_step is not None and one.committed_step > best:
            best, since = one.committed_step, 0
        else:
            since += 1
    return since


def _suspects(history: Sequence[Ended]) -> tuple[str, ...]:
    """Nodes of the last two suspected faults; more would eat up a pool."""
    nodes = [one.node for one in history if one.suspect and one.node]
    return tuple(dict.fromkeys(nodes[-2:]))


def _error(what: str, last: Ended, history: Sequence[Ended]) -> QwenVLError:
    lines = [
        f"    attempt {number}: {one.decision}, {one.cause.splitlines()[0]}" for number, one in enumerate(history, 1)
    ]
    error = ClusterError(what, where=f"step {last.step}", got="\n".join([last.cause, *lines[-10:]]))
    if last.code not in (DONE, UNKNOWN):
        error.code = last.code  # the cause's own code goes on to whoever started us
    return error
