"""(recipe, step, cluster, run, command) -> the one-pod Job of a data preparation step. Pure, like pytorchjob.py.

The same pod template as the trainer's, with the prepare image, on the CPU pool. Data preparation resumes per shard, so
a lost pod costs little; attempts are the launcher's here too (backoffLimit 0).
"""

from __future__ import annotations

from k8s import names
from k8s.cluster import Cluster
from k8s.names import Run
from k8s.pods import Pod, pod_template
from k8s.pytorchjob import Json, Rendered, an_object, config_map, job_metadata, queue_labels
from trainer.command import Command
from trainer.recipe import Recipe

CONTAINER = "prepare"


def render_prepare(recipe: Recipe, step: str, cluster: Cluster, run: Run, command: Command) -> Rendered:
    """The Job of one attempt of a preparation step.

    Args:
        step: prepare-data, prepare-stage1, requests-sft, select-dpo, ...: part of names and labels.
        command: what the pod runs; its recipe is k8s.pods.RECIPE_FILE.
    """
    config, pod = prepare_pod(recipe, step, cluster, run, command, CONTAINER)
    about = job_metadata(names.job_name(recipe.name, step, run), cluster, run, {**pod.labels, **queue_labels(cluster)})
    spec = {
        "parallelism": 1,
        "completions": 1,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",  # never two writers of one shard
        "ttlSecondsAfterFinished": cluster.keep_finished_s,
        "template": pod_template(pod),
    }
    return Rendered(config, an_object("batch/v1", "Job", about, spec))


def prepare_pod(
    recipe: Recipe, step: str, cluster: Cluster, run: Run, command: Command, container: str
) -> tuple[Json, Pod]:
    """(the ConfigMap with the recipe, a pod of the prepare image on the CPU pool that mounts it)."""
    config = config_map(recipe, step, cluster, run)
    return config, Pod(
        container=container,
        image=cluster.images.prepare,
        command=command,
        pool=cluster.pools[cluster.cpu_pool],
        cluster=cluster,
        run=run,
        labels={**cluster.labels, **names.labels(recipe.name, step, run)},
        config_map=config["metadata"]["name"],
        priority=cluster.priorities.prepare,
    )
