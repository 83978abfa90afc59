"""The rendered objects of every shipped recipe on one cluster, as they are committed in tests/golden/manifests.

`python -m tests.generated --write` writes them, `--check` compares: a change of what reaches a cluster shows in review.
The ConfigMap's content is left out: tests/golden/recipes has it. Of the other kinds, TrainJob and RayJob, two recipes
are committed: their pods are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from k8s import rayjob, trainjob
from k8s.cluster import load_cluster
from k8s.job import render_prepare
from k8s.names import Run
from k8s.pods import RECIPE_FILE
from k8s.pytorchjob import Rendered, render_program, render_stage
from trainer.command import PrepareCall, prepare_command
from trainer.recipe import Recipe
from trainer.resolve import load_recipe, shipped

CLUSTER = "onprem"
OTHER_KINDS = ("tiny", "qwen2_5_vl_72b")
RAY = "ray={workers: 4}"
RUN = Run(out="s3://training/runs/golden", id="golden", stage_digest="golden")


def rendered(recipe: Recipe, cluster_name: str = CLUSTER, run: Run = RUN) -> Iterator[Rendered]:
    """Everything that a run of the recipe may create."""
    cluster = load_cluster(cluster_name)
    yield render_prepare(
        recipe, "prepare-data", cluster, run, prepare_command(PrepareCall("prepare-data", RECIPE_FILE, run.out))
    )
    yield render_program(recipe, "init", cluster, run)
    for name, stage in recipe.stages.named().items():
        if stage.sampling is not None:
            yield render_program(recipe, "generate", cluster, run, stage=name)
        yield render_stage(recipe, name, cluster, run)
    yield render_program(recipe, "export", cluster, run)
    yield render_program(recipe, "evaluate", cluster, run)


def trainjobs(recipe: Recipe, cluster_name: str = CLUSTER, run: Run = RUN) -> Iterator[Rendered]:
    """What a run would create under Kubeflow Trainer v2; data preparation stays what it is."""
    cluster = load_cluster(cluster_name)
    yield trainjob.render_program(recipe, "init", cluster, run)
    for name, stage in recipe.stages.named().items():
        if stage.sampling is not None:
            yield trainjob.render_program(recipe, "generate", cluster, run, stage=name)
        yield trainjob.render_stage(recipe, name, cluster, run)
    yield trainjob.render_program(recipe, "export", cluster, run)
    yield trainjob.render_program(recipe, "evaluate", cluster, run)


def a_rayjob(recipe: Recipe, cluster_name: str = CLUSTER, run: Run = RUN) -> Rendered:
    command = prepare_command(PrepareCall("prepare-data", RECIPE_FILE, run.out))
    return rayjob.render_prepare(recipe, "prepare-data", load_cluster(cluster_name, [RAY]), run, command)


def manifests() -> Iterator[tuple[str, str]]:
    """(path from the root, content) of the golden files: one a recipe, one document a job."""
    for name in shipped():
        jobs = [one.job for one in rendered(load_recipe(name))]
        yield f"tests/golden/manifests/{name}.yaml", as_yaml(jobs)
    for name in OTHER_KINDS:
        recipe = load_recipe(name)
        objects = [part for one in trainjobs(recipe) for part in one.objects()[1:]]
        yield f"tests/golden/trainjobs/{name}.yaml", as_yaml(objects)
        yield f"tests/golden/rayjobs/{name}.yaml", as_yaml([a_rayjob(recipe).job])


class _SpelledOut(yaml.SafeDumper):
    """Without aliases: a part that two documents share is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_yaml(jobs: list[dict[str, Any]]) -> str:
    return yaml.dump_all(jobs, Dumper=_SpelledOut, sort_keys=True, width=120, explicit_start=True)
