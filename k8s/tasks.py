"""A step of the pipeline as the launcher's loop sees it: what to render, what shows that it is done, what moves.

task_of("train", recipe, cluster, run, stage="sft")    a Task; init, generate, export, evaluate, prepare-... likewise
named("prepare-sft", recipe)                           ("prepare-stage", "sft"): steps by the names that jobs have
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

from k8s import job, pytorchjob, rayjob, trainjob
from k8s.cluster import Cluster
from k8s.decide import NodeBeat, Progress
from k8s.names import Run
from k8s.pods import RECIPE_FILE
from k8s.pytorchjob import Rendered, stage_of
from k8s.record import FOLDER
from trainer import handover, heartbeat, storage
from trainer import manifest as manifests
from trainer.command import PREPARE, PROGRAMS, PrepareCall, prepare_command
from trainer.errors import CheckpointError, StageMismatch, StorageError, UsageError
from trainer.recipe import Recipe
from trainer.resolve import digest, fields, stage_fields

IDENTITY_FILE = "launch.json"
ON_RAY = ("prepare-data", "prepare-stage")
"""Steps whose rows are worth several nodes; what they do with prepare.engine ray is a RayJob where the cluster has
`ray`."""


@dataclass(frozen=True)
class Task:
    """One step.

    Args:
        render: the objects of one attempt.
        finished: whether the result in storage verifies; None where the job's own success is all there is.
        progress: what the heartbeats in storage show of an attempt.
        committed: the newest committed step in storage.
        stage_uri: where attempts leave their ends and last lines; None for programs, which leave none.
        records: folder of k8s/record.py; None keeps them in this process only.
    """

    step: str
    run: Run
    render: Callable[[Run], Rendered]
    finished: Callable[[], bool] | None
    progress: Callable[[int], Progress]
    committed: Callable[[], int | None] = lambda: None
    stage_uri: str | None = None
    records: str | None = None


def task_of(what: str, recipe: Recipe, cluster: Cluster, run: Run, *, stage: str | None = None) -> Task:
    """Which objects a step creates, and what shows that it is done.

    Args:
        what: train, init, generate, export, evaluate; prepare-data, prepare-stage, requests, select.
    """
    if what == "train":
        assert stage is not None
        return _training(recipe, stage, cluster, run)
    if what not in PROGRAMS and what not in PREPARE:
        raise UsageError("no such step", where=what, expected=", ".join(["train", *PROGRAMS, *PREPARE]))
    run = _of_recipe(run, recipe)
    step = step_name(what, stage)
    finished: Callable[[], bool] | None = None
    if what in PROGRAMS:
        render: Callable[[Run], Rendered] = lambda one: _trainer(cluster).render_program(  # noqa: E731
            recipe, what, cluster, one, stage=stage
        )
        if what == "init":
            finished = lambda: handover.finished(recipe, handover.INIT, run.out) is not None  # noqa: E731
    else:
        command = prepare_command(PrepareCall(what, recipe=RECIPE_FILE, out=run.out, stage=stage))
        on_ray = what in ON_RAY and recipe.prepare.engine == "ray" and cluster.ray is not None
        prepare = rayjob.render_prepare if on_ray else job.render_prepare
        render = lambda one: prepare(recipe, step, cluster, one, command)  # noqa: E731
    records = storage.join(run.out, FOLDER)
    return Task(step, run, render, finished, lambda _: Progress(watched=False), records=records)


def _trainer(cluster: Cluster) -> ModuleType:
    """The renderer of what the trainer image runs."""
    return trainjob if cluster.job_kind == "TrainJob" else pytorchjob


def step_name(what: str, stage: str | None) -> str:
    """As jobs and labels have it: train sft -> sft, prepare-stage sft -> prepare-sft, generate sft -> generate-sft."""
    if stage is None:
        return what
    return stage if what == "train" else f"{what.removesuffix('-stage')}-{stage}"


def named(step: str, recipe: Recipe) -> tuple[str, str | None]:
    """(what, stage) of a step's name.

    Raises:
        UsageError: the recipe has no such step.
    """
    known: dict[str, tuple[str, str | None]] = {name: (name, None) for name in ("prepare-data", "init")}
    for name in recipe.stages.named():
        for what in ("prepare-stage", "requests", "generate", "select", "train"):
            known[step_name(what, name)] = what, name
    known |= {name: (name, None) for name in ("export", "evaluate")}
    if step not in known:
        raise UsageError("the recipe has no such step", where=step, expected=", ".join(known))
    return known[step]


def rendered(
    what: str, recipe: Recipe, cluster: Cluster, run: Run, *, stage: str | None = None
) -> tuple[Rendered, str]:
    """(the objects that a step would create, what is not known yet about their names); nothing is written.

    The name of a stage's job has a digest of what the stage starts from: before its parent is done, or where storage
    cannot be read, it stands for a stage without parent.
    """
    if what != "train":
        return task_of(what, recipe, cluster, run, stage=stage).render(_of_recipe(run, recipe)), ""
    assert stage is not None
    unknown, digest_of_stage = "", ""
    try:
        uri = storage.join(run.out, stage, IDENTITY_FILE)
        known = storage.exists(uri)
        digest_of_stage = storage.read_json(uri)["stage_digest"] if known else _asked(recipe, stage, run.out)
    except (FileNotFoundError, StorageError) as error:
        digest_of_stage = _asked(recipe, stage, None)
        unknown = f"the name's digest is not the one that a run will have: {error}".splitlines()[0]
    return _trainer(cluster).render_stage(recipe, stage, cluster, replace(run, stage_digest=digest_of_stage)), unknown


def _of_recipe(run: Run, recipe: Recipe) -> Run:
    return replace(run, stage_digest=digest(fields(recipe, "result")))


def _asked(recipe: Recipe, stage: str, out: str | None) -> str:
    """The stage's digest at its first step: its own fields, and the result of its parent in `out`."""
    parent = handover.parent_of(recipe, stage) if out is not None else None
    before = handover.result_digest(handover.read(out, parent)) if parent and out is not None else ""
    return digest({"fields": stage_fields(recipe, stage_of(recipe, stage)), "parent": before})


