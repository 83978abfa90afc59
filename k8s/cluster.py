"""What a cluster offers, as data: one YAML file per cluster, k8s/clusters/NAME.yaml or the user's.

    Cluster
    ├── pools        NAME -> NodePool: labels, tolerations, GPUs, RDMA, what one pod of it asks for, fabric key
    ├── images       by digest
    ├── storage      S3 endpoint, where credentials come from, the node cache
    ├── queue        Kueue's queue, or a gang scheduler, or neither
    ├── accounts     service accounts that the chart installs
    ├── ray          workers of data preparation on Ray
    └── limits       how long the launcher waits for what

A recipe names a pool and how many nodes and GPUs it wants; everything else about a cluster stands here, never in code.
`load_cluster` reads and validates, all problems at once; `check` compares a recipe with a cluster before anything is
rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from trainer.errors import ClusterError
from trainer.problems import validated
from trainer.recipe import Recipe
from trainer.resolve import apply_override, parse_yaml, text_at

NO_DIGEST = "sha256:" + "0" * 64
"""What the example files have in place of a digest: renders, but the launcher refuses to create it."""

_UNITS = {
    "": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
}  # fmt: skip

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
LabelKey = Annotated[
    str,
    StringConstraints(
        pattern=r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
    ),
]
LabelValue = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
ImageRef = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.:/_-]*@sha256:[0-9a-f]{64}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


# ---------------------------------------------------------------- nodes


class Toleration(Strict):
    key: LabelKey
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _value_fits(self) -> Toleration:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("operator Equal needs a value, Exists has none")
        return self


class Device(Strict):
    """An extended resource of a node."""

    resource: LabelKey
    """For example nvidia.com/gpu, rdma/ib, vpc.amazonaws.com/efa."""
    count: int = Field(ge=1)
    """Of one node."""
    kind: str = "not stated"
    """For people and for the capacity planner, for example H100-80GB."""


class NodePool(Strict):
    """Nodes of one kind. A training pod has a node of its pool to itself: it asks for the pool's cpu and memory."""

    labels: dict[LabelKey, LabelValue]
    """Node selector."""
    tolerations: list[Toleration] = Field(default_factory=list)
    gpu: Device | None = None
    rdma: Device | None = None
    """Asked for by stages of more than one node."""
    cpu: Quantity
    memory: Quantity
    """Limit of one pod; /dev/shm counts against it."""
    shm: Quantity
    """Size of /dev/shm."""
    scratch: Quantity
    """Disk under /tmp of one pod."""
    fabric_key: LabelKey | None = None
    """Node label whose value all pods of a stage must share (rack, block, zone): the reach of the fast network."""
    profile: Literal["restricted", "rdma"] = "restricted"
    """rdma adds the capability IPC_LOCK, which Pod Security's level restricted refuses."""
    env: dict[EnvName, str] = Field(default_factory=dict)
    """For example NCCL settings."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> NodePool:
        if quantity(self.shm) >= quantity(self.memory):
            raise ValueError(f"shm {self.shm} does not fit into memory {self.memory}")
        return self


class Grace(Strict):
    """Seconds."""

    termination_s: int = Field(default=300, ge=30)
    """From SIGTERM to SIGKILL: a checkpoint must fit. The trainer itself gets 10 s less."""
    node_unreachable_s: int = Field(default=60, ge=0)
    """How long a pod stays bound to a node that does not answer."""
    node_not_ready_s: int = Field(default=60, ge=0)


# ---------------------------------------------------------------- storage


class SecretCredentials(Strict):
    kind: Literal["secret"]
    secret: Name
    """An existing secret with the keys below."""
    access_key: str = "AWS_ACCESS_KEY_ID"
    secret_key: str = "AWS_SECRET_ACCESS_KEY"


class WebIdentity(Strict):
    """A projected service account token, exchanged for credentials at an STS endpoint."""

    kind: Literal["web_identity"]
    role_arn: str
    audience: str
    expiration_s: int = Field(default=3600, ge=600)


class Ambient(Strict):
    """Nothing to mount: IRSA, EKS pod identity, GKE workload identity or the node's role gives them."""

    kind: Literal["ambient"]


class NodeCache(Strict):
    """The digest-keyed folder for shards, base weights and checkpoint objects; outlives pods, always a hint."""

    kind: Literal["claim", "host_path", "empty_dir"]
    claim: Name | None = None
    path: str | None = Field(default=None, pattern=r"^/[^:]*$")
    """A folder of the node, host_path only: Pod Security's levels baseline and restricted refuse it."""
    size: Quantity
    """What the cache may grow to on one node; plans that need more are refused."""

    @model_validator(mode="after")
    def _place_given(self) -> NodeCache:
        want = {"claim": "claim", "host_path": "path", "empty_dir": None}[self.kind]
        for name in ("claim", "path"):
            if (getattr(self, name) is not None) != (name == want):
                raise ValueError(f"kind {self.kind} {'needs' if name == want else 'has no'} {name}")
        return self


