"""Rendering: what every manifest has, what each part of the cluster file does to it, that a strict server takes it."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from k8s import names
from k8s.cluster import Cluster, load_cluster
from k8s.names import Owner, Run, job_name
from k8s.pytorchjob import Rendered, comparable, differences, render_program, render_stage, spec_sha256
from k8s.schemas import refresh
from k8s.schemas.validate import problems
from tests.k8s.golden import RUN, manifests, rendered
from trainer.command import StageCall, stage_command
from trainer.errors import ClusterError, UsageError
from trainer.recipe import Recipe
from trainer.resolve import load_recipe, resolved, shipped

ROOT = Path(__file__).parents[2]
WORKER = ("spec", "pytorchReplicaSpecs", "Worker", "template", "spec")
SCHEMAS = ROOT / "k8s" / "schemas"


def a_cluster(*overrides: str, base: str = "test") -> Cluster:
    return load_cluster(base, overrides)


def a_recipe(*overrides: str, base: str = "qwen2_5_vl_7b") -> Recipe:
    return load_recipe(base, overrides)


def a_stage(stage: str = "stage2", *overrides: str, cluster: Cluster | None = None, run: Run = RUN) -> Rendered:
    return render_stage(a_recipe(*overrides), stage, cluster or a_cluster(), run)


def worker(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return worker(job)["template"]["spec"] if "pytorchReplicaSpecs" in job["spec"] else job["spec"]["template"]["spec"]


def env(job: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in pod(job)["containers"][0]["env"]}


# ---------------------------------------------------------------- golden and schemas


def test_the_golden_manifests_are_what_the_code_renders() -> None:
    for path, content in manifests():
        assert (ROOT / path).read_text(encoding="utf-8") == content, (
            f"{path} differs: run `make generated` and read why"
        )


@pytest.mark.parametrize("cluster", ["aks", "eks", "gke", "onprem", "test"])
@pytest.mark.parametrize("name", shipped())
def test_a_strict_server_takes_every_object_of_every_recipe_on_every_cluster(cluster: str, name: str) -> None:
    for one in rendered(load_recipe(name), cluster):
        assert problems(one.job) == []
        assert problems(one.config_map) == []


@pytest.mark.parametrize(
    ("path", "value", "want"),
    [
        (("spec", "nprocPernode"), "8", "spec: Additional properties are not allowed ('nprocPernode'"),
        (("spec", "nprocPerNode"), 8, "spec.nprocPerNode: 8 is not of type 'string'"),
        (("metadata", "lables"), {}, "metadata: Additional properties are not allowed ('lables'"),
        (("spec", "runPolicy", "cleanPodPolicy", "x"), 1, "spec.runPolicy.cleanPodPolicy"),
        ((*WORKER, "volumes", 0, "configMapp"), {}, "volumes[0]"),
        (
            (*WORKER, "containers", 0, "resources", "limits", "memory"),
            "8 GB",
            "limits.memory",
        ),
    ],
)  # fmt: skip
def test_the_schemas_refuse_what_a_strict_server_refuses(path: tuple, value: object, want: str) -> None:
    job = copy.deepcopy(a_stage().job)
    at: Any = job
    for key in path[:-1]:
        if isinstance(at[key], str):
            at[key] = {}
        at = at[key]
    at[path[-1]] = value
    assert any(want in problem for problem in problems(job)), problems(job)


def test_an_object_of_an_unknown_kind_is_not_called_valid() -> None:
    assert (
        problems(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"name": "x"}]}}
        )
        == []
    )
    assert "no schema is committed" in problems({"apiVersion": "kubeflow.org/v1", "kind": "MPIJob"})[0]


def test_the_committed_schemas_have_the_version_and_digest_that_they_say() -> None:
    sources = json.loads((SCHEMAS / "sources.json").read_text())
    pins = refresh.versions()
    want = {name: pins[pin] for name, (_, pin, _) in {"kubernetes.json": refresh.OPENAPI, **refresh.CRDS}.items()}
    assert want.keys() == sources.keys() == {path.name for path in SCHEMAS.glob("*.json")} - {"sources.json"}
    for name, version in want.items():
        assert sources[name]["version"] == version
        assert sources[name]["extract_sha256"] == hashlib.sha256((SCHEMAS / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["tiny", "qwen2_5_vl_72b"])
def test_kubeflows_own_models_read_and_write_the_job_without_loss(name: str) -> None:
    from kubeflow.training import ApiClient, KubeflowOrgV1PyTorchJob

    class Response:
        def __init__(self, content: object):
            self.data = json.dumps(content)

    client = ApiClient()
    for one in rendered(load_recipe(name)):
        if one.job["kind"] == "PyTorchJob":
            model = client.deserialize(Response(one.job), KubeflowOrgV1PyTorchJob)
            assert client.sanitize_for_serialization(model) == one.job
    # The models drop what they do not know, so the comparison can fail.
    unknown = copy.deepcopy(one.job)
    unknown["spec"]["unknown"] = 1
    assert client.sanitize_for_serialization(client.deserialize(Response(unknown), KubeflowOrgV1PyTorchJob)) != unknown


# ---------------------------------------------------------------- what every job has


def test_programs_without_a_signal_handler_are_not_process_1() -> None:
    """As process 1 they would never see SIGTERM, and a removed pod would hold its node for the whole grace."""
    run, cluster = RUN, a_cluster()
    jobs = {one.job["metadata"]["labels"][names.STEP]: one.job for one in rendered(a_recipe(), "test", run)}
    shared = {step for step, job in jobs.items() if pod(job).get("shareProcessNamespace")}
    stages = set(a_recipe().stages.named())
    assert shared == jobs.keys() - stages and {"prepare-data", "init", "export"} <= shared
    assert "shareProcessNamespace" not in pod(a_stage(cluster=cluster).job)


def test_a_stage_is_a_worker_only_elastic_job_that_never_restarts_by_itself() -> None:
    spec = a_stage().job["spec"]
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]
    assert worker({"spec": spec})["replicas"] == 32
    assert worker({"spec": spec})["restartPolicy"] == "Never"
    elastic = spec["elasticPolicy"]
    assert (elastic["minReplicas"], elastic["maxReplicas"], elastic["maxRestarts"]) == (32, 32, 0)
    assert elastic["rdzvBackend"] == "c10d"
    assert {one["key"]: one["value"] for one in elastic["rdzvConf"]} == {"join_timeout": "60", "read_timeout": "60"}
    assert spec["nprocPerNode"] == "8"
    assert spec["runPolicy"] == {"backoffLimit": 0, "cleanPodPolicy": "Running", "ttlSecondsAfterFinished": 3600}
    assert "initContainers" not in pod({"spec": spec})


def test_argv_and_environment_are_those_of_the_laptop() -> None:
    job = a_stage("sft").job
    cluster = a_cluster()
    call = StageCall(
        "/etc/qwenvl-train/recipe.json",
        "sft",
        RUN.out,
        nodes=32,
        procs_per_node=8,
        shutdown_timeout_s=30,
        tracking_uri=cluster.mlflow_uri,
    )
    want = stage_command(call)
    container = pod(job)["containers"][0]
    assert container["command"] + container["args"] == want.argv
    assert want.env.items() <= env(job).items()


def test_threads_come_from_the_recipe_and_are_always_stated() -> None:
    assert env(a_stage("sft").job)["OMP_NUM_THREADS"] == "1"
    assert env(a_stage("sft", "stages.sft.compute.threads=4").job)["OMP_NUM_THREADS"] == "4"


def test_the_trainer_stops_ten_seconds_before_the_kubelet_would() -> None:
    job = a_stage(cluster=a_cluster("grace.termination_s=200")).job
    assert pod(job)["terminationGracePeriodSeconds"] == 200
    (container,) = pod(job)["containers"]
    assert container["args"][container["args"].index("--shutdown-timeout") + 1] == "190"
    assert env(job)["QWENVL_TERMINATION_LOG"] == container["terminationMessagePath"]


def test_a_pod_meets_the_restricted_level_of_pod_security() -> None:
    spec = pod(a_stage().job)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    (container,) = spec["containers"]
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert {kind for volume in spec["volumes"] for kind in volume if kind != "name"} <= {
        "configMap",
        "emptyDir",
        "projected",
        "persistentVolumeClaim",
    }


def test_only_the_rdma_profile_adds_a_capability_and_only_to_pods_with_peers() -> None:
    def added(stage: Rendered) -> object:
        return pod(stage.job)["containers"][0]["securityContext"]["capabilities"].get("add")

    rdma = a_cluster(base="onprem")
    assert added(a_stage(cluster=rdma)) == ["IPC_LOCK"]
    assert added(a_stage("stage2", "stages.stage2.compute={nodes: 1}", cluster=rdma)) is None


def test_gpus_and_rdma_devices_are_asked_for_in_requests_and_limits() -> None:
    resources = pod(a_stage(cluster=a_cluster(base="onprem")).job)["containers"][0]["resources"]
    for side in ("requests", "limits"):
        assert resources[side]["nvidia.com/gpu"] == "8"
        assert resources[side]["rdma/ib"] == "8"
        assert resources[side]["memory"] == "1600Gi"
    assert "cpu" not in resources["limits"]
    alone = a_stage("stage2", "stages.stage2.compute={nodes: 1}", cluster=a_cluster(base="onprem")).job
    assert "rdma/ib" not in pod(alone)["containers"][0]["resources"]["limits"]


def test_a_recipe_for_cpus_asks_for_no_gpu() -> None:
    job = render_stage(load_recipe("tiny"), "stage1", a_cluster(), RUN).job
    assert not any("gpu" in key for key in pod(job)["containers"][0]["resources"]["limits"])
    assert env(job)["DS_ACCELERATOR"] == "cpu"
    assert job["spec"]["nprocPerNode"] == "2"


# ---------------------------------------------------------------- what the cluster file does


def test_all_pods_of_a_stage_share_the_fabric() -> None:
    job = a_stage().job
    (term,) = pod(job)["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "qwenvl-train/fabric"
    # The first pod is only placed because it matches its own term.
    assert term["labelSelector"]["matchLabels"].items() <= worker(job)["template"]["metadata"]["labels"].items()
    assert "affinity" not in pod(a_stage("stage2", "stages.stage2.compute={nodes: 1}").job)


def test_kueues_topology_takes_the_place_of_affinity() -> None:
    job = a_stage(cluster=a_cluster("queue={kind: kueue, name: q, topology: preferred, priority_class: high}")).job
    assert "affinity" not in pod(job)
    annotations = worker(job)["template"]["metadata"]["annotations"]
    assert annotations["kueue.x-k8s.io/podset-preferred-topology"] == "qwenvl-train/fabric"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    plain = a_stage().job
    assert not any("kueue" in key for key in plain["metadata"]["labels"])


def test_a_gang_scheduler_gets_all_pods_or_none() -> None:
    job = a_stage(cluster=a_cluster("queue={kind: volcano, scheduler: volcano, queue: q}")).job
    assert job["spec"]["runPolicy"]["schedulingPolicy"] == {"minAvailable": 32, "queue": "q"}
    assert pod(job)["schedulerName"] == "volcano"


def test_excluded_nodes_are_kept_out_and_recorded() -> None:
    job = a_stage(run=Run(out="s3://x", id="r", attempt=2, exclude_nodes=("node-b", "node-a"))).job
    (term,) = pod(job)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term["matchExpressions"] == [
        {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["node-a", "node-b"]}
    ]
    assert job["metadata"]["annotations"][names.EXCLUDED] == "node-a,node-b"


def test_nodes_that_vanish_lose_their_pods_after_the_seconds_of_the_cluster_file() -> None:
    tolerations = pod(a_stage(cluster=a_cluster("grace.node_unreachable_s=7")).job)["tolerations"]
    seconds = {one["key"]: one["tolerationSeconds"] for one in tolerations if "tolerationSeconds" in one}
    assert seconds == {"node.kubernetes.io/unreachable": 7, "node.kubernetes.io/not-ready": 5}


def test_autoscalers_leave_training_alone_unless_the_cluster_file_says_otherwise() -> None:
    keys = {"cluster-autoscaler.kubernetes.io/safe-to-evict", "karpenter.sh/do-not-disrupt"}
    assert keys <= worker(a_stage().job)["template"]["metadata"]["annotations"].keys()
    evictable = worker(a_stage(cluster=a_cluster("safe_to_evict=true")).job)["template"]["metadata"]
    assert not keys & evictable.get("annotations", {}).keys()


def test_credentials_are_referred_to_and_never_written() -> None:
    assert env(a_stage().job)["AWS_SECRET_ACCESS_KEY"] == {
        "secretKeyRef": {"name": "qwenvl-train-s3", "key": "AWS_SECRET_ACCESS_KEY"}
    }
    ours, theirs = "QWENVL_ENDPOINT_KEY: {secret: judge, key: token}", "OMP_NUM_THREADS: {secret: x, key: y}"
    judge = a_cluster(f"secrets={{{ours}, {theirs}}}")
    given = env(a_stage(cluster=judge).job)
    assert given["QWENVL_ENDPOINT_KEY"] == {"secretKeyRef": {"name": "judge", "key": "token"}}
    assert given["OMP_NUM_THREADS"] == env(a_stage().job)["OMP_NUM_THREADS"], "the program's own goes first"
    ambient = env(a_stage(cluster=a_cluster("storage.credentials={kind: ambient}")).job)
    assert not any("ACCESS_KEY" in name or "TOKEN" in name for name in ambient if name.startswith("AWS"))


def test_a_web_identity_is_a_projected_token_with_its_audience() -> None:
    job = a_stage(cluster=a_cluster(base="aks")).job
    (token,) = [volume for volume in pod(job)["volumes"] if volume["name"] == "token"]
    assert token["projected"]["sources"][0]["serviceAccountToken"]["audience"] == "s3"
    assert env(job)["AWS_WEB_IDENTITY_TOKEN_FILE"] == "/var/run/secrets/qwenvl-train/token"
    assert not [volume for volume in pod(a_stage().job)["volumes"] if volume["name"] == "token"]


@pytest.mark.parametrize(
    ("cache", "want"),
    [
        ("{kind: claim, claim: c, size: 1Ti}", {"persistentVolumeClaim": {"claimName": "c"}}),
        ("{kind: host_path, path: /x, size: 1Ti}", {"hostPath": {"path": "/x", "type": "DirectoryOrCreate"}}),
        ("{kind: empty_dir, size: 1Ti}", {"emptyDir": {"sizeLimit": "1Ti"}}),
    ],
)
def test_the_node_cache_lies_where_the_cluster_file_says(cache: str, want: dict) -> None:
    job = a_stage(cluster=a_cluster(f"storage.cache={cache}")).job
    (volume,) = [volume for volume in pod(job)["volumes"] if volume["name"] == "cache"]
    assert volume == {"name": "cache", **want}


def test_every_environment_name_is_stated_once() -> None:
    job = a_stage(cluster=a_cluster("pools.gpu.env={OMP_NUM_THREADS: '64', NCCL_DEBUG: WARN}")).job
    entries = [entry["name"] for entry in pod(job)["containers"][0]["env"]]
    assert len(entries) == len(set(entries))
    assert env(job)["OMP_NUM_THREADS"] == "1"
    assert env(job)["NCCL_DEBUG"] == "WARN"


def test_the_owner_reference_is_there_when_a_pipeline_asks() -> None:
    owner = Owner("argoproj.io/v1alpha1", "Workflow", "full-recipe-x", "u-1")
    assert a_stage(run=Run(out="s3://x", id="r", owner=owner)).job["metadata"]["ownerReferences"] == [owner.reference()]
    assert "ownerReferences" not in a_stage().job["metadata"]


def test_a_pool_that_the_cluster_lacks_is_an_error_that_lists_those_it_has() -> None:
    with pytest.raises(ClusterError, match="cpu, gpu, gpu-b"):
        a_stage("stage2", "stages.stage2.compute.node_pool=h200")
    with pytest.raises(ClusterError, match="at most 8"):
        a_stage("stage2", "stages.stage2.compute={gpus_per_node: 16, nodes: 2}")


# ---------------------------------------------------------------- programs


@pytest.mark.parametrize(
    ("program", "stage", "gpus"),
    [("init", None, None), ("export", None, None), ("evaluate", None, "8"), ("generate", "sft", "8")],
)
def test_a_program_is_a_job_of_one_worker_on_the_pool_that_it_needs(
    program: str, stage: str | None, gpus: str | None
) -> None:
    job = render_program(a_recipe(), program, a_cluster(), RUN, stage=stage).job
    assert worker(job)["replicas"] == 1
    assert job["spec"]["nprocPerNode"] == "1"
    assert pod(job)["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") == gpus


def test_an_unknown_program_or_stage_is_refused() -> None:
    with pytest.raises(UsageError, match="init, generate"):
        render_program(a_recipe(), "train", a_cluster(), RUN)
    with pytest.raises(UsageError, match="stage1, stage2"):
        a_stage("stage4")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("recipe", ["a", "qwen2_5_vl_7b_finetune", "x" * 40, "a_" * 19 + "b"])
@pytest.mark.parametrize("attempt", [1, 999])
@pytest.mark.parametrize("step", ["stage1", "generate-sft"])
def test_names_are_dns_labels_and_leave_room_for_the_workers(recipe: str, attempt: int, step: str) -> None:
    name = job_name(recipe, step, Run(out="s3://x", id="r", attempt=attempt))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-worker-123") <= 63
    assert name.endswith(f"-a{attempt}")


def test_the_name_says_what_is_trained_where_and_not_who_asks() -> None:
    base = Run(out="s3://x/o", id="run-1", stage_digest="d")
    name = job_name("tiny", "sft", base)
    assert job_name("tiny", "sft", Run(out="s3://x/o/", id="run-2", stage_digest="d")) == name
    assert job_name("tiny", "sft", Run(out="s3://x/p", id="run-1", stage_digest="d")) != name
    assert job_name("tiny", "sft", Run(out="s3://x/o", id="run-1", stage_digest="e")) != name


def test_two_runs_that_mean_the_same_work_render_the_same_spec() -> None:
    one = a_stage(run=Run(out="s3://x", id="run-1", parent_run="m1")).job
    two = a_stage(run=Run(out="s3://x", id="run-2", parent_run="m2", owner=Owner("v1", "Pod", "p", "u"))).job
    assert one["metadata"]["annotations"][names.SPEC] == two["metadata"]["annotations"][names.SPEC]
    assert differences(one, two) == []
    assert comparable(one) == comparable(two) and one != two


def test_a_different_spec_under_the_same_name_is_told_by_field() -> None:
    one = a_stage(run=RUN).job
    two = a_stage("stage2", "stages.stage2.compute={nodes: 16}", run=RUN).job
    assert one["metadata"]["name"] == two["metadata"]["name"]
    assert spec_sha256(one) != spec_sha256(two)
    assert "spec.elasticPolicy.minReplicas: wanted 32, found 16" in differences(one, two)


def test_fields_that_the_server_filled_in_are_no_difference() -> None:
    found = copy.deepcopy(a_stage().job)
    found["spec"]["runPolicy"]["suspend"] = False
    pod(found)["dnsPolicy"] = "ClusterFirst"
    pod(found)["containers"][0]["ports"] = [{"name": "pytorchjob-port", "containerPort": 23456}]
    found["metadata"] |= {"uid": "u", "resourceVersion": "1"}
    assert differences(a_stage().job, found) == []


def test_the_config_map_holds_the_resolved_recipe_and_its_digest_in_the_name() -> None:
    made = a_stage()
    content = json.loads(made.config_map["data"]["recipe.json"])
    assert content == resolved(a_recipe())
    assert made.config_map["metadata"]["name"].endswith(content["sha256"][:8])
    assert made.config_map["immutable"] is True
    assert pod(made.job)["volumes"][0]["configMap"]["name"] == made.config_map["metadata"]["name"]
    again = a_stage(run=Run(out=RUN.out, id="other", stage_digest=RUN.stage_digest, attempt=3))
    assert again.config_map == made.config_map
