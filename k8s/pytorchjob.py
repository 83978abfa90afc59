"""(recipe, step, cluster, run) -> the Kubernetes objects of one attempt, as plain dicts. Pure: no clock, no client.

    render_stage(recipe, "stage1", cluster, run)      a PyTorchJob of `nodes` workers, one pod a node
    render_program(recipe, "export", cluster, run)    a PyTorchJob of one worker: init, generate, export, evaluate

Both return Rendered: the ConfigMap with the resolved recipe, and the job that mounts it. What the job's kind does not
matter for is a Group (stage_group, program_group), which k8s/trainjob.py renders as well. Every job is worker-only and
elastic with min = max: torchrun meets by c10d at worker 0, and no init container pulls an image from elsewhere. Nothing
restarts by itself (maxRestarts 0, restartPolicy Never, backoffLimit 0): attempts are the launcher's, and each has a new
name. argv and environment come from trainer/command.py, as on a laptop.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

from k8s import names
from k8s.cluster import Cluster, Gang, Kueue, NodePool, pool_of
from k8s.names import Run
from k8s.pods import RECIPE_FILE, Pod, pod_template, without_empty
from trainer.command import PARENT_RUN, PROGRAMS, Command, ProgramCall, StageCall, program_command, stage_command
from trainer.errors import ClusterError, UsageError
from trainer.recipe import Recipe, Stage
from trainer.resolve import digest, resolved

Json = dict[str, Any]

API_VERSION = "kubeflow.org/v1"
KIND = "PyTorchJob"
CONTAINER = "pytorch"  # the operator's webhook insists on this name
SHUTDOWN_MARGIN_S = 10
"""The trainer's ranks are stopped this long before the kubelet would: what is left is for the records."""


@dataclass(frozen=True)
class Rendered:
    """What one attempt creates; the job becomes the owner of the others.

    Args:
        runtime: what a TrainJob names and must find when it is created; None for other kinds.
    """

    config_map: Json
    job: Json
    runtime: Json | None = None

    @property
    def name(self) -> str:
        return self.job["metadata"]["name"]

    def objects(self) -> list[Json]:
        """All, in the order in which they can be created."""
        return [self.config_map, *([self.runtime] if self.runtime else []), self.job]

    def templates(self) -> list[Json]:
        """Of every pod that the attempt will have."""
        return templates_in((self.runtime or self.job)["spec"])


@dataclass(frozen=True)
class Group:
    """The pods of one attempt, before a kind of job puts them into its own words.

    Args:
        labels: of the job and of its pods.
        template: PodTemplateSpec of every pod.
        processes: ranks of one pod.
    """

    name: str
    config_map: Json
    labels: dict[str, str]
    template: Json
    nodes: int
    processes: int


def render_stage(recipe: Recipe, stage: str, cluster: Cluster, run: Run) -> Rendered:
    """The PyTorchJob of one attempt to train a stage; raises what stage_group does."""
    return _pytorchjob(stage_group(recipe, stage, cluster, run), cluster, run)


def render_program(recipe: Recipe, program: str, cluster: Cluster, run: Run, *, stage: str | None = None) -> Rendered:
    """The one-worker PyTorchJob of init, generate (for sft or dpo), export or evaluate."""
    return _pytorchjob(program_group(recipe, program, cluster, run, stage=stage), cluster, run)


def stage_group(recipe: Recipe, stage: str, cluster: Cluster, run: Run, container: str = CONTAINER) -> Group:
    """The pods of one attempt to train a stage.

    Raises:
        UsageError: the recipe has no such stage.
        ClusterError: the cluster has no such pool, or its nodes are too small.
    """
    compute = stage_of(recipe, stage).compute
    pool = pool_of(cluster, compute.node_pool)
    gpus = _gpus(stage, compute.gpus_per_node, pool)
    command = stage_command(
        StageCall(
            recipe=RECIPE_FILE,
            stage=stage,
            out=run.out,
            nodes=compute.nodes,
            procs_per_node=compute.gpus_per_node,
            threads=compute.threads,
            device="cuda" if gpus else "cpu",
            accept_changes=run.accept_changes,
            shutdown_timeout_s=cluster.grace.termination_s - SHUTDOWN_MARGIN_S,
            tracking_uri=recipe.tracking.uri or cluster.mlflow_uri,
            parent_run=run.parent_run,
        )
    )
    return _group(recipe, stage, cluster, run, container, command, pool, gpus, compute.nodes, compute.gpus_per_node)


