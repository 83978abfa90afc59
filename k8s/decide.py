"""What the state of a job means and what to do next: pure functions over what was read, no client and no clock.

judge(seen, trail, ...)    -> Wait      and for how long that may last
                            | Ended     with the decision of trainer/errors.py over all ranks
next_action(history, ...)  -> Again     after a pause, without suspected nodes
                            | Stop      with the error that tells why
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from k8s.cluster import Limits
from k8s.seen import Seen, Worker
from trainer.errors import (
    DONE,
    UNKNOWN,
    ClusterError,
    Decision,
    Hang,
    OutOfMemory,
    PeerLost,
    Preempted,
    QwenVLError,
    decide,
    first_cause,
)
from trainer.heartbeat import Figures, Termination

HOPELESS = {
    "CreateContainerConfigError": "a secret, ConfigMap or key that the pod refers to is missing",
    "ErrImageNeverPull": "the image is not on the node",
    "InvalidImageName": "the image's name is wrong",
}
"""Reasons that no waiting cures."""
UNPULLED = {"ImagePullBackOff": "the image cannot be pulled"}
"""No waiting cures it for an image that nobody ever had. One that a pod of this step did have, by the same digest, is
there and may be read: then it is this node or the registry, and the next attempt may do better."""
UNSTARTED = {
    "CreateContainerError": "the container cannot be made",
    "RunContainerError": "the container cannot be started",
}
"""Reasons that may be the node's: its container runtime, its driver, its devices."""
FAULTS = {-7, -11, 132, 135, 136, 139}
"""Illegal instruction, bus error, arithmetic error, segmentation fault: perhaps the node's hardware."""
UNRANKED = 1_000_000
"""Keys from here on are pods whose container left an exit code, but no record of its ranks."""
MARGIN_S = 60.0
"""Added to a phase's own limit, which the node itself watches: the launcher comes second."""
SETTLE_S = 5.0
"""After a job has failed, for its other pods to end: the decision is over all ranks, and a sign in the API leads to a
decision within 10 s."""


@dataclass(frozen=True)
class NodeBeat:
    """One node's heartbeat. `sequence` moves as long as the node lives, `beats` as long as its ranks get on."""

    sequence: int
    beats: int | None = None
    step: int = 0
    phase: str = ""
    limit_s: float | None = None


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
    nodes: tuple[tuple[str, NodeBeat], ...] = ()
    """By the name of the pod."""
    figures: Figures | None = None


@dataclass
class Trail:
    """What has been seen over one attempt: pods vanish within seconds of the end, what they said must not."""

    started: float
    workers: dict[str, Worker] = field(default_factory=dict)
    waiting_for: str = ""
    waiting_since: float = 0.0
    progress: Progress = Progress()
    progress_since: float = 0.0
    nodes: dict[str, tuple[NodeBeat, float, float]] = field(default_factory=dict)
    """Name of a pod -> its heartbeat, since when its sequence has been so, since when its beats."""
    suspensions: str | None = None
    failed_since: float | None = None
    pulled: set[str] = field(default_factory=set)
    """Images that pods of this step had, in this attempt or one before."""


@dataclass(frozen=True)
class Wait:
    kind: Literal["queue", "schedule", "start", "run", "end"]
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
    settled: bool = False
    """Nothing that the pods still say can change it: the launcher ended the attempt, not a rank."""
    pulled: tuple[str, ...] = ()
    """Images that its pods had."""


@dataclass(frozen=True)
class Again:
    delay_s: float
    exclude_nodes: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Stop:
    error: QwenVLError


# ---------------------------------------------------------------- judging


def judge(
    seen: Seen,
    trail: Trail,
    progress: Progress | None,
    limits: Limits,
    now: float,
    *,
    heard_at: float | None = None,
) -> Wait | Ended:
    """What the attempt is doing, or how it ended. Keeps the trail.

    Args:
        progress: None while storage does not answer: silence that nobody could have broken is not counted.
        heard_at: when it was read, which may be a while ago: silence counts up to then. Default: now.
    """
    if progress is None:
        progress, heard_at = _unseen(trail, now), now
    at = {"step": progress.step, "committed_step": progress.committed_step, "settled": True}
    if not seen.exists:
        cause = "the job is gone: somebody deleted it, which means stop"
        return Ended("permanent", ClusterError.code, cause, **at)
    if seen.suspended or trail.suspensions not in (None, seen.suspensions):
        trail.workers.clear()  # pods come back with other uids
        trail.nodes.clear()
    trail.suspensions = seen.suspensions
    if seen.suspended:
        reason = f"suspended: waiting for quota{': ' + seen.queue_note if seen.queue_note else ''}"
        return _patience(Wait("queue", reason), trail, limits, now)
    if (replaced := _replaced(seen, trail)) is not None:
        # The new pod would wait in rendezvous for ranks that have gone on without it.
        cause = f"pod {replaced.name} was replaced in the middle"
        return Ended("retry", UNKNOWN, cause, node=trail.workers[replaced.name].node, **at)
    for worker in seen.workers:
        trail.workers[worker.name] = worker
    trail.pulled |= {worker.image for worker in seen.workers if worker.pulled and worker.image}
    if seen.outcome == "succeeded":
        return Ended("done", DONE, "succeeded", **at)
    if seen.outcome == "failed":
        return _failed(seen, trail, progress, now)
    if not seen.at_work and (never := _never_starts(seen, trail)) is not None:
        decision, worker, why = never
        cause = f"pod {worker.name} on {worker.node}: {why} ({worker.waiting})"
        return Ended(decision, ClusterError.code, cause, node=worker.node, suspect=decision == "retry", **at)
    return _running(seen, trail, progress, limits, now, heard_at=now if heard_at is None else heard_at)


