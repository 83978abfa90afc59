"""A step of the pipeline on a cluster: the entry points.

    run_step(StepCall("train", cluster="onprem", out="s3://...", stage="sft"))    returns when it is done, or raises

The loop itself is k8s/loop.py, removing what a run still owns is k8s/cleanup.py. Nothing here imports torch or mlflow.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from k8s import names
from k8s.asking import CALL_S, Answers
from k8s.cleanup import default_run_id
from k8s.client import connect
from k8s.cluster import Cluster, example_images, load_cluster
from k8s.loop import Launcher
from k8s.names import Run
from k8s.tasks import Task, task_of
from trainer import storage, tries
from trainer.command import PARENT_RUN
from trainer.errors import ClusterError, Preempted, UsageError
from trainer.resolve import from_resolved

OWNER = "QWENVL_OWNER"
"""API_VERSION,KIND,NAME,UID of an object whose deletion deletes what a launcher creates: a pipeline's Workflow."""

FILE_S = 60.0
"""For a cluster file that is an object: how long storage may be away is written in it."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class StepCall:
    """Which step, where.

    Args:
        what: train, init, generate, export, evaluate; prepare-data, prepare-stage, requests, select.
        cluster: shipped example, path, URI or YAML of the cluster file.
        out: the run's output, where OUT/recipe.json has been settled.
        run_id: who owns what is created; default: QWENVL_RUN_ID, else a name made from `out`.
    """

    what: str
    cluster: str
    out: str
    stage: str | None = None
    accept_changes: Iterable[str] = ()
    run_id: str | None = None
    parent_run: str | None = None


def run_step(call: StepCall, *, say: Say | None = None) -> None:
    """Do a step on a cluster and wait for it; done already is fine.

    Raises:
        ClusterError: with the cause's own exit code, when the step failed for good.
    """
    say = say or (lambda line: print(line, flush=True))
    offered, task = prepared(call, say=say)
    with word_at_sigterm(task.step):
        Launcher(connect(offered.namespace), offered, task, say=say, retried=True).launch()


@contextmanager
def word_at_sigterm(step: str) -> Iterator[None]:
    """An evicted launcher must not take days of training with it: the job goes on, and that is said. A run that was
    stopped is cleaned up by its exit task, `qwenvl job stop` or the reaper."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        text = f"{step}: the launcher was stopped; its job goes on. Run again to follow it, or stop it: qwenvl job stop"
        os.write(1, f"{text}\n".encode())  # print() may have been interrupted in the middle
        raise SystemExit(Preempted.code)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def prepared(call: StepCall, *, say: Say) -> tuple[Cluster, Task]:
    """The cluster file and the step, both checked.

    Raises:
        StorageError: the file cannot be read within FILE_S, or the output not within the file's limits.storage_s.
    """
    with tries.patience(FILE_S):
        offered = load_cluster(call.cluster)
    if examples := example_images(offered):
        raise ClusterError(
            "the cluster file still has the example's images",
            where=f"cluster {offered.name}: {', '.join(f'images.{name}' for name in examples)}",
            do="build the images (images/README.md) and give their digests",
        )
    if storage.local_path(call.out) is not None:
        raise UsageError(
            "an output on a cluster is an object store's address", where=f"--out {call.out}", expected="s3://..."
        )
    answers = Answers(offered.limits.storage_s, tell=say, clock=time.monotonic, sleep=time.sleep)
    with tries.patience(CALL_S):
        return offered, answers.of(lambda: _task(call, offered))


def _task(call: StepCall, offered: Cluster) -> Task:
    uri = storage.join(call.out, "recipe.json")
    recipe = from_resolved(storage.read_json(uri), where=uri)
    run = Run(
        out=call.out,
        id=call.run_id or default_run_id(call.out),
        accept_changes=tuple(call.accept_changes),
        parent_run=call.parent_run or os.environ.get(PARENT_RUN),
        owner=names.owner_of(os.environ[OWNER]) if os.environ.get(OWNER) else None,
    )
    return task_of(call.what, recipe, offered, run, stage=call.stage)