class Storage(Strict):
    endpoint: str | None = Field(default=None, pattern=r"^https?://[^/]+$")
    """S3 endpoint; default: AWS."""
    region: str = "us-east-1"
    credentials: SecretCredentials | WebIdentity | Ambient = Field(discriminator="kind")
    checksums: Literal["when_supported", "when_required"] = "when_required"
    """Some servers refuse the checksums that clients add by default."""
    cache: NodeCache


class SecretEntry(Strict):
    """One entry of an existing secret in the cluster file's namespace."""

    secret: Name
    key: str = Field(min_length=1)


# ---------------------------------------------------------------- scheduling


class Kueue(Strict):
    kind: Literal["kueue"]
    name: Name
    """LocalQueue."""
    priority_class: Name | None = None
    """WorkloadPriorityClass."""
    topology: Literal["required", "preferred"] | None = None
    """Kueue places all pods of a stage by the pool's fabric key, instead of pod affinity."""


class Gang(Strict):
    """All pods of a stage or none, by a scheduler that knows pod groups; the training operator runs with
    --gang-scheduler-name of the same name."""

    kind: Literal["volcano", "scheduler-plugins"]
    scheduler: Name
    queue: Name | None = None


class Accounts(Strict):
    trainer: Name = "qwenvl-train-trainer"
    launcher: Name = "qwenvl-train-launcher"


class Images(Strict):
    """By digest: a tag can come to mean other bytes between two attempts."""

    trainer: ImageRef
    launcher: ImageRef
    prepare: ImageRef
    pull_secrets: list[Name] = Field(default_factory=list)


class Priorities(Strict):
    """PriorityClass names; None is the cluster's default."""

    train: Name | None = None
    prepare: Name | None = None


class Ray(Strict):
    """Data preparation with prepare.engine ray runs as a RayJob: KubeRay's operator must be installed, and the launcher
    needs the right to create them (the chart's rbac.kinds)."""

    workers: int = Field(default=4, ge=1)
    """Pods beside the head; each asks for what a pod of `cpu_pool` does."""


class Limits(Strict):
    """What the launcher waits for, in seconds, and how often it tries."""

    queue_s: int = Field(default=7 * 86400, ge=1)
    """Suspended: waiting for quota."""
    schedule_s: int = Field(default=3600, ge=1)
    """Admitted, but some pod has no node."""
    start_s: int = Field(default=1800, ge=1)
    """Bound, but some container is not running: volumes, image pull. Rendezvous waits as long."""
    silence_s: int = Field(default=900, ge=1)
    """Running without a heartbeat of some node. Ranks that stand still have the limit of their phase."""
    server_s: int = Field(default=3600, ge=1)
    """Without an answer of the API server, while a job goes on without it."""
    storage_s: int = Field(default=1800, ge=1)
    """Without an answer of storage, before an attempt begins and after one has ended."""
    deadline_s: int = Field(default=30 * 86400, ge=1)
    """All attempts together."""
    attempts: int = Field(default=20, ge=1, le=999)
    """Counted attempts; preemptions are not counted."""
    without_progress: int = Field(default=3, ge=1)
    """Attempts in a row that committed nothing."""
    preemptions_without_progress: int = Field(default=10, ge=1)
    """Preemptions in a row that committed nothing in between."""
    backoff_s: int = Field(default=30, ge=0)
    """Before the second attempt, doubled each time up to `backoff_max_s`."""
    backoff_max_s: int = Field(default=900, ge=0)