def _never_starts(seen: Seen, trail: Trail) -> tuple[Decision, Worker, str] | None:
    """The first pod whose container will not start as things are, and whether it may elsewhere."""
    for worker in seen.workers:
        reason = worker.waiting.partition(":")[0]
        if reason in UNPULLED:
            known = worker.image in trail.pulled
            why = f"{UNPULLED[reason]}{', which another pod had' if known else ''}"
            return "retry" if known else "permanent", worker, why
        if reason in HOPELESS:
            return "permanent", worker, HOPELESS[reason]
        if reason in UNSTARTED:
            return "retry", worker, UNSTARTED[reason]
    return None


def _unseen(trail: Trail, now: float) -> Progress:
    trail.progress_since = now
    trail.nodes = {name: (beat, now, now) for name, (beat, _, _) in trail.nodes.items()}
    return trail.progress


def _replaced(seen: Seen, trail: Trail) -> Worker | None:
    known = trail.workers
    return next((one for one in seen.workers if one.name in known and known[one.name].uid != one.uid), None)


def _failed(seen: Seen, trail: Trail, progress: Progress, now: float) -> Wait | Ended:
    """The operator says so at the first pod that failed; the others have a moment to end."""
    trail.failed_since = now if trail.failed_since is None else trail.failed_since
    late = [one.name for one in seen.workers if not one.over]
    if late and seen.code is None and now - trail.failed_since < SETTLE_S:
        return Wait("end", f"the job failed; waiting for {', '.join(late[:3])} to end")
    end = cause_of_end(trail.workers.values(), seen.message, progress, code=seen.code)
    if seen.refused:
        return replace(end, decision="permanent", code=ClusterError.code, settled=True)
    return end


def _running(
    seen: Seen, trail: Trail, progress: Progress, limits: Limits, now: float, *, heard_at: float
) -> Wait | Ended:
    """Not ended by its own account: waiting for nodes, for containers, or at work."""
    nodeless = next((one for one in seen.workers if one.node is None), None)
    if not seen.at_work and (len(seen.workers) < seen.wanted or nodeless is not None):
        reason = (nodeless.unschedulable if nodeless else "") or seen.note or seen.queue_note or "no node yet"
        text = f"{_bound(seen)} of {seen.wanted} pods have a node: {reason}"
        return _patience(Wait("schedule", text), trail, limits, now)
    idle = next((one for one in seen.workers if one.phase == "Pending"), None)
    if idle is not None and not seen.at_work:
        reason = "; ".join(part for part in (idle.waiting, idle.note) if part) or "starting"
        return _patience(Wait("start", f"{idle.name} on {idle.node}: {reason}"), trail, limits, now)
    if trail.waiting_for != "run":
        trail.waiting_for, trail.progress_since = "run", now
        trail.nodes.clear()
    if progress != trail.progress:
        trail.progress, trail.progress_since = progress, heard_at
    if not progress.watched:
        return Wait("run", "at work")
    if (hang := _hang(seen, trail, progress, limits, heard_at)) is not None:
        return hang
    return Wait("run", f"{progress.phase or 'starting'}, step {progress.step}")


def _hang(seen: Seen, trail: Trail, progress: Progress, limits: Limits, now: float) -> Ended | None:
    """Of any node: its heartbeat stands still, or its ranks do for longer than their phase may take."""
    at = {"step": progress.step, "committed_step": progress.committed_step, "settled": True}
    place = {one.node_name: one.node for one in seen.workers if not one.over}
    for name, beat in progress.nodes:
        if name not in place:
            continue  # its heart may rest
        known, since_sequence, since_beats = trail.nodes.get(name, (beat, now, now))
        since_sequence = since_sequence if beat.sequence == known.sequence else now
        moved = (beat.beats, beat.step, beat.phase) != (known.beats, known.step, known.phase)
        since_beats = now if moved or beat.beats is None else since_beats
        trail.nodes[name] = beat, since_sequence, since_beats
        if now - since_sequence > limits.silence_s:
            cause = f"no heartbeat of {name} for {now - since_sequence:.0f} s (limits.silence_s {limits.silence_s})"
            return Ended("retry", Hang.code, cause, node=place[name], suspect=True, **at)
        limit = (beat.limit_s or limits.silence_s) + MARGIN_S
        if now - since_beats > limit:
            cause = f"no progress of {name} for {now - since_beats:.0f} s in phase {beat.phase} (limit {limit:.0f} s)"
            return Ended("retry", Hang.code, cause, node=place[name], **at)
    silence = now - trail.progress_since
    limit = max(limits.silence_s, progress.limit_s + MARGIN_S if progress.limit_s else 0)
    if silence > limit:
        cause = f"no progress for {silence:.0f} s in phase {progress.phase or 'start'} (limit {limit:.0f} s)"
        return Ended("retry", Hang.code, cause, **at)
    return None


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
    return Ended("retry" if wait.kind == "start" else "permanent", ClusterError.code, cause, settled=True)


