"""What the pipeline's own pods need of a cluster: the launcher's image, the CPU pool, storage, tracking.

These pods hold no accelerator and no data: each starts a job, waits for it, and reads and writes small files in OUT.
All that is said here stands in the compiled definition as plain values, which Kubeflow Pipelines 2.14 knows as well. So
it is compiled for a cluster: `qwenvl submit` does, and `python pipelines/full_recipe.py --cluster FILE --to FILE`. The
committed full_recipe.yaml fits one with AWS, the chart's secret and no node selector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kfp import dsl

from k8s.cluster import Cluster, SecretCredentials, Toleration
from pipelines.images import launcher_image

ACCESS, SECRET = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
NOT_EVICTABLE = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
"""A step waits for days; its loss costs a restart, which the retries are for."""


@dataclass(frozen=True)
class StepPods:
    """Where and with what the pods of the steps run.

    Args:
        secret: name, and which of its keys are the access key and the secret key; None: the service account's identity.
        env: what is set in every step.
    """

    image: str
    pull_secrets: tuple[str, ...] = ()
    secret: tuple[str, str, str] | None = ("qwenvl-train-s3", ACCESS, SECRET)
    node_labels: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    evictable: bool = False


def shipped() -> StepPods:
    """What the committed definition has: the chart's secret, any node."""
    return StepPods(launcher_image())


def of_cluster(cluster: Cluster) -> StepPods:
    """From a cluster file: its launcher image by digest, its CPU pool, its storage and MLflow."""
    pool, storage, given = cluster.pools[cluster.cpu_pool], cluster.storage, cluster.storage.credentials
    env = {
        "AWS_REGION": storage.region,
        "AWS_REQUEST_CHECKSUM_CALCULATION": storage.checksums,
        "AWS_RESPONSE_CHECKSUM_VALIDATION": storage.checksums,
        "MLFLOW_TRACKING_URI": cluster.mlflow_uri,
    }
    if storage.endpoint is not None:
        env["AWS_ENDPOINT_URL"] = storage.endpoint
    return StepPods(
        image=cluster.images.launcher,
        pull_secrets=tuple(cluster.images.pull_secrets),
        secret=(given.secret, given.access_key, given.secret_key) if isinstance(given, SecretCredentials) else None,
        node_labels=dict(pool.labels),
        tolerations=tuple(pool.tolerations),
        env=env,
        evictable=cluster.safe_to_evict,
    )


def place(task: dsl.PipelineTask, pods: StepPods | None) -> dsl.PipelineTask:
    """Say it of one task; nothing where steps are processes of this machine."""
    if pods is None:
        return task
    from kfp import kubernetes  # 0.65 s of CPU: it brings in the whole Kubernetes client

    task.set_container_image(pods.image)
    for name, value in sorted(pods.env.items()):
        task.set_env_variable(name, value)
    if pods.secret is not None:
        name, access, secret = pods.secret
        kubernetes.use_secret_as_env(task, name, {access: ACCESS, secret: SECRET})
        for one in task.platform_config["kubernetes"]["secretAsEnv"]:
            del one["optional"]  # false, the default; KFP 2.14 does not know the field and refuses the whole pipeline
    if pods.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(pods.pull_secrets))
    for key, value in sorted(pods.node_labels.items()):
        kubernetes.add_node_selector(task, key, value)
    for one in pods.tolerations:
        effect: Any = one.effect
        kubernetes.add_toleration(task, key=one.key, operator=one.operator, value=one.value, effect=effect)
    if not pods.evictable:
        for key, value in NOT_EVICTABLE.items():
            kubernetes.add_pod_annotation(task, key, value)
    return task
