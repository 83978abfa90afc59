"""(recipe, step, cluster, run) -> TrainingRuntime and TrainJob of Kubeflow Trainer v2, as plain dicts. Pure.

    render_stage(recipe, "stage1", cluster, run)      a TrainJob of `nodes` pods
    render_program(recipe, "export", cluster, run)    a TrainJob of one pod: init, generate, export, evaluate

The same Groups as k8s/pytorchjob.py: image, argv, environment, resources, volumes and placement of a pod are equal;
what differs is said in k8s/README.md and held by tests/k8s/test_trainjob.py. A TrainJob names a runtime, and only the
runtime holds a pod template: one runtime an attempt, with the attempt's name; the TrainJob becomes its owner.

Read in the sources of Trainer v2.2.0 and JobSet v0.11.1 (images/versions.env): the container, the replicated job and
the label below must have these names; without a section `trainer` in the TrainJob the Trainer sets no PET_* variable at
all; its torch policy knows no elastic rendezvous ("TODO: Add support for PyTorch elastic"), so the c10d rendezvous of
the PyTorchJob is written into the environment here. No launcher uses this renderer yet.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from k8s import names
from k8s.cluster import Cluster, Gang
from k8s.names import Run
from k8s.pods import without_empty
from k8s.pytorchjob import Group, job_metadata, program_group, queue_labels, rendezvous, spec_sha256, stage_group
from trainer.recipe import Recipe

Json = dict[str, Any]

API_VERSION = "trainer.kubeflow.org/v1alpha1"
RUNTIME, KIND = "TrainingRuntime", "TrainJob"
NODE = "node"
"""Name of the replicated job and of its container."""
ANCESTOR = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
PORT = 29500
"""Of the rendezvous; the Trainer declares it on the container."""
VOLCANO_QUEUE = "scheduling.volcano.sh/queue-name"


@dataclass(frozen=True)
class RenderedTrainJob:
    """What one attempt creates, in this order; the TrainJob becomes the owner of the other two."""

    config_map: Json
    runtime: Json
    job: Json

    @property
    def name(self) -> str:
        return self.job["metadata"]["name"]


def render_stage(recipe: Recipe, stage: str, cluster: Cluster, run: Run) -> RenderedTrainJob:
    """One attempt to train a stage; raises what k8s.pytorchjob.stage_group does."""
    return _trainjob(stage_group(recipe, stage, cluster, run, container=NODE), cluster, run)


def render_program(
    recipe: Recipe, program: str, cluster: Cluster, run: Run, *, stage: str | None = None
) -> RenderedTrainJob:
    """One attempt of init, generate (for sft or dpo), export or evaluate."""
    return _trainjob(program_group(recipe, program, cluster, run, stage=stage, container=NODE), cluster, run)


def _trainjob(group: Group, cluster: Cluster, run: Run) -> RenderedTrainJob:
    runtime: Json = {
        "apiVersion": API_VERSION,
        "kind": RUNTIME,
        "metadata": job_metadata(group.name, cluster, run, group.labels),
        "spec": without_empty(
            {
                "mlPolicy": {"numNodes": group.nodes, "torch": {}},
                "podGroupPolicy": _pod_group(cluster),
                "template": {
                    "metadata": without_empty({"labels": group.labels, "annotations": _queue(cluster)}),
                    "spec": jobset_spec(group, cluster),
                },
            }
        ),
    }
    runtime["metadata"]["annotations"][names.SPEC] = spec_sha256(runtime)
    job: Json = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": job_metadata(group.name, cluster, run, {**group.labels, **queue_labels(cluster)}),
        "spec": {
            "runtimeRef": {"apiGroup": API_VERSION.split("/")[0], "kind": RUNTIME, "name": group.name},
            # Without numProcPerNode the Trainer takes the number of GPUs, and of CPUs where there are none.
            "trainer": {"numNodes": group.nodes, "numProcPerNode": group.processes},
        },
    }
    job["metadata"]["annotations"][names.SPEC] = spec_sha256(job)
    return RenderedTrainJob(group.config_map, runtime, job)


def jobset_spec(group: Group, cluster: Cluster) -> Json:
    """The JobSet that the Trainer makes of the runtime; it adds completions, parallelism and its PET_* variables."""
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": [NODE]},
        "failurePolicy": {"maxRestarts": 0},
        "ttlSecondsAfterFinished": cluster.keep_finished_s,
        "replicatedJobs": [
            {
                "name": NODE,
                "replicas": 1,
                "template": {
                    "metadata": {"labels": ANCESTOR},
                    "spec": {
                        "completionMode": "Indexed",
                        "backoffLimit": 0,
                        "podReplacementPolicy": "Failed",  # never two pods of one index at a time
                        "template": _with_rendezvous(group, cluster),
                    },
                },
            }
        ],
    }


def _with_rendezvous(group: Group, cluster: Cluster) -> Json:
    """The group's pod template, meeting by c10d at the pod with index 0, as the PyTorchJob's pods do."""
    template = copy.deepcopy(group.template)
    container = template["spec"]["containers"][0]
    added = {
        "PET_MAX_RESTARTS": "0",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_CONF": ",".join(f"{key}={value}" for key, value in rendezvous(cluster).items()),
        "PET_RDZV_ENDPOINT": f"{group.name}-{NODE}-0-0.{group.name}:{PORT}",
        "PET_RDZV_ID": group.name,
    }
    entries = [*container["env"], *({"name": name, "value": value} for name, value in added.items())]
    container["env"] = sorted(entries, key=lambda entry: entry["name"])
    return template


def _pod_group(cluster: Cluster) -> Json | None:
    """Gang scheduling; its number of members is always the number of nodes."""
    if not isinstance(cluster.queue, Gang):
        return None
    if cluster.queue.kind == "volcano":
        return {"volcano": {}}
    return {"coscheduling": {"scheduleTimeoutSeconds": cluster.limits.schedule_s}}


def _queue(cluster: Cluster) -> Json:
    """Volcano's queue is an annotation of the runtime's template in v2, not a field."""
    if isinstance(cluster.queue, Gang) and cluster.queue.kind == "volcano" and cluster.queue.queue:
        return {VOLCANO_QUEUE: cluster.queue.queue}
    return {}