# ---------------------------------------------------------------- the decision over all ranks


def with_records(workers: Iterable[Worker], ends: Mapping[str, Termination]) -> list[Worker]:
    """Workers whose pods went before anybody read them, with what their nodes wrote to storage.

    A record of before the container started (the attempt was suspended meanwhile) is another life's; both times are of
    one node's clock.
    """
    made = []
    for worker in workers:
        end = ends.get(worker.node_name)
        if worker.termination is None and end is not None and (not worker.started or end.time >= worker.started):
            code = end.code if worker.code is None else worker.code
            worker = replace(worker, termination=end, code=code)
        made.append(worker)
    return made


def cause_of_end(workers: Iterable[Worker], message: str, progress: Progress, *, code: int | None = None) -> Ended:
    """The decision over all ranks of all pods; `code` is the step's own where the job itself says it."""
    found, settled = sorted(workers, key=lambda one: one.name), code is not None
    codes, place = ({UNRANKED: code}, {}) if code is not None else _codes(found)
    platform = any(one.disrupted for one in found)
    own = {code for code in codes.values() if code not in (DONE, Preempted.code, PeerLost.code, Hang.code, -15)}
    if own and not platform:
        # The operator stops the other pods when one has failed: their 143 is its doing, not a preemption.
        codes = {rank: code for rank, code in codes.items() if code != Preempted.code}
    ends = [one.termination for one in found if one.termination]
    committed = max((end.committed_step for end in ends if end.committed_step is not None), default=None)
    rank, code = first_cause(codes)
    decision = decide(codes.values())
    if decision == "done":  # the job failed, but no pod says why: taken away, or its node is gone
        decision, code = ("preempted", Preempted.code) if platform else ("retry", UNKNOWN)
    elif decision == "preempted" and not platform and committed is None:
        decision = "retry"  # says it was stopped in time, but nothing shows it
    elif platform and decision in ("retry", "retry-once"):
        decision = "preempted"  # eviction shows as 137, and the peers as lost
    where = place.get(rank)
    pod = "by its job's word" if settled else "no pod said why"
    if where:
        pod = f"pod {where.name} on {where.node or 'a node not known any more'}"
    told = where.termination.error if where and where.termination and where.termination.rank == rank else ""
    cause = f"rank {rank} ended with {code}" if 0 <= rank < UNRANKED else f"exit code {code}"
    return Ended(
        decision,
        code,
        f"{cause} ({pod}){': ' + text if (text := told or message) else ''}",
        step=max([progress.step, *(end.step for end in ends)]),
        committed_step=committed if committed is not None else progress.committed_step,
        node=where.node if where else None,
        suspect=code in FAULTS or bool(where and where.phase == "Unknown"),
        settled=settled,
    )


def _codes(workers: Sequence[Worker]) -> tuple[dict[int, int], dict[int, Worker]]:
    """(rank -> exit code, rank -> its pod); a pod without a record of its ranks has a key of its own."""
    codes: dict[int, int] = {}
    place: dict[int, Worker] = {}
    for index, worker in enumerate(workers):
        recorded = worker.termination.codes if worker.termination else {}
        for rank, code in (dict(recorded) or {UNRANKED + index: worker.code}).items():
            if code is not None:
                codes[rank] = OutOfMemory.code if worker.oom and code in (137, -9) else code
                place[rank] = worker
    return codes, place


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
        return _after_preemption(history, limits)
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


def _after_preemption(history: Sequence[Ended], limits: Limits) -> Again | Stop:
    """Not counted as an attempt; but one after the other without a commit in between gets nowhere."""
    last = history[-1]
    row = 0
    for one in reversed(history):
        if one.decision != "preempted":
            break
        row += 1
    without = min(row, _without_progress(history))
    if without >= limits.preemptions_without_progress:
        what = f"preempted {without} times in a row without a commit (limits.preemptions_without_progress)"
        return Stop(_error(f"{what}: commit more often (checkpoint.every_steps)", last, history))
    delay = min(limits.backoff_s * 2 ** (without - 2), limits.backoff_max_s) if without > 1 else 0
    return Again(float(delay), _suspects(history), f"preempted: {last.cause}")


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
