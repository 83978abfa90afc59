"""What each step of the pipeline does: one function a step, called by the thin components in pipelines/steps.py.

`cluster` chooses where: `local` runs here (data preparation inside the step, training through torchx's local_cwd
scheduler, programs of one process as children), everything else hands the same command to the cluster's launcher
(k8s/launcher.py) and waits. Every function may be called again: what is finished is recognised and left alone.

The first step settles the recipe: it resolves name, overrides and base model into OUT/recipe.json, which all later
steps read. So a step's parameters are few, and nothing in the middle of a run can be made from another recipe. `run_id`
is the pipeline run that owns what a step creates on a cluster.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from pipelines import session
from pipelines.session import DONE, NOT_HERE, WAS_DONE
from pipelines.settle import settle, stored_recipe
from trainer import command
from trainer.errors import ModelError, UsageError
from trainer.recipe import Recipe

LOCAL = "local"
CLUSTER_PACKAGES = ("kubernetes", "kubeflow")
"""Modules of the extra `cluster`."""
DEVICE = "QWENVL_DEVICE"


# ---------------------------------------------------------------- data


@session.step("prepare-data")
def prepare_data(
    *,
    recipe: str,
    overrides: list[str],
    base_model: str,
    accept_changes: list[str],
    cluster: str,
    out: str,
    run_id: str = "",
) -> str:
    """Settle the recipe; corpus, tokenizer, every source as shards."""
    settled = settle(recipe, overrides, base_model=base_model, accept=accept_changes, out=out)
    if cluster != LOCAL:
        return _on_cluster(cluster, "prepare-data", out, run_id)
    from pipelines.prepare.ingest import prepare_data as prepare

    prepare(settled, out)
    return DONE


@session.step("prepare-{stage}")
def prepare_stage(*, stage: str, cluster: str, out: str, run_id: str = "") -> str:
    """Counts, then the plan of a stage and of its held-out data."""
    recipe = stored_recipe(out)
    if stage not in recipe.stages.named():
        return NOT_HERE
    if cluster != LOCAL:
        return _on_cluster(cluster, "prepare-stage", out, run_id, stage=stage)
    from pipelines.prepare.stage import prepare_stage as prepare

    prepare(recipe, stage, out)
    return DONE


@session.step("prepare-{stage}-requests")
def make_requests(*, stage: str, cluster: str, out: str, run_id: str = "") -> str:
    """Tasks with a known answer, as requests to the model."""
    recipe = stored_recipe(out)
    if not _samples(recipe, stage):
        return NOT_HERE
    if cluster != LOCAL:
        return _on_cluster(cluster, "requests", out, run_id, stage=stage)
    from pipelines.prepare.sampling import make_requests as make

    make(recipe, stage, out)
    return DONE


@session.step("prepare-{stage}-answers")
def answer(*, stage: str, cluster: str, out: str, run_id: str = "") -> str:
    """Answers of this run's newest model, or of the endpoint that the recipe names."""
    recipe = stored_recipe(out)
    if not _samples(recipe, stage):
        return NOT_HERE
    return _program("generate", recipe, cluster=cluster, out=out, run_id=run_id, stage=stage)


@session.step("prepare-{stage}-select")
def select(*, stage: str, cluster: str, out: str, run_id: str = "") -> str:
    """Correct answers for sft, pairs of a correct and an incorrect one for dpo, as a source."""
    recipe = stored_recipe(out)
    if not _samples(recipe, stage):
        return NOT_HERE
    if cluster != LOCAL:
        return _on_cluster(cluster, "select", out, run_id, stage=stage)
    from pipelines.prepare.sampling import select_answers

    select_answers(recipe, stage, out)
    return DONE


def _samples(recipe: Recipe, stage: str) -> bool:
    found = recipe.stages.named().get(stage)
    return found is not None and found.sampling is not None


# ---------------------------------------------------------------- training


@session.step("init")
def init(*, cluster: str, out: str, run_id: str = "") -> str:
    """The model that the first stage starts from."""
    from trainer import handover

    recipe = stored_recipe(out)
    if handover.finished(recipe, handover.INIT, out) is not None:
        return WAS_DONE
    return _program("init", recipe, cluster=cluster, out=out, run_id=run_id)


