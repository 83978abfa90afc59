"""Names, labels and annotations of what we create.

A name says recipe, stage, what is trained where, and which attempt:

    qwen2-5-vl-7b-stage2-1f3a9c04-a1
    recipe        step   identity attempt

The identity is a short hash of (output URI, the stage's digest at its first step): two runs into one output mean the
same work and find each other's job; the id of a pipeline run is not part of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.errors import UsageError
from trainer.resolve import digest

PREFIX = "qwenvl-train"
MAX_NAME = 63
WORKER_SUFFIX = len("-worker-123")  # pods and Services of a PyTorchJob are named NAME-worker-INDEX
MAX_JOB_NAME = MAX_NAME - WORKER_SUFFIX

# labels
RECIPE, STEP, RUN, ATTEMPT, IDENTITY = (f"{PREFIX}/{key}" for key in ("recipe", "step", "run", "attempt", "identity"))
# annotations
SPEC, OWNER, OUT, EXCLUDED = (f"{PREFIX}/{key}" for key in ("spec-sha256", "owner", "out", "excluded-nodes"))
LAUNCHER = f"{PREFIX}/launcher"
"""The process that watches the job: of two with one owner the last to come goes on."""
RENEWED = f"{PREFIX}/renewed"
"""Written again and again by that process; "never" where nobody promised to watch."""
REAPER = f"{PREFIX}/reaper"
"""What the reaper saw there, and how many times in a row."""
SUSPENDED = f"{PREFIX}/suspended"
"""Stopped by a person and kept; the next launcher resumes it."""
CREATION = f"{PREFIX}/creation"
"""Label, another at each creation: tells the pods that a job owns through others (a JobSet, a RayCluster) from those of
a job that had its name before."""


@dataclass(frozen=True)
class Owner:
    """The Kubernetes object whose deletion deletes ours: the pipeline's Workflow, never a pod of it."""

    api_version: str
    kind: str
    name: str
    uid: str

    def reference(self) -> dict[str, str]:
        return {"apiVersion": self.api_version, "kind": self.kind, "name": self.name, "uid": self.uid}


def owner_of(text: str) -> Owner:
    """From API_VERSION,KIND,NAME,UID.

    Raises:
        UsageError: it has other parts.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(parts):
        example = "argoproj.io/v1alpha1,Workflow,NAME,UID"
        raise UsageError("not an owner", where="QWENVL_OWNER", expected=example, got=text)
    return Owner(*parts)


@dataclass(frozen=True)
class Run:
    """What a rendering needs to know besides recipe, step and cluster.

    Args:
        out: the run's output URI.
        id: of the run that asks, for labels and ownership: a pipeline run, or what a person gave.
        stage_digest: of the step at its first step; "" for steps without one (prepare, export).
        attempt: counts from 1.
        exclude_nodes: host names that this attempt must not use.
        parent_run: MLflow run of the pipeline.
        owner: see Owner; None without a pipeline.
    """

    out: str
    id: str
    stage_digest: str = ""
    attempt: int = 1
    exclude_nodes: tuple[str, ...] = ()
    accept_changes: tuple[str, ...] = ()
    parent_run: str | None = None
    owner: Owner | None = None

    @property
    def identity(self) -> str:
        return digest({"out": self.out.rstrip("/"), "stage": self.stage_digest})[:8]


def job_name(recipe: str, step: str, run: Run, longest: int = MAX_JOB_NAME) -> str:
    """DNS-1035, and short enough for what the operator appends; a long recipe name is cut, the identity never."""
    tail = f"-{dns(step)}-{run.identity}-a{run.attempt}"
    return f"{dns(recipe)[: longest - len(tail)].rstrip('-')}{tail}"


def config_map_name(recipe: str, step: str, run: Run, recipe_sha256: str) -> str:
    """One for each content: immutable, found again by the next attempt."""
    tail = f"-{dns(step)}-{run.identity}-{recipe_sha256[:8]}"
    return f"{dns(recipe)[: MAX_NAME - len(tail)].rstrip('-')}{tail}"


def dns(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def label(text: str) -> str:
    """As much of a text as a label value holds."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:MAX_NAME].strip("-_.")


def labels(recipe: str, step: str, run: Run) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": PREFIX,
        "app.kubernetes.io/component": label(step),
        "app.kubernetes.io/managed-by": f"{PREFIX}-launcher",
        "app.kubernetes.io/part-of": PREFIX,
        RECIPE: label(recipe),
        STEP: label(step),
        RUN: label(run.id),
        IDENTITY: run.identity,
        ATTEMPT: str(run.attempt),
    }