def program_group(
    recipe: Recipe, program: str, cluster: Cluster, run: Run, *, stage: str | None = None, container: str = CONTAINER
) -> Group:
    """The one pod of init, generate (for sft or dpo), export or evaluate.

    What runs the model (generate, evaluate) gets one node of its stage's pool with the GPUs that the stage takes of it:
    a model that is trained on a node's GPUs fits on them. What only moves weights (init, export) runs on the CPU pool.
    """
    if program not in PROGRAMS:
        raise UsageError("no such program", where=program, expected=", ".join(PROGRAMS))
    pool, gpus, threads = cluster.pools[cluster.cpu_pool], 0, 2
    if program in ("generate", "evaluate"):
        near = stage or list(recipe.stages.named())[-1]
        compute = stage_of(recipe, near).compute
        pool = pool_of(cluster, compute.node_pool)
        gpus, threads = _gpus(near, compute.gpus_per_node, pool), max(2, compute.threads)
    command = program_command(
        ProgramCall(
            program=program,
            recipe=RECIPE_FILE,
            out=run.out,
            stage=stage,
            threads=threads,
            device="cuda" if gpus else "cpu",
            tracking_uri=recipe.tracking.uri or cluster.mlflow_uri,
            parent_run=run.parent_run,
        )
    )
    step = f"{program}-{stage}" if stage else program
    return _group(recipe, step, cluster, run, container, command, pool, gpus, nodes=1, processes=1)


def stage_of(recipe: Recipe, stage: str) -> Stage:
    named = recipe.stages.named()
    if stage not in named:
        raise UsageError("the recipe has no such stage", where=stage, expected=", ".join(named))
    return named[stage]


def _gpus(stage: str, wanted: int, pool: NodePool) -> int:
    """GPUs of one pod; 0 where the pool has none and ranks are CPU processes."""
    if pool.gpu is None:
        return 0
    if wanted > pool.gpu.count:
        raise ClusterError(
            "a node of the pool has fewer GPUs than the stage asks for",
            where=f"stages.{stage}.compute.gpus_per_node",
            expected=f"at most {pool.gpu.count} {pool.gpu.resource}",
            got=wanted,
        )
    return wanted


# ---------------------------------------------------------------- objects


def _group(
    recipe: Recipe,
    step: str,
    cluster: Cluster,
    run: Run,
    container: str,
    command: Command,
    pool: NodePool,
    gpus: int,
    nodes: int,
    processes: int,
) -> Group:
    config = config_map(recipe, step, cluster, run)
    labels = {**cluster.labels, **names.labels(recipe.name, step, run)}
    template = pod_template(
        Pod(
            container=container,
            image=cluster.images.trainer,
            command=command,
            pool=pool,
            cluster=cluster,
            run=run,
            labels=labels,
            config_map=config["metadata"]["name"],
            gpus=gpus,
            peers=nodes - 1,
            priority=cluster.priorities.train,
        )
    )
    return Group(names.job_name(recipe.name, step, run), config, labels, template, nodes, processes)


def rendezvous(cluster: Cluster) -> dict[str, str]:
    """The first pod waits for the last image to be pulled; torchrun's own 60 and 600 s are too short."""
    timeout = str(cluster.limits.start_s)
    return {"join_timeout": timeout, "read_timeout": timeout}


def _pytorchjob(group: Group, cluster: Cluster, run: Run) -> Rendered:
    spec = {
        "nprocPerNode": str(group.processes),
        "elasticPolicy": {
            "rdzvBackend": "c10d",
            "rdzvId": group.name,
            "minReplicas": group.nodes,
            "maxReplicas": group.nodes,
            "maxRestarts": 0,
            "rdzvConf": [{"key": key, "value": value} for key, value in rendezvous(cluster).items()],
        },
        "runPolicy": without_empty(
            {
                "backoffLimit": 0,
                "cleanPodPolicy": "Running",
                "ttlSecondsAfterFinished": cluster.keep_finished_s,
                "schedulingPolicy": _scheduling(cluster, group.nodes),
            }
        ),
        "pytorchReplicaSpecs": {
            "Worker": {"replicas": group.nodes, "restartPolicy": "Never", "template": group.template}
        },
    }
    about = job_metadata(group.name, cluster, run, {**group.labels, **queue_labels(cluster)})
    return Rendered(group.config_map, an_object(API_VERSION, KIND, about, spec))