class Cluster(Strict):
    format: Literal[1] = 1
    name: Name
    namespace: Name
    pools: dict[Name, NodePool] = Field(min_length=1)
    cpu_pool: Name = "cpu"
    """Where data preparation, export and the launcher run."""
    images: Images
    storage: Storage
    queue: Kueue | Gang | None = Field(default=None, discriminator="kind")
    priorities: Priorities = Field(default_factory=Priorities)
    accounts: Accounts = Field(default_factory=Accounts)
    grace: Grace = Field(default_factory=Grace)
    tracking_uri: str | None = Field(default=None, pattern=r"^https?://")
    """MLflow server; default: the chart's, in `namespace`."""
    keep_finished_s: int = Field(default=86400, ge=60)
    """How long a finished job stays readable."""
    safe_to_evict: bool = False
    """False asks cluster-autoscaler and Karpenter to leave training pods alone."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Added to every object and pod."""
    annotations: dict[LabelKey, str] = Field(default_factory=dict)
    """Added to every pod, for example sidecar.istio.io/inject: "false"."""
    secrets: dict[EnvName, SecretEntry] = Field(default_factory=dict)
    """Environment variables of every pod of a stage or of data preparation, from secrets: the key of a judge's endpoint
    (QWENVL_ENDPOINT_KEY), of MLflow (MLFLOW_TRACKING_TOKEN), of a hub (HF_TOKEN)."""
    job_kind: Literal["PyTorchJob", "TrainJob"] = "PyTorchJob"
    """What stages and programs of the trainer image run as. TrainJob needs Kubeflow Trainer v2 in the cluster and the
    right to create them (the chart's rbac.kinds)."""
    ray: Ray | None = None
    """None: data preparation is one pod, also with prepare.engine ray (Daft then starts a Ray inside of it)."""
    limits: Limits = Field(default_factory=Limits)

    @model_validator(mode="after")
    def _names_fit(self) -> Cluster:
        problems = []
        if self.cpu_pool not in self.pools:
            problems.append(f"cpu_pool: no pool {self.cpu_pool!r}; pools has {sorted(self.pools)}")
        topology = self.queue.topology if isinstance(self.queue, Kueue) else None
        for name, pool in self.pools.items():
            if topology and pool.gpu and pool.fabric_key is None:
                problems.append(f"pools.{name}.fabric_key: queue.topology {topology} needs one")
            for variable in sorted(self.secrets.keys() & pool.env.keys()):
                problems.append(f"secrets.{variable}: pools.{name}.env has it too; keep one of them")
        for variable in self.secrets:
            if variable.startswith("AWS_"):
                problems.append(f"secrets.{variable}: storage.credentials gives what begins with AWS_")
        if self.grace.termination_s <= 10 + 20:
            problems.append("grace.termination_s: leaves the trainer less than 20 s to save")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def mlflow_uri(self) -> str:
        return self.tracking_uri or f"http://qwenvl-train-mlflow.{self.namespace}.svc:5000"


# ---------------------------------------------------------------- reading


def quantity(text: str) -> float:
    """A Kubernetes quantity in its base unit: "2Gi" -> 2147483648, "500m" -> 0.5."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"not a quantity: {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def shipped() -> list[str]:
    """Names of the example clusters that come with the package."""
    folder = resources.files("k8s") / "clusters"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_cluster(ref: str, overrides: Iterable[str] = ()) -> Cluster:
    """Read, override and validate a cluster file.

    Args:
        ref: name of a shipped example, path, URI, or YAML text.
        overrides: `a.b=value` strings, for example images.trainer=REPOSITORY@sha256:...

    Raises:
        RecipeError: with every problem at once, by field path.
        UsageError: when there is no such file.
    """
    if "\n" in ref:
        text, where = ref, "inline YAML"
    elif ref in shipped():
        text, where = (resources.files("k8s") / "clusters" / f"{ref}.yaml").read_text(encoding="utf-8"), ref
    else:
        text, where = text_at(ref, what="cluster file", names=shipped()), ref
    content = parse_yaml(text, where=where, subject="the cluster file")
    for override in overrides:
        apply_override(content, override)
    return validate(content, where=where)


def validate(content: Mapping[str, Any], *, where: str) -> Cluster:
    return validated(Cluster, content, where=where, subject="the cluster file")


# ---------------------------------------------------------------- does the recipe fit


def pool_of(cluster: Cluster, name: str) -> NodePool:
    """The pool of that name.

    Raises:
        ClusterError: when the cluster has none.
    """
    if name not in cluster.pools:
        raise ClusterError(
            "the cluster has no such node pool",
            where=f"cluster {cluster.name}",
            expected=f"one of {', '.join(sorted(cluster.pools))}",
            got=name,
            do="--set stages.STAGE.compute.node_pool=NAME, or add the pool to the cluster file",
        )
    return cluster.pools[name]


def check(recipe: Recipe, cluster: Cluster) -> list[str]:
    """Everything about `recipe` that this cluster cannot give, by field path; empty when it fits."""
    problems = []
    for name, stage in recipe.stages.named().items():
        at, compute = f"stages.{name}.compute", stage.compute
        pool = cluster.pools.get(compute.node_pool)
        if pool is None:
            pools = ", ".join(sorted(cluster.pools))
            problems.append(f"{at}.node_pool: cluster {cluster.name} has no pool {compute.node_pool!r}, but {pools}")
        elif pool.gpu is not None and compute.gpus_per_node > pool.gpu.count:
            problems.append(
                f"{at}.gpus_per_node: {compute.gpus_per_node}, but a node of pool {compute.node_pool} "
                f"has {pool.gpu.count} {pool.gpu.resource}"
            )
        elif pool.gpu is None and compute.gpus_per_node * compute.threads > quantity(pool.cpu):
            problems.append(
                f"{at}: {compute.gpus_per_node} processes of {compute.threads} threads, but a pod of pool "
                f"{compute.node_pool} has {pool.cpu} CPUs and no GPU"
            )
    return problems


def example_images(cluster: Cluster) -> list[str]:
    """Images that still have the example files' digest and cannot be pulled."""
    return [name for name in ("trainer", "launcher", "prepare") if getattr(cluster.images, name).endswith(NO_DIGEST)]
