"""(recipe, step, cluster, run) -> TrainingRuntime and TrainJob of Kubeflow Trainer v2, as plain dicts. Pure.

    render_stage(recipe, "stage1", cluster, run)      a TrainJob of `nodes` pods
    render_program(recipe, "export", cluster, run)    a TrainJob of one pod: init, generate, export, evaluate

The same Groups as k8s/pytorchjob.py: image, argv, environment, resources, volumes and placement of a pod are equal;
what differs is said in k8s/README.md and held by tests/k8s/test_trainjob.py. A TrainJob names a runtime, and only the
runtime holds a pod template: one runtime an attempt, with the attempt's name; the TrainJob becomes its owner.

Read in the sources of Trainer v2.2.0 and JobSet v0.11.1 (images/versions.env): the container, the replicated job and
the label below must have these names; without a section `trainer` in the TrainJob the Trainer sets no PET_* variable at
all; its torch policy knows no elastic rendezvous ("TODO: Add support for PyTorch elastic"), so the c10d rendezvous of
the PyTorchJob is written into the environment here. Its webhook refuses a TrainJob whose runtime is not there yet.
"""

from __future__ import annotations

import copy
from typing import Any

from k8s import names
from k8s.cluster import Cluster, Gang
from k8s.names import Run
from k8s.pods import without_empty
from k8s.pytorchjob import (
    Group,
    Rendered,
    an_object,
    job_metadata,
    program_group,
    queue_labels,
    rendezvous,
    stage_group,
)
from trainer.recipe import Recipe
from trainer.resolve import digest

Json = dict[str, Any]

API_VERSION = "trainer.kubeflow.org/v1alpha1"
RUNTIME, KIND = "TrainingRuntime", "TrainJob"
NODE = "node"
"""Name of the replicated job and of its container."""
ANCESTOR = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
PORT = 29500
"""Of the rendezvous; the Trainer declares it on the container."""
VOLCANO_QUEUE = "scheduling.volcano.sh/queue-name"


def render_stage(recipe: Recipe, stage: str, cluster: Cluster, run: Run) -> Rendered:
    """One attempt to train a stage; raises what k8s.pytorchjob.stage_group does."""
    return _trainjob(stage_group(recipe, stage, cluster, run, container=NODE), cluster, run)


def render_program(recipe: Recipe, program: str, cluster: Cluster, run: Run, *, stage: str | None = None) -> Rendered:
    """One attempt of init, generate (for sft or dpo), export or evaluate."""
    return _trainjob(program_group(recipe, program, cluster, run, stage=stage, container=NODE), cluster, run)


def _trainjob(group: Group, cluster: Cluster, run: Run) -> Rendered:
    of_jobset = {
        "mlPolicy": {"numNodes": group.nodes, "torch": {}},
        "podGroupPolicy": _pod_group(cluster),
        "template": {
            "metadata": without_empty({"labels": group.labels, "annotations": _queue(cluster)}),
            "spec": jobset_spec(group, cluster),
        },
    }
    about = job_metadata(group.name, cluster, run, dict(group.labels))
    about.pop("ownerReferences", None)  # its TrainJob owns it, and nobody else
    runtime = an_object(API_VERSION, RUNTIME, about, without_empty(of_jobset))
    about = job_metadata(group.name, cluster, run, {**group.labels, **queue_labels(cluster)})
    spec = {
        "runtimeRef": {"apiGroup": API_VERSION.split("/")[0], "kind": RUNTIME, "name": group.name},
        # Without numProcPerNode the Trainer takes the number of GPUs, and of CPUs where there are none.
        "trainer": {"numNodes": group.nodes, "numProcPerNode": group.processes},
    }
    job = an_object(API_VERSION, KIND, about, spec)
    # Of both: the pods, which are what two runs must agree on, are in the runtime.
    marks = [one["metadata"]["annotations"][names.SPEC] for one in (runtime, job)]
    job["metadata"]["annotations"][names.SPEC] = digest(marks)
    return Rendered(group.config_map, job, runtime)


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