def an_object(api_version: str, kind: str, metadata: Json, spec: Json) -> Json:
    """With the digest of what it is among its annotations."""
    made = {"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec}
    metadata["annotations"][names.SPEC] = spec_sha256(made)
    return made


def config_map(recipe: Recipe, step: str, cluster: Cluster, run: Run) -> Json:
    """The resolved recipe; immutable, its digest in the name."""
    content = resolved(recipe)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": names.config_map_name(recipe.name, step, run, content["sha256"]),
            "namespace": cluster.namespace,
            # No run and no attempt: the object is the same for all of them.
            "labels": {
                **cluster.labels,
                **{
                    k: v for k, v in names.labels(recipe.name, step, run).items() if k not in (names.RUN, names.ATTEMPT)
                },
            },
        },
        "immutable": True,
        "data": {
            RECIPE_FILE.rsplit("/", 1)[1]: json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        },
    }


def job_metadata(name: str, cluster: Cluster, run: Run, labels: dict[str, str]) -> Json:
    annotations = {names.OWNER: run.id, names.OUT: run.out}
    if run.exclude_nodes:
        annotations[names.EXCLUDED] = ",".join(sorted(run.exclude_nodes))
    metadata: Json = {"name": name, "namespace": cluster.namespace, "labels": labels, "annotations": annotations}
    if run.owner is not None:
        metadata["ownerReferences"] = [run.owner.reference()]
    return metadata


def queue_labels(cluster: Cluster) -> dict[str, str]:
    """What makes Kueue hold the job back until there is quota; on the job, not on its pods."""
    if not isinstance(cluster.queue, Kueue):
        return {}
    labels = {"kueue.x-k8s.io/queue-name": cluster.queue.name}
    if cluster.queue.priority_class is not None:
        labels["kueue.x-k8s.io/priority-class"] = cluster.queue.priority_class
    return labels


def _scheduling(cluster: Cluster, nodes: int) -> Json | None:
    if not isinstance(cluster.queue, Gang):
        return None
    policy = {"minAvailable": nodes, "queue": cluster.queue.queue, "priorityClass": cluster.priorities.train}
    return without_empty(policy)


# ---------------------------------------------------------------- is it the same job


def comparable(job: Json) -> Json:
    """A job without what differs between two runs that mean the same work: who asks, and the MLflow run above it."""
    job = copy.deepcopy(job)
    metadata = job["metadata"]
    own = (names.RUN, names.CREATION)
    kept = {key: value for key, value in metadata.get("labels", {}).items() if key not in own}
    made = {
        "apiVersion": job["apiVersion"],
        "kind": job["kind"],
        "name": metadata["name"],
        "labels": kept,
        "spec": job["spec"],
    }
    _forget_labels(made["spec"], own)
    for template in templates_in(made["spec"]):
        for container in template["spec"]["containers"]:
            container["env"] = [entry for entry in container.get("env", []) if entry["name"] != PARENT_RUN]
    return made


def _forget_labels(node: Any, keys: tuple[str, ...]) -> None:
    """Of whatever a job makes: pods, and the JobSet between a TrainJob and its pods."""
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _forget_labels(item, keys)
    if isinstance(node, dict) and isinstance(node.get("labels"), dict):
        for key in keys:
            node["labels"].pop(key, None)


def templates_in(node: Any) -> list[Json]:
    """Every pod template inside a job's spec, however deep its kind has them."""
    if isinstance(node, list):
        return [template for item in node for template in templates_in(item)]
    if not isinstance(node, dict):
        return []
    if "containers" in (node.get("spec") or {}):
        return [node]
    return [template for value in node.values() for template in templates_in(value)]


def spec_sha256(job: Json) -> str:
    """Digest of what the job is, whoever asked for it."""
    return digest(comparable(job))


def differences(wanted: Json, found: Json) -> list[str]:
    """`path: wanted X, found Y` for every field that we render and the cluster's object has otherwise.

    Fields that only the found object has were filled in by the server and are no difference.
    """
    return list(_differences(comparable(wanted), comparable(found), ""))


def _differences(wanted: Any, found: Any, path: str) -> list[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        lists = (_differences(value, found.get(key), f"{path}.{key}") for key, value in wanted.items())
        return [line for lines in lists for line in lines]
    if path.endswith(".tolerations") and isinstance(found, list):  # a queue adds those of the nodes that it chose
        found = [one for one in found if one in wanted]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        lists = (
            _differences(one, other, f"{path}[{i}]") for i, (one, other) in enumerate(zip(wanted, found, strict=True))
        )
        return [line for lines in lists for line in lines]
    return [] if wanted == found else [f"{path.lstrip('.')}: wanted {_short(wanted)}, found {_short(found)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 120 else f"{text[:117]}..."
