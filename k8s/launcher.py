"""A step of the pipeline on a cluster: create or adopt its job, watch it, try again where it helps, verify the result.

    run_step("train", cluster="onprem", out="s3://...", stage="sft")     returns when the step is done, or raises
    clean_up("onprem", out="s3://...", run_id=...)                        removes what a run still owns

In the order things happen:
    1  a stage whose result in storage verifies is done: nothing is created
    2  the newest job of this (output, stage) that has not ended is adopted: its spec is compared field by field, and
       this run becomes its owner (with resourceVersion: of two launchers one wins, the other sees it)
    3  else the next attempt is created: dry-run of the job and of a pod from its template first, both Strict
    4  the job is watched: k8s/decide.py says what its state means
    5  success is what the StageResult in storage says, not what the job says

Everything that can be decided without a cluster is in k8s/decide.py. This file never imports torch or mlflow.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from k8s import decide, names
from k8s.client import PODS, Api, Conflict, Exists, Json, connect, kind_of
from k8s.cluster import Cluster, example_images, load_cluster
from k8s.decide import Again, Ended, Progress, Stop, Trail, Wait
from k8s.job import render_prepare
from k8s.logs import Follower
from k8s.names import Run
from k8s.pods import RECIPE_FILE
from k8s.pytorchjob import Rendered, differences, render_program, render_stage, stage_of
from trainer import handover, heartbeat, storage
from trainer import manifest as manifests
from trainer.command import PARENT_RUN, PREPARE, PROGRAMS, PrepareCall, prepare_command
from trainer.errors import ClusterError, UsageError
from trainer.recipe import Recipe
from trainer.resolve import digest, fields, from_resolved, stage_fields

POLL_RUN_S, POLL_WAIT_S = 15.0, 5.0
RUN_ID = "QWENVL_RUN_ID"
IDENTITY_FILE = "launch.json"
DONE_BY_JOB = "succeeded"


@dataclass(frozen=True)
class Task:
    """One step, as the loop sees it.

    Args:
        render: the objects of one attempt.
        finished: whether the result in storage verifies; None where the job's own success is all there is.
        progress: what the heartbeats and commits in storage show of the current attempt.
    """

    step: str
    run: Run
    render: Callable[[Run], Rendered]
    finished: Callable[[], bool] | None
    progress: Callable[[int], Progress]


# ---------------------------------------------------------------- entry points


def run_step(
    what: str,
    *,
    cluster: str,
    out: str,
    stage: str | None = None,
    accept_changes: Iterable[str] = (),
    run_id: str | None = None,
    parent_run: str | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Do a step on a cluster and wait for it; done already is fine.

    Args:
        what: train, init, generate, export, evaluate; prepare-data, prepare-stage, requests, select.
        cluster: shipped example, path, URI or YAML of the cluster file.
        out: the run's output, where OUT/recipe.json has been settled.
        run_id: who owns what is created; default: QWENVL_RUN_ID, else a name made from `out`.

    Raises:
        ClusterError: with the cause's own exit code, when the step failed for good.
    """
    offered = load_cluster(cluster)
    if examples := example_images(offered):
        raise ClusterError(
            "the cluster file still has the example's images",
            where=f"cluster {offered.name}: {', '.join(f'images.{name}' for name in examples)}",
            do="build the images (images/README.md) and give their digests",
        )
    if storage.local_path(out) is not None:
        raise UsageError(
            "an output on a cluster is an object store's address", where=f"--out {out}", expected="s3://..."
        )
    uri = storage.join(out, "recipe.json")
    recipe = from_resolved(storage.read_json(uri), where=uri)
    run = Run(
        out=out,
        id=run_id or default_run_id(out),
        accept_changes=tuple(accept_changes),
        parent_run=parent_run or os.environ.get(PARENT_RUN),
    )
    task = task_of(what, recipe, offered, run, stage=stage)
    Launcher(connect(offered.namespace), offered, task, say=say or (lambda line: print(line, flush=True))).launch()


def clean_up(cluster: str, *, out: str, run_id: str) -> None:
    """Remove the jobs into `out` that `run_id` still owns and that have not ended; what another run took over stays."""
    offered = load_cluster(cluster)
    removed = remove_owned(connect(offered.namespace), out=out, owners={run_id, default_run_id(out)})
    print(f"clean-up: {', '.join(removed) if removed else 'nothing of this run was left'}", flush=True)


def default_run_id(out: str) -> str:
    return os.environ.get(RUN_ID) or f"out-{digest(out.rstrip('/'))[:8]}"


