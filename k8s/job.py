"""(recipe, step, cluster, run, command) -> the one-pod Job of a data preparation step. Pure, like pytorchjob.py.

The same pod template as the trainer's, with the prepare image, on the CPU pool. Data preparation resumes per shard, so
a lost pod costs little; attempts are the launcher's here too (backoffLimit 0).
"""

from __future__ import annotations

from k8s import names
from k8s.cluster import Cluster
from k8s.names import Run
from k8s.pods import Pod, pod_template
from k8s.pytorchjob import Rendered, config_map, job_metadata, queue_labels, spec_sha256
from trainer.command import Command
from trainer.recipe import Recipe

CONTAINER = "prepare"


def render_prepare(recipe: Recipe, step: str, cluster: Cluster, run: Run, command: Command) -> Rendered:
    """The Job of one attempt of a preparation step.

    Args:
        step: prepare-data, prepare-stage1, requests-sft, select-dpo, ...: part of names and labels.
        command: what the pod runs; its recipe is k8s.pods.RECIPE_FILE.
    """
    config = config_map(recipe, step, cluster, run)
    labels = {**cluster.labels, **names.labels(recipe.name, step, run)}
    template = pod_template(
        Pod(
            container=CONTAINER,
            image=cluster.images.prepare,
            command=command,
            pool=cluster.pools[cluster.cpu_pool],
            cluster=cluster,
            run=run,
            labels=labels,
            config_map=config["metadata"]["name"],
            priority=cluster.priorities.prepare,
        )
    )
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": job_metadata(
            names.job_name(recipe.name, step, run), cluster, run, {**labels, **queue_labels(cluster)}
        ),
        "spec": {
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",  # never two writers of one shard
            "ttlSecondsAfterFinished": cluster.keep_finished_s,
            "template": template,
        },
    }
    job["metadata"]["annotations"][names.SPEC] = spec_sha256(job)
    return Rendered(config, job)
