"""The launcher's loop: attempts of one step, until it is done or cannot be.

In the order things happen:
    1  a stage whose result in storage verifies is done: nothing is created
    2  the newest job of this (output, stage) that has not ended is adopted: its spec is compared field by field, and
       this launcher becomes its owner (with resourceVersion: of two launchers one wins, the other sees it)
    3  else, once no pod of an earlier attempt runs any more, the next attempt is created: dry-run of everything first,
       all Strict
    4  the job is watched (k8s/mirror.py): k8s/decide.py says what its state means
    5  what became of the attempt is kept in storage (k8s/record.py) before the next one begins
    6  success is what the StageResult in storage says, not what the job says

Everything that can be decided without a cluster is in k8s/decide.py. This file never imports torch or mlflow.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

from k8s import decide, logs, names
from k8s.asking import CALL_S, WAIT_S, Answers, Heartbeats, Look
from k8s.attempts import Attempts, attempt_of, excluded_by, never_fits, refuse_suspended
from k8s.client import Api, Exists, Json, QuotaExceeded, Unreachable, kind_of
from k8s.cluster import Cluster
from k8s.decide import Again, Ended, Progress, Stop, Trail, Wait
from k8s.kinds import container_of, pods_of
from k8s.logs import Follower
from k8s.mirror import Event, Mirror, View
from k8s.pace import Pace
from k8s.pytorchjob import Rendered
from k8s.record import Record, Records, refuse_given_up, series
from k8s.seen import Seen, Worker, read
from k8s.tasks import Task
from trainer import tries
from trainer.errors import UNKNOWN, ClusterError, Preempted, StorageError

LOOK_S = 15.0
"""Between two looks at the heartbeats; changes on the cluster come at once."""
BEGIN_S = 3.0
"""For the record of an attempt that begins, which the watch of its pods waits for."""
QUOTA_S = 20.0
GONE_S = 2.0
RENEW_S = 300.0
GONE_MARGIN_S = 60.0
"""Beyond their grace, for pods of an ended attempt; then their node does not answer and is left out."""

Say = Callable[[str], None]


class Launcher:
    """Attempts of one step, until it is done or cannot be.

    Args:
        view: what the loop looks at; default: a Mirror of the API.
        follow: whether rank 0's log is shown.
        retried: started by a pipeline, which starts it again after any failure: what was given up or suspended by a
            person a moment ago then stays so.
        name: of this launcher, another for each; default: host and a random part.
    """

    def __init__(
        self,
        api: Api,
        cluster: Cluster,
        task: Task,
        *,
        say: Say,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
        view: View | None = None,
        follow: bool = True,
        retried: bool = False,
        name: str | None = None,
    ):
        self.api, self.cluster, self.task, self.follow, self.retried = api, cluster, task, follow, retried
        self.say: Say = lambda line: say(f"{task.step}: {line}")
        self.show = say
        self.clock, self.sleep, self.now = clock, sleep, now
        self.launcher = name or f"{os.uname().nodename[:40]}-{uuid.uuid4().hex[:8]}"
        self.attempts = Attempts(api, task.run, launcher=self.launcher, say=self.say)
        self.records = Records(task.records, task.step, task.run.identity, say=self.say, now=now)
        self.history: list[Ended] = []
        self.started = clock()
        self.exclude: tuple[str, ...] = ()
        self._view = view
        self._told: set[Event] = set()
        self._complaints: dict[str, str] = {}
        self._waiting_since: float | None = None
        self.answers = Answers(cluster.limits.storage_s, tell=self.say, clock=clock, sleep=sleep)
        self._heartbeats = Heartbeats(task.progress, clock=clock)
        self._look_before: Look | None = None

    def launch(self) -> None:
        """Returns when the step is done.

        Raises:
            ClusterError: it failed for good, or the cluster refuses its objects.
            StorageError: the API server or storage did not answer for longer than the limits allow.
        """
        self.started = self.clock()
        with tries.patience(CALL_S):
            if self._verified():
                self.say("done already, its result verifies")
                return
            if self.retried:
                refuse_given_up(self.answers.of(self.records.read), self.task.run.id, now=self.now())
            if self._view is None:
                self._view = self._mirror()
            try:
                self._launch()
            finally:
                self.view.close()

    def create(self) -> None:
        """Create the next attempt and leave it: nobody watches it, and the reaper lets it be. One that is under way is
        left as it is.

        Raises:
            ClusterError, StorageError: as launch().
        """
        with tries.patience(CALL_S):
            if self._verified():
                self.say("done already, its result verifies")
                return
            if self._view is None:
                self._view = self._mirror()
            try:
                self._create()
            finally:
                self.view.close()

    def _create(self) -> None:
        try:
            job, attempt = self._newest(adopt=False)
            if job is not None:
                self.say(f"{job['metadata']['name']} is under way already")
                return
            self._begun(self._created(attempt), attempt)
        except Exists as there:  # a launcher beside us was quicker, and watches it perhaps: it stays as it is
            self.say(f"{there} is under way already")

    def let_go(self) -> list[str]:
        """A person stops watching: the job goes on, and the reaper lets it be. Names of such jobs."""
        left = []
        for job in self.view.jobs() if self._view is not None else []:
            marks = job["metadata"].get("annotations", {})
            if marks.get(names.LAUNCHER) == self.launcher and not read(job, []).outcome:
                self.attempts.let_go(job)
                left.append(job["metadata"]["name"])
        return left

    @property
    def view(self) -> View:
        assert self._view is not None
        return self._view

    def _mirror(self) -> Mirror:
        label = {names.IDENTITY: self.task.run.identity, names.STEP: names.label(self.task.step)}
        ours = f"-{names.dns(self.task.step)}-{self.task.run.identity}-a"
        kind = kind_of(self._rendered(1).job)
        return Mirror(self.api, kind, label, lambda name: ours in name, clock=self.clock).ready()

    def _launch(self) -> None:
        job, attempt = self._newest()
        while True:
            if job is None:
                job = self._created(attempt)
            attempt = attempt_of(job)  # of a launcher that was quicker than we
            self._begun(job, attempt)
            trail = Trail(started=self.clock(), pulled={image for one in self.history for image in one.pulled})
            end = self._watch(job, attempt, trail)
            if end.decision == "done":
                if self.task.finished is None or self._verified():
                    self._recorded(attempt, end, closed=True)
                    self.say(f"done, attempt {attempt}")
                    return
                end = replace(end, cause="the job succeeded, but the stage has no verified result in storage")
            end = replace(self._leave(job, attempt, trail, end), pulled=tuple(sorted(trail.pulled)))
            if end.decision != "done" and self._handed_over():
                self._recorded(attempt, end, closed=True)
                self.say(f"done, attempt {attempt}: its result verifies, however the job ended")
                return
            self.history.append(end)
            action = decide.next_action(self.history, self.cluster.limits, self.clock() - self.started)
            self._recorded(attempt, end, closed=isinstance(action, Stop))
            if isinstance(action, Stop):
                raise action.error
            self._pause(attempt, action)
            job, attempt = None, attempt + 1

    def _pause(self, attempt: int, action: Again) -> None:
        self.exclude = action.exclude_nodes
        if self.exclude:
            self.say(f"without nodes {', '.join(self.exclude)}")
        if action.delay_s:
            self.say(f"attempt {attempt + 1} in {action.delay_s:.0f} s")
            self.sleep(action.delay_s)

    def _verified(self) -> bool:
        """The result in storage verifies. Storage that is down for a while must not cost a finished stage."""
        return self.task.finished is not None and self.answers.of(self.task.finished)

    def _recorded(self, attempt: int, end: Ended, *, closed: bool) -> None:
        """What became of the attempt is in storage. What ends the step counts more than its record.

        Raises:
            StorageError: storage was away for too long; the next attempt must not begin without it.
        """
        try:
            self.answers.of(lambda: self.records.end(attempt, end, closed=closed))
        except StorageError as error:
            if not closed:
                raise
            self.say(f"the record of attempt {attempt} was not stored: {error.what}")

    def _handed_over(self) -> bool:
        """Whether an attempt that ended badly had its result in storage before; no reason to wait for storage."""
        try:
            return self.task.finished is not None and self.task.finished()
        except StorageError:
            return False

    def _complain(self, about: str, text: str) -> None:
        """Once, however often it is found; an empty text means that it is over."""
        if text and text != self._complaints.get(about):
            self.say(text)
        self._complaints[about] = text

    # ------------------------------------------------------------ history

    def _newest(self, *, adopt: bool = True) -> tuple[Json | None, int]:
        """The job that is under way, adopted, and the attempt that it is; without one the attempt that comes next."""
        records = {one.attempt: one for one in self.answers.of(self.records.read)}
        jobs = {attempt_of(job): job for job in self.view.jobs()}
        counted = {one.attempt for one in series(list(records.values()))}
        first = min(counted, default=max(records, default=0) + 1)
        if counted:
            elapsed = self.now() - records[first].begun_s
            self.started = self.clock() - max(0.0, elapsed)  # a clock that went back gives us time, not less
        for attempt in sorted({*counted, *(number for number in jobs if number >= first)}):
            job, record = jobs.get(attempt), records.get(attempt)
            if job is not None and "deletionTimestamp" not in job["metadata"] and (record is None or not record.end):
                seen = read(job, pods_of(job, self.view.pods()))
                if seen.outcome is None or (seen.outcome == "succeeded" and self.task.finished is None):
                    rendered = self._rendered(attempt, excluded_by(job))
                    if self.retried:
                        refuse_suspended(job, do="resume it: qwenvl job watch")
                    if not adopt:
                        self.attempts.refuse_another(rendered, job)
                    return self.attempts.adopt(job, rendered) if adopt else job, attempt
            self.history.append(self._past(attempt, job, record))
        last = max([0, *records, *jobs])
        if self.history:
            action = decide.next_action(self.history, self.cluster.limits, self.clock() - self.started)
            if isinstance(action, Stop):
                self._recorded(max(counted | jobs.keys()), self.history[-1], closed=True)
                raise action.error
            self.exclude = action.exclude_nodes
        return None, last + 1

    def _past(self, attempt: int, job: Json | None, record: Record | None) -> Ended:
        """How an attempt of a launcher before us ended."""
        if record is not None and record.end is not None:
            return record.end
        if record is None and job is not None:
            self._begun(job, attempt)
        seen = read(job, pods_of(job, self.view.pods()) if job else [])
        ends = self.answers.of(lambda: self._ends(attempt))
        known = {one.name for one in seen.workers}
        gone = [Worker(name, "", None, "Gone", code=one.code, termination=one) for name, one in ends.items()]
        workers = decide.with_records([*seen.workers, *(one for one in gone if one.name not in known)], ends)
        message = seen.message or "removed, and nobody saw how it ended"
        end = decide.cause_of_end(workers, message, Progress(committed_step=self.answers.of(self.task.committed)))
        if seen.outcome is None and end.code in (UNKNOWN, Preempted.code):
            end = replace(end, decision="preempted")  # stopped on purpose by somebody: bounded, but no attempt
        self._recorded(attempt, end, closed=False)
        return end

    def _begun(self, job: Json, attempt: int) -> None:
        if self.records.knows(attempt):
            return
        about = {"job": job["metadata"]["name"], "uid": job["metadata"]["uid"], "run": self.task.run.id}
        with tries.patience(BEGIN_S):
            self.records.begin(attempt, **about, exclude_nodes=excluded_by(job))

    def _committed(self) -> int | None:
        try:
            return self.task.committed()
        except StorageError:
            return None

    def _ends(self, attempt: int) -> dict:
        return logs.stored_ends(self.task.stage_uri, attempt) if self.task.stage_uri else {}

    # ------------------------------------------------------------ create

    def _rendered(self, attempt: int, exclude: tuple[str, ...] | None = None) -> Rendered:
        exclude = self.exclude if exclude is None else exclude
        return self.task.render(replace(self.task.run, attempt=attempt, exclude_nodes=exclude))

    def _created(self, attempt: int) -> Json:
        """The next attempt, once the one before has left its nodes and a quota has room."""
        self._wait_for_old_pods()
        began = self.clock()
        while True:
            rendered = self._rendered(attempt)
            try:
                job = self.attempts.create(rendered)
            except QuotaExceeded as error:
                waited = self.clock() - began
                if never_fits(error, read(rendered.job, []).wanted) or waited > self.cluster.limits.queue_s:
                    raise
                self._complain("quota", f"queue: no room in the quota: {error.got}")
                self.sleep(QUOTA_S)
                continue
            self.view.note(kind_of(job), job)
            return job

    def _wait_for_old_pods(self) -> None:
        """Two attempts must never run at a time. A pod that outlives its grace is on a node that does not answer."""
        while running := [pod for pod in self.view.pods() if not _over(pod)]:
            for job in self.view.jobs():
                left = read(job, []).outcome is None and "deletionTimestamp" not in job["metadata"]
                if left and pods_of(job, running):
                    self.attempts.remove(job)
            if not self._patient(running):
                lost = sorted({node for pod in running if (node := pod["spec"].get("nodeName"))})
                self.exclude = tuple(dict.fromkeys([*self.exclude, *lost]))
                self.say(f"these pods outlive their grace, going on without {', '.join(lost)}")
                break
        self._waiting_since = None

    def _patient(self, running: list[Json]) -> bool:
        """Wait a little for pods to end; False when they had all the time there is."""
        if self._waiting_since is None:
            self._waiting_since = self.clock()
        self._complain("pods", f"waiting for {len(running)} pods of the attempt to end")
        self.view.wait(GONE_S)
        return self.clock() - self._waiting_since <= self.cluster.grace.termination_s + GONE_MARGIN_S

    # ------------------------------------------------------------ watch

    def _watch(self, job: Json, attempt: int, trail: Trail) -> Ended:
        """Until the attempt has ended. Every change of what it does is said once."""
        self.view.note(kind_of(job), job)  # as we took it over: what the watch knows may be older
        follower, said, renewed, pace = None, "", self.clock(), Pace()
        try:
            while True:
                current = self._current(job)
                seen = self._look(current)
                look = self._progress(attempt)
                if current is not None:
                    self.attempts.still_ours(current)
                state = decide.judge(seen, trail, look.progress, self.cluster.limits, self.clock(), heard_at=look.at)
                if isinstance(state, Ended):
                    return state
                if self.clock() - self.started > self.cluster.limits.deadline_s:
                    return self._overdue(trail)
                follower = self._followed(follower, job, seen, state)
                if (line := _line(state)) != said:
                    said = line
                    self.say(f"{state.kind}: {state.reason}")
                if look.progress is not None and (text := pace.line(look.progress, self.clock())):
                    self.say(text)
                self._wait(state)
                if self.clock() - renewed > RENEW_S and self._renewed(job):
                    renewed = self.clock()
        finally:
            if follower is not None:
                follower.stop()

    def _current(self, job: Json) -> Json | None:
        """The job as it is now; that it is gone is asked for once more, since a deletion cannot be taken back."""
        uid = job["metadata"]["uid"]
        for one in self.view.jobs():
            if one["metadata"]["uid"] == uid:
                return one
        found = self.api.get(kind_of(job), job["metadata"]["name"])
        return found if found is not None and found["metadata"]["uid"] == uid else None

    def _look(self, current: Json | None) -> Seen:
        events = self.view.events()
        for event in events:
            if (known := replace(event, version=0)) not in self._told:
                self._told.add(known)
                self.say(f"event: {event}")
        return read(current, pods_of(current, self.view.pods()) if current else [], events)

    def _renewed(self, job: Json) -> bool:
        """Tell the reaper that somebody watches."""
        if self.view.silent_since() is not None:
            return False
        try:
            fresh = self.attempts.renew(job)
        except Unreachable:
            return False
        if fresh is not None:
            self.view.note(kind_of(job), fresh)
        return True

    def _progress(self, attempt: int) -> Look:
        """Without progress while storage does not answer."""
        look = self._heartbeats.newest(attempt)
        if look.trouble:
            self._complain("slow looks" if look.late else "heartbeats", look.trouble)
        elif look.progress is not None and look is not self._look_before:
            self._complain("heartbeats", "")
            with tries.patience(WAIT_S):
                self.records.catch_up()
        self._look_before = look
        return look

    def _wait(self, state: Wait) -> None:
        """For a change, or for the next heartbeat. Without the API server the job goes on, and so do we, for a time."""
        self.view.wait(1.0 if state.kind == "end" else LOOK_S)
        since = self.view.silent_since()
        if since is None:
            self._complain("server", "")
            return
        silent, limit = self.clock() - since, self.cluster.limits.server_s
        self._complain("server", "the API server does not answer; the job goes on, waiting for it")
        if silent > limit:
            got = f"{silent:.0f} s without an answer (limits.server_s {limit})"
            raise Unreachable("the API server did not answer", where=self.task.step, got=got)

    def _overdue(self, trail: Trail) -> Ended:
        cause = f"not finished within limits.deadline_s {self.cluster.limits.deadline_s}"
        at = trail.progress
        return Ended("permanent", ClusterError.code, cause, at.step, at.committed_step, settled=True)

    def _followed(self, follower: Follower | None, job: Json, seen: Seen, state: Wait) -> Follower | None:
        """Rank 0's log of the pod that runs now; a pod that came back after a suspension is another one."""
        if not self.follow or not seen.workers or state.kind == "end":
            return follower
        container = container_of(job)
        first = next((one for one in seen.workers if one.container == container), None)
        if first is None:
            return follower
        if follower is not None and (state.kind != "run" or follower.uid != first.uid):
            follower.stop()
            follower = None
        if follower is None and state.kind == "run":
            follower = Follower(self.api, first.name, container, self.show, uid=first.uid).start()
        return follower

    # ------------------------------------------------------------ the end of an attempt

    def _leave(self, job: Json, attempt: int, trail: Trail, end: Ended) -> Ended:
        """Free its nodes; tell what all ranks said. The decision may still grow worse by what the last pods say."""
        self.say(f"attempt {attempt} ended: {end.cause.splitlines()[0]}")
        current = self._current(job)
        # Given up while its pods run: it holds GPUs. One that failed stays to be read.
        if current is not None and read(current, []).outcome is None and self.attempts.remove(current):
            self.say(f"removed {job['metadata']['name']}")
        if not end.settled and end.decision not in ("done", "permanent"):
            end = self._last_words(job, attempt, trail, end)
        # What is permanent stays so; another attempt must know what was committed.
        ask = self._committed if end.decision == "permanent" else lambda: self.answers.of(self.task.committed)
        if (committed := ask()) is not None:
            end = replace(end, committed_step=committed)
        if self.task.stage_uri:  # also when the job succeeded: without a result its ranks say why
            logs.tell_last_lines(self.task.stage_uri, attempt, self.show)
        return end

    def _last_words(self, job: Json, attempt: int, trail: Trail, end: Ended) -> Ended:
        """The decision once every pod of the attempt has ended or gone."""
        while True:
            pods = pods_of(job, self.view.pods())
            for worker in read(job, pods).workers:
                if trail.workers.get(worker.name, worker).uid == worker.uid:
                    trail.workers[worker.name] = worker
            running = [pod for pod in pods if not _over(pod)]
            if not running or not self._patient(running):
                break
        ends = self.answers.of(lambda: self._ends(attempt))
        workers = decide.with_records(trail.workers.values(), ends)
        after = decide.cause_of_end(workers, "", Progress(step=end.step, committed_step=end.committed_step))
        if (after.decision, after.code) == (end.decision, end.code) or after.code == UNKNOWN:
            return end
        self.say(f"attempt {attempt} after its last pod ended: {after.cause.splitlines()[0]}")
        return after


def _over(pod: Json) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _line(state: Wait) -> str:
    """Steps pass by in the log; phases and reasons are worth a line."""
    return f"{state.kind} {state.reason.partition(', step ')[0]}"