def remove_owned(api: Api, *, out: str, owners: set[str]) -> list[str]:
    """Names of the jobs that were deleted."""
    removed = []
    for kind in decide_kinds():
        for job in api.list(kind, {"app.kubernetes.io/managed-by": f"{names.PREFIX}-launcher"}):
            marks = job["metadata"].get("annotations", {})
            ours = marks.get(names.OWNER) in owners and marks.get(names.OUT, "").rstrip("/") == out.rstrip("/")
            if (
                ours
                and decide.read(job, []).outcome is None
                and api.delete(kind, job["metadata"]["name"], uid=job["metadata"]["uid"])
            ):
                removed.append(job["metadata"]["name"])
    return removed


def decide_kinds() -> tuple:
    return kind_of({"kind": "PyTorchJob"}), kind_of({"kind": "Job"})


# ---------------------------------------------------------------- the step as a task


def task_of(what: str, recipe: Recipe, cluster: Cluster, run: Run, *, stage: str | None = None) -> Task:
    """Which objects a step creates, and what shows that it is done."""
    if what == "train":
        assert stage is not None
        return _training(recipe, stage, cluster, run)
    if what in PROGRAMS:
        step = f"{what}-{stage}" if stage else what
        run = replace(run, stage_digest=_recipe_digest(recipe))
        finished = (lambda: handover.finished(recipe, handover.INIT, run.out) is not None) if what == "init" else None
        return Task(
            step,
            run,
            lambda one: render_program(recipe, what, cluster, one, stage=stage),
            finished,
            lambda _: Progress(watched=False),
        )
    if what in PREPARE:
        command = prepare_command(PrepareCall(what, recipe=RECIPE_FILE, out=run.out, stage=stage))
        step = what if stage is None else f"{what.removesuffix('-stage')}-{stage}"
        run = replace(run, stage_digest=_recipe_digest(recipe))
        return Task(
            step,
            run,
            lambda one: render_prepare(recipe, step, cluster, one, command),
            None,
            lambda _: Progress(watched=False),
        )
    raise UsageError("no such step", where=what, expected=", ".join(["train", *PROGRAMS, *PREPARE]))


def _training(recipe: Recipe, stage: str, cluster: Cluster, run: Run) -> Task:
    asked = digest(
        {"fields": stage_fields(recipe, stage_of(recipe, stage)), "parent": _parent_digest(recipe, stage, run.out)}
    )
    run = replace(run, stage_digest=first_digest(run.out, stage, asked))
    stage_uri = storage.join(run.out, stage)

    def finished() -> bool:
        return handover.finished(recipe, stage, run.out, accept=run.accept_changes) is not None

    return Task(
        stage,
        run,
        lambda one: render_stage(recipe, stage, cluster, one),
        finished,
        lambda attempt: progress_of(stage_uri, attempt),
    )


def _recipe_digest(recipe: Recipe) -> str:
    return digest(fields(recipe, "result", unsaid=False))


def _parent_digest(recipe: Recipe, stage: str, out: str) -> str:
    parent = handover.parent_of(recipe, stage)
    return handover.result_digest(handover.read(out, parent)) if parent else ""


def first_digest(out: str, step: str, asked: str) -> str:
    """The stage's digest at its first step: an accepted change must not make a running job unfindable."""
    uri = storage.join(out, step, IDENTITY_FILE)
    try:
        storage.create_once(uri, json.dumps({"format": 1, "stage_digest": asked}).encode())
        return asked
    except FileExistsError:
        return storage.read_json(uri)["stage_digest"]


def progress_of(stage_uri: str, attempt: int) -> Progress:
    """The slowest node's heartbeat of this attempt, and the newest commit of all."""
    beats = [beat for beat in heartbeat.read_heartbeats(stage_uri).values() if beat.attempt == attempt]
    committed = manifests.newest(stage_uri)
    slowest = min(beats, key=lambda beat: beat.step, default=None)
    return Progress(
        sequence=sum(beat.sequence for beat in beats),
        step=slowest.step if slowest else 0,
        phase=slowest.phase if slowest else "",
        limit_s=max((beat.phase_limit_s for beat in beats), default=None),
        committed_step=committed.step if committed else None,
    )


# ---------------------------------------------------------------- the loop