def _training(recipe: Recipe, stage: str, cluster: Cluster, run: Run) -> Task:
    run = replace(run, stage_digest=first_digest(run.out, stage, _asked(recipe, stage, run.out)))
    stage_uri = storage.join(run.out, stage)
    old: set[str] = set()
    return Task(
        stage,
        run,
        lambda one: _trainer(cluster).render_stage(recipe, stage, cluster, one),
        lambda: handover.finished(recipe, stage, run.out, accept=run.accept_changes) is not None,
        lambda attempt: progress_of(stage_uri, attempt, old),
        committed=lambda: committed_of(stage_uri),
        stage_uri=stage_uri,
        records=storage.join(run.out, FOLDER),
    )


def first_digest(out: str, step: str, asked: str) -> str:
    """The stage's digest at its first step: an accepted change must not make a running job unfindable."""
    uri = storage.join(out, step, IDENTITY_FILE)
    try:
        storage.create_once(uri, json.dumps({"format": 1, "stage_digest": asked}).encode())
        return asked
    except FileExistsError:
        return storage.read_json(uri)["stage_digest"]


def progress_of(stage_uri: str, attempt: int, old: set[str] | None = None) -> Progress:
    """The heartbeats of this attempt: of every node, and of the slowest.

    Args:
        old: names of pods of attempts before, kept from look to look: theirs are not read again. A pod's name has its
            attempt's number, so none comes back.
    """
    old = set() if old is None else old
    beats = heartbeat.read_heartbeats(stage_uri, without=old)
    old |= {node for node, beat in beats.items() if beat.attempt < attempt}
    beats = {node: beat for node, beat in beats.items() if beat.attempt == attempt}
    slowest = min(beats.values(), key=lambda beat: beat.step, default=None)
    committed = [beat.committed_step for beat in beats.values() if beat.committed_step is not None]
    return Progress(
        sequence=sum(beat.sequence for beat in beats.values()),
        step=slowest.step if slowest else 0,
        phase=slowest.phase if slowest else "",
        limit_s=max((beat.phase_limit_s for beat in beats.values()), default=None),
        committed_step=max(committed, default=None),
        figures=next((beat.figures for beat in beats.values() if beat.figures), None),
        nodes=tuple((node, _node(beat)) for node, beat in sorted(beats.items())),
    )


def _node(beat: heartbeat.Heartbeat) -> NodeBeat:
    return NodeBeat(beat.sequence, beat.beats, beat.step, beat.phase, beat.phase_limit_s)


def committed_of(stage_uri: str) -> int | None:
    """Step of the newest commit. A damaged one is told by the trainer, which knows what to do about it."""
    try:
        newest = manifests.newest(stage_uri)
    except (CheckpointError, StageMismatch):
        return None
    return newest.step if newest else None
