"""The pod that every program runs in: one template function for stages, programs and data preparation.

    Pod (what to run, where, with what) -> pod_template(pod) -> a PodTemplateSpec as a plain dict

Restricted by default: not root, no privilege escalation, no capabilities, read-only root; what a program may write is
/tmp (HOME lies there too), /dev/shm and the node cache. The token of the API server is not mounted: no program here
talks to Kubernetes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from k8s import names
from k8s.cluster import Cluster, Gang, Kueue, NodePool, SecretCredentials, WebIdentity, quantity
from k8s.names import Run
from trainer.command import Command

Json = dict[str, Any]

USER = 10001
RECIPE_DIR = "/etc/qwenvl-train"
RECIPE_FILE = f"{RECIPE_DIR}/recipe.json"
CACHE_DIR = "/cache"
TOKEN_DIR = "/var/run/secrets/qwenvl-train"
TERMINATION_LOG = "/dev/termination-log"


@dataclass(frozen=True)
class Pod:
    """One program in one pod.

    Args:
        container: its name; the training operator insists on "pytorch".
        gpus: of the pool's kind; 0 on CPU pools.
        peers: pods of the same job that it talks to; 0 for a pod alone.
        config_map: with the resolved recipe.
    """

    container: str
    image: str
    command: Command
    pool: NodePool
    cluster: Cluster
    run: Run
    labels: dict[str, str]
    config_map: str
    gpus: int = 0
    peers: int = 0
    priority: str | None = None


def pod_template(pod: Pod) -> Json:
    """PodTemplateSpec as a plain dict; None and empty values left out."""
    cluster, pool = pod.cluster, pod.pool
    spec: Json = {
        "restartPolicy": "Never",
        "serviceAccountName": cluster.accounts.trainer,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "shareProcessNamespace": _ends_by_default(pod.command) or None,
        "terminationGracePeriodSeconds": cluster.grace.termination_s,
        "nodeSelector": dict(pool.labels),
        "tolerations": _tolerations(pod),
        "affinity": _affinity(pod),
        "priorityClassName": pod.priority,
        "schedulerName": cluster.queue.scheduler if isinstance(cluster.queue, Gang) else None,
        "imagePullSecrets": [{"name": name} for name in cluster.images.pull_secrets],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(pod)],
        "volumes": _volumes(pod),
    }
    metadata = {"labels": {**cluster.labels, **pod.labels}, "annotations": _annotations(pod)}
    return {"metadata": without_empty(metadata), "spec": without_empty(spec)}


def _ends_by_default(command: Command) -> bool:
    """Whether SIGTERM shall do what it does to any process: as process 1 of its namespace a program without a handler
    never sees it, and a removed pod holds its node for the whole grace. trainer/launch.py has a handler."""
    return bool(command.argv) and "trainer.launch" not in command.argv


def without_empty(mapping: Json) -> Json:
    return {key: value for key, value in mapping.items() if value is not None and value != [] and value != {}}


# ---------------------------------------------------------------- the container


def _container(pod: Pod) -> Json:
    capabilities: Json = {"drop": ["ALL"]}
    if pod.pool.profile == "rdma" and pod.peers:
        capabilities["add"] = ["IPC_LOCK"]  # registered memory for RDMA
    return {
        "name": pod.container,
        "image": pod.image,
        "imagePullPolicy": "IfNotPresent",
        "command": pod.command.argv[:1],
        "args": pod.command.argv[1:],
        "env": _environment(pod),
        "resources": _resources(pod),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": capabilities,
        },
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(pod),
    }


def _environment(pod: Pod) -> list[Json]:
    """Sorted by name, each name once. The cluster file's settings and secrets give way to the program's own."""
    storage = pod.cluster.storage
    plain = {
        **pod.pool.env,
        **pod.command.env,
        "HOME": "/tmp",
        "AWS_REGION": storage.region,
        "AWS_REQUEST_CHECKSUM_CALCULATION": storage.checksums,
        "AWS_RESPONSE_CHECKSUM_VALIDATION": storage.checksums,
        "QWENVL_ATTEMPT": str(pod.run.attempt),
        "QWENVL_CACHE_DIR": CACHE_DIR,
        "QWENVL_CACHE_BYTES": str(int(quantity(storage.cache.size))),
        "QWENVL_IMAGE": pod.image,
        "QWENVL_TERMINATION_LOG": TERMINATION_LOG,
    }
    if storage.endpoint is not None:
        plain["AWS_ENDPOINT_URL"] = storage.endpoint
    referred = {name: (one.secret, one.key) for name, one in pod.cluster.secrets.items() if name not in plain}
    match storage.credentials:
        case SecretCredentials(secret=secret, access_key=access, secret_key=key):
            referred |= {"AWS_ACCESS_KEY_ID": (secret, access), "AWS_SECRET_ACCESS_KEY": (secret, key)}
        case WebIdentity(role_arn=role):
            plain |= {"AWS_ROLE_ARN": role, "AWS_WEB_IDENTITY_TOKEN_FILE": f"{TOKEN_DIR}/token"}
    entries: list[Json] = [
        *({"name": name, "value": value} for name, value in plain.items()),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
            for name, (secret, key) in referred.items()
        ),
    ]
    return sorted(entries, key=lambda entry: entry["name"])


def _resources(pod: Pod) -> Json:
    """Memory is both request and limit, so that no pod is killed for a neighbour; CPU has no limit, which throttles."""
    pool = pod.pool
    devices: Json = {}
    if pool.gpu is not None and pod.gpus:
        devices[pool.gpu.resource] = str(pod.gpus)
        if pool.rdma is not None and pod.peers:
            devices[pool.rdma.resource] = str(pool.rdma.count)
    return {
        "requests": {"cpu": pool.cpu, "memory": pool.memory, "ephemeral-storage": pool.scratch, **devices},
        "limits": {"memory": pool.memory, **devices},
    }


# ---------------------------------------------------------------- volumes


def _volumes(pod: Pod) -> list[Json]:
    cluster, cache = pod.cluster, pod.cluster.storage.cache
    place: dict[str, Json] = {
        "claim": {"persistentVolumeClaim": {"claimName": cache.claim}},
        "host_path": {"hostPath": {"path": cache.path, "type": "DirectoryOrCreate"}},
        "empty_dir": {"emptyDir": {"sizeLimit": cache.size}},
    }
    volumes: list[Json] = [
        {"name": "recipe", "configMap": {"name": pod.config_map}},
        {"name": "tmp", "emptyDir": {"sizeLimit": pod.pool.scratch}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pod.pool.shm}},
        {"name": "cache", **place[cache.kind]},
    ]
    if isinstance(cluster.storage.credentials, WebIdentity):
        token = {
            "audience": cluster.storage.credentials.audience,
            "expirationSeconds": cluster.storage.credentials.expiration_s,
            "path": "token",
        }
        volumes.append({"name": "token", "projected": {"sources": [{"serviceAccountToken": token}]}})
    return volumes


def _mounts(pod: Pod) -> list[Json]:
    mounts: list[Json] = [
        {"name": "recipe", "mountPath": RECIPE_DIR, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "cache", "mountPath": CACHE_DIR},
    ]
    if isinstance(pod.cluster.storage.credentials, WebIdentity):
        mounts.append({"name": "token", "mountPath": TOKEN_DIR, "readOnly": True})
    return mounts


# ---------------------------------------------------------------- placement


def _tolerations(pod: Pod) -> list[Json]:
    tolerations = [one.model_dump(exclude_none=True) for one in pod.pool.tolerations]
    grace = pod.cluster.grace
    for key, seconds in (("unreachable", grace.node_unreachable_s), ("not-ready", grace.node_not_ready_s)):
        tolerations.append(
            {
                "key": f"node.kubernetes.io/{key}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": seconds,
            }
        )
    return tolerations


def _affinity(pod: Pod) -> Json | None:
    affinity: Json = {}
    if pod.run.exclude_nodes:
        match = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": sorted(pod.run.exclude_nodes)}
        terms = [{"matchExpressions": [match]}]
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    if pod.peers and pod.pool.fabric_key is not None and _topology(pod) is None:
        # The first pod matches its own term, so it can be placed; all others follow it.
        selector = {key: pod.labels[key] for key in (names.IDENTITY, names.STEP, names.ATTEMPT)}
        term = {"topologyKey": pod.pool.fabric_key, "labelSelector": {"matchLabels": selector}}
        affinity["podAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    return affinity or None


def _topology(pod: Pod) -> str | None:
    return pod.cluster.queue.topology if isinstance(pod.cluster.queue, Kueue) else None


def _annotations(pod: Pod) -> Json:
    annotations: Json = {}
    if not pod.cluster.safe_to_evict:
        annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] = "false"
        annotations["karpenter.sh/do-not-disrupt"] = "true"
    if pod.peers and pod.pool.fabric_key is not None and (level := _topology(pod)):
        annotations[f"kueue.x-k8s.io/podset-{level}-topology"] = pod.pool.fabric_key
    return {**annotations, **pod.cluster.annotations}