class Launcher:
    """Attempts of one step, until it is done or cannot be."""

    def __init__(
        self,
        api: Api,
        cluster: Cluster,
        task: Task,
        *,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        follow: bool = True,
    ):
        self.api, self.cluster, self.task = api, cluster, task
        self.say, self.clock, self.sleep, self.follow = say, clock, sleep, follow
        self.history: list[Ended] = []
        self.started = clock()
        self.exclude: tuple[str, ...] = ()

    def launch(self) -> None:
        """Returns when the step is done.

        Raises:
            ClusterError: it failed for good, or the cluster refuses its objects.
        """
        self.started = self.clock()
        if self._finished():
            self.say(f"{self.task.step}: done already, its result verifies")
            return
        job, attempt = self._newest()
        while True:
            if job is None:
                job = self._create(self._rendered(attempt))
            ended = self._watch(job, attempt)
            if ended.decision == "done" and (self.task.finished is None or self._finished()):
                self.say(f"{self.task.step}: done, attempt {attempt}")
                return
            if ended.decision == "done":
                ended = replace(ended, cause="the job succeeded, but the stage has no verified result in storage")
            self.history.append(ended)
            action = decide.next_action(self.history, self.cluster.limits, self.clock() - self.started)
            self._leave(job, ended)
            if isinstance(action, Stop):
                raise action.error
            self._pause(attempt, action)
            job, attempt = None, attempt + 1

    def _finished(self) -> bool:
        return self.task.finished is not None and self.task.finished()

    def _pause(self, attempt: int, action: Again) -> None:
        self.say(f"{self.task.step}: attempt {attempt} ended: {action.reason}")
        self.exclude = action.exclude_nodes
        if self.exclude:
            self.say(f"{self.task.step}: without nodes {', '.join(self.exclude)}")
        if action.delay_s:
            self.say(f"{self.task.step}: attempt {attempt + 1} in {action.delay_s:.0f} s")
            self.sleep(action.delay_s)

    # ------------------------------------------------------------ create or adopt

    def _rendered(self, attempt: int, exclude: tuple[str, ...] | None = None) -> Rendered:
        return self.task.render(
            replace(self.task.run, attempt=attempt, exclude_nodes=self.exclude if exclude is None else exclude)
        )

    def _newest(self) -> tuple[Json | None, int]:
        """The job to adopt, if one is under way, and the attempt that it is or that comes next.

        Jobs of this step that have ended and are still there count as attempts: a launcher that was lost knows no other
        history.
        """
        kind = kind_of(self._rendered(1).job)
        label = {names.IDENTITY: self.task.run.identity, names.STEP: names.label(self.task.step)}
        jobs = sorted(self.api.list(kind, label), key=lambda job: int(job["metadata"]["labels"][names.ATTEMPT]))
        attempt = 0
        for job in jobs:
            attempt = int(job["metadata"]["labels"][names.ATTEMPT])
            pods = self._pods(job)
            seen = decide.read(job, pods)
            if seen.outcome is None and "deletionTimestamp" not in job["metadata"]:
                return self._adopt(job, attempt), attempt
            if seen.outcome == "failed":
                self.history.append(decide.cause_of_end(seen.workers, seen.message, self.task.progress(attempt)))
        return None, attempt + 1

    def _adopt(self, job: Json, attempt: int) -> Json:
        """Take over a job that is under way, if it is the one that we would create."""
        name, metadata = job["metadata"]["name"], job["metadata"]
        marks = metadata.get("annotations", {})
        excluded = tuple(filter(None, marks.get(names.EXCLUDED, "").split(",")))
        wanted = self._rendered(attempt, excluded).job
        if marks.get(names.SPEC) != wanted["metadata"]["annotations"][names.SPEC] and (
            lines := differences(wanted, job)
        ):
            raise ClusterError(
                "a job of this name is under way, and it is another one",
                where=f"{job['kind']} {metadata.get('namespace')}/{name}",
                got="\n".join(lines[:20]),
                do="wait for it, stop it, or ask for what it does; the next attempt may differ in image and nodes",
            )
        if marks.get(names.OWNER) != self.task.run.id:
            change = {
                "metadata": {
                    "resourceVersion": metadata["resourceVersion"],
                    "annotations": {names.OWNER: self.task.run.id},
                }
            }
            if self.task.run.owner is not None:
                change["metadata"]["ownerReferences"] = [self.task.run.owner.reference()]
            try:
                job = self.api.patch(kind_of(job), name, change)
            except Conflict:
                again = self.api.get(kind_of(job), name)
                if again is None:
                    raise ClusterError("the job to adopt is gone", where=name, do="run again") from None
                return self._adopt(again, attempt)
        self.say(f"{self.task.step}: adopted {name}")
        return job

    def _create(self, rendered: Rendered) -> Json:
        """Everything that the server can refuse is asked before anything is created."""
        self._dry_run(rendered)
        with contextlib.suppress(Exists):  # its digest is in its name
            self.api.create(rendered.config_map)
        try:
            job = self.api.create(rendered.job)
        except Exists:  # a launcher beside us was quicker, or our own request was answered into the void
            found = self.api.get(kind_of(rendered.job), rendered.name)
            if found is None:
                raise ClusterError(
                    "the job vanished while it was created", where=rendered.name, do="run again"
                ) from None
            return self._adopt(found, int(found["metadata"]["labels"][names.ATTEMPT]))
        self._own(rendered.config_map, job)
        self.say(f"{self.task.step}: created {rendered.name}")
        return job

    def _dry_run(self, rendered: Rendered) -> None:
        job = rendered.job
        spec = job["spec"]
        template = (
            spec["pytorchReplicaSpecs"]["Worker"]["template"] if "pytorchReplicaSpecs" in spec else spec["template"]
        )
        namespace = job["metadata"]["namespace"]
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {**template["metadata"], "name": f"{rendered.name}-worker-0", "namespace": namespace}
        for body in (job, pod):
            with contextlib.suppress(Exists):  # decided in _create
                self.api.create(body, dry_run=True)

    def _own(self, config_map: Json, job: Json) -> None:
        """The job becomes an owner of the ConfigMap, which goes when its last job goes."""
        name = config_map["metadata"]["name"]
        reference = {key: job[key] for key in ("apiVersion", "kind")} | {
            key: job["metadata"][key] for key in ("name", "uid")
        }
        for _ in range(5):
            found = self.api.get(kind_of(config_map), name)
            if found is None:
                return
            owners = [one for one in found["metadata"].get("ownerReferences", []) if one["uid"] != reference["uid"]]
            change = {
                "metadata": {
                    "resourceVersion": found["metadata"]["resourceVersion"],
                    "ownerReferences": [*owners, reference],
                }
            }
            try:
                self.api.patch(kind_of(config_map), name, change)
                return
            except Conflict:
                continue

    # ------------------------------------------------------------ watch

    def _watch(self, job: Json, attempt: int) -> Ended:
        """Until the attempt has ended. Every change of what it does is said once."""
        kind, name = kind_of(job), job["metadata"]["name"]
        trail = Trail(started=self.clock())
        follower, said = None, ""
        try:
            while True:
                current = self.api.get(kind, name)
                seen = decide.read(current, self._pods(current) if current else [])
                state = decide.judge(seen, trail, self.task.progress(attempt), self.cluster.limits, self.clock())
                if isinstance(state, Ended):
                    return state
                assert current is not None
                self._still_ours(current)
                if self.clock() - self.started > self.cluster.limits.deadline_s:
                    cause = f"not finished within limits.deadline_s {self.cluster.limits.deadline_s}"
                    return Ended(
                        "permanent", ClusterError.code, cause, trail.progress.step, trail.progress.committed_step
                    )
                if self.follow and follower is None and state.kind == "run":
                    follower = Follower(self.api, seen.workers[0].name, self._container(job), self.say).start()
                if (line := _line(state)) != said:
                    said = line
                    self.say(f"{self.task.step}: {state.kind}: {state.reason}")
                self.sleep(POLL_RUN_S if state.kind == "run" else POLL_WAIT_S)
        finally:
            if follower is not None:
                follower.stop()

    def _still_ours(self, job: Json) -> None:
        """Of two launchers for one job, the one that took it over goes on."""
        owner = job["metadata"].get("annotations", {}).get(names.OWNER)
        if owner != self.task.run.id:
            raise ClusterError(
                "another run took the job over",
                where=job["metadata"]["name"],
                got=f"owner {owner}",
                expected=f"owner {self.task.run.id}",
                do="follow that run; running this one again takes the job back",
            )

    def _pods(self, job: Json) -> list[Json]:
        """The pods of this very job: one that was deleted and made again under its name has others."""
        marks = {key: job["metadata"]["labels"][key] for key in (names.IDENTITY, names.STEP, names.ATTEMPT)}
        uid = job["metadata"]["uid"]
        pods = self.api.list(PODS, marks)
        return [pod for pod in pods if any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences", []))]

    @staticmethod
    def _container(job: Json) -> str:
        spec = job["spec"]
        template = (
            spec["pytorchReplicaSpecs"]["Worker"]["template"] if "pytorchReplicaSpecs" in spec else spec["template"]
        )
        return template["spec"]["containers"][0]["name"]

    def _leave(self, job: Json, ended: Ended) -> None:
        """An attempt that we gave up while its pods run holds GPUs: delete it. One that failed stays to be read."""
        current = self.api.get(kind_of(job), job["metadata"]["name"])
        if current is not None and decide.read(current, []).outcome is None:
            self.api.delete(kind_of(job), job["metadata"]["name"], uid=job["metadata"]["uid"])
            self.say(f"{self.task.step}: removed {job['metadata']['name']}: {ended.cause.splitlines()[0]}")


def _line(state: Wait) -> str:
    """Steps pass by in the log; phases and reasons are worth a line."""
    return f"{state.kind} {state.reason.partition(', step ')[0]}"