@session.step("{stage}")
def train(*, stage: str, accept_changes: list[str], cluster: str, out: str, run_id: str = "") -> str:
    """One stage, from its parent's weights to its StageResult."""
    from trainer import handover

    recipe = stored_recipe(out)
    if stage not in recipe.stages.named():
        return NOT_HERE
    accept = accepted_by(stage, accept_changes)
    if handover.finished(recipe, stage, out, accept=accept) is not None:
        return WAS_DONE
    if cluster != LOCAL:
        return _on_cluster(cluster, "train", out, run_id, stage=stage, accept_changes=accept)
    from pipelines.local import run_stage

    call = command.local_call(
        recipe,
        stage,
        ref=recipe_uri(out),
        out=out,
        python=sys.executable,
        accept_changes=tuple(accept),
        device=os.environ.get(DEVICE, "cpu"),
    )
    run_stage(call)
    if handover.finished(recipe, stage, out, accept=accept) is None:
        raise ModelError("the stage ended without a result", where=handover.result_uri(out, stage))
    return DONE


def accepted_by(stage: str, names: list[str]) -> list[str]:
    """Fields of --accept-change that concern a stage, as it names them: stages.sft.optim.lr -> optim.lr."""
    own = f"stages.{stage}."
    return [name.removeprefix(own) for name in names if name.startswith(own) or not name.startswith("stages.")]


# ---------------------------------------------------------------- after


@session.step("export")
def export(*, cluster: str, out: str, run_id: str = "") -> str:
    """The final model in Hugging Face layout."""
    return _program("export", stored_recipe(out), cluster=cluster, out=out, run_id=run_id)


@session.step("evaluate")
def evaluate(*, cluster: str, out: str, run_id: str = "") -> str:
    """Held-out losses and task scores, before training and at the end."""
    return _program("evaluate", stored_recipe(out), cluster=cluster, out=out, run_id=run_id)


@session.step("report")
def report(*, out: str) -> str:
    """report.html and run.json; the run in MLflow is closed meanwhile."""
    from pipelines import tracking
    from pipelines.report.build import write_report

    closing = tracking.start(stored_recipe(out), out, "FINISHED")
    try:
        write_report(out)
    finally:
        closing.wait()  # a run that fails here is marked FAILED after this, not before
    return DONE


@session.step("clean-up")
def clean_up(*, cluster: str, out: str, run_id: str, state: str) -> str:
    """When the run has ended or was stopped: remove or suspend what it still owns on the cluster."""
    if cluster == LOCAL:
        return DONE
    from k8s import cleanup

    cleanup.clean_up(cluster, out=out, run_id=run_id)
    return f"after {state}"


# ---------------------------------------------------------------- where


def recipe_uri(out: str) -> str:
    from trainer import storage

    return storage.join(out, "recipe.json")


def _program(program: str, recipe: Recipe, *, cluster: str, out: str, run_id: str, stage: str | None = None) -> str:
    if cluster != LOCAL:
        return _on_cluster(cluster, program, out, run_id, stage=stage)
    from pipelines.local import run_program

    named = recipe.stages.named()
    compute = (named[stage] if stage else next(iter(named.values()))).compute
    run_program(
        command.ProgramCall(
            program=program,
            recipe=recipe_uri(out),
            out=out,
            stage=stage,
            threads=compute.threads * compute.gpus_per_node,
            device="cuda" if os.environ.get(DEVICE) == "cuda" else "cpu",
            python=sys.executable,
        )
    )
    return DONE


def _on_cluster(cluster: str, what: str, out: str, run_id: str, **more: Any) -> str:
    """Hand a step to the cluster's launcher and wait for it. Imported here: laptops need no Kubernetes client."""
    try:
        from k8s import launcher

        launcher.run_step(launcher.StepCall(what, cluster, out, run_id=run_id or None, **more))
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in CLUSTER_PACKAGES:
            raise  # something else is broken, and says what
        raise UsageError(
            "running on a cluster needs the Kubernetes client",
            where=f"--cluster {cluster}",
            got=str(error),
            do="install qwenvl-train[cluster]",
        ) from error
    return DONE
