"""The API server's own word on what we render: strict fields, Pod Security `restricted`, the webhook, quota."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from k8s.client import ClusterError
from k8s.names import Run
from k8s.pytorchjob import Rendered, render_program, render_stage
from tests.cluster.bench import Bench
from tests.cluster.launching import api_of, recipe_on
from trainer.resolve import load_recipe

pytestmark = pytest.mark.cluster
Json = dict[str, Any]


def rendered(bench: Bench, stage: str = "sft") -> Rendered:
    return render_stage(recipe_on(stage), stage, bench.cluster, Run(out=bench.out, id="run-1", stage_digest="d"))


def asked(bench: Bench, body: Json) -> Json:
    """What the server would make of an object; with the launcher's own rights."""
    return api_of(str(bench.launcher), bench.namespace).create(body, dry_run=True)


def pod_of(job: Json) -> Json:
    template = copy.deepcopy(job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"])
    metadata = {**template["metadata"], "name": "probe", "namespace": job["metadata"]["namespace"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.mark.parametrize("stage", ["stage1", "sft", "dpo"])
def test_the_server_takes_a_stage_strictly_and_its_pod_under_restricted_pod_security(bench: Bench, stage: str) -> None:
    made = rendered(bench, stage)
    taken = asked(bench, made.job)
    assert taken["spec"]["elasticPolicy"]["maxReplicas"] == 2
    pod = asked(bench, pod_of(made.job))
    requests = pod["spec"]["containers"][0]["resources"]["requests"]
    assert requests["nvidia.com/gpu"] == "8"
    assert (requests["cpu"], requests["memory"]) == ("10m", "16Mi"), "the admission policy shrinks cpu and memory"
    assert asked(bench, made.config_map)["immutable"] is True
    assert bench.jobs() == [] and bench.items("pods") == []


def test_the_server_takes_a_program_of_one_worker(bench: Bench) -> None:
    recipe = load_recipe("tiny_smoke")
    made = render_program(recipe, "export", bench.cluster, Run(out=bench.out, id="run-1", stage_digest="d"))
    asked(bench, made.job)
    asked(bench, pod_of(made.job))


def unknown_field(job: Json) -> None:
    job["spec"]["runPolicy"]["cleanPodPolicies"] = "Running"


def unknown_field_of_the_pod(job: Json) -> None:
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"


def other_container(job: Json) -> None:
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["name"] = "trainer"


@pytest.mark.parametrize(
    ("change", "want"),
    [
        (unknown_field, 'unknown field "spec.runPolicy.cleanPodPolicies"'),
        (unknown_field_of_the_pod, "imagePulPolicy"),
        (other_container, "pytorch"),
    ],
)
def test_a_job_that_is_wrong_is_refused_with_the_field(bench: Bench, change: Any, want: str) -> None:
    job = rendered(bench).job
    asked(bench, job)  # without the change it is taken
    change(job)
    with pytest.raises(ClusterError, match=want):
        asked(bench, job)


def as_root(pod: Json) -> None:
    pod["spec"]["securityContext"]["runAsNonRoot"] = False


def with_capability(pod: Json) -> None:
    pod["spec"]["containers"][0]["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]


def with_host_path(pod: Json) -> None:
    pod["spec"]["volumes"].append({"name": "host", "hostPath": {"path": "/data"}})


def with_priority(pod: Json) -> None:
    pod["spec"]["priorityClassName"] = "no-such-class"


@pytest.mark.parametrize(
    ("change", "want"),
    [
        (as_root, "runAsNonRoot"),
        (with_capability, "IPC_LOCK"),
        (with_host_path, "hostPath"),
        (with_priority, "no-such-class"),
    ],
)
def test_a_pod_that_the_namespace_forbids_is_refused_with_the_reason(bench: Bench, change: Any, want: str) -> None:
    pod = pod_of(rendered(bench).job)
    change(pod)
    with pytest.raises(ClusterError, match=want):
        asked(bench, pod)


def test_a_quota_of_the_namespace_is_told_before_anything_is_created(bench: Bench) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "gpus"}}
    bench.apply({**quota, "spec": {"hard": {"requests.nvidia.com/gpu": "4"}}})
    bench.until("the quota's status", lambda: json.loads(bench.kubectl("get", "quota", "gpus", "-o", "json"))["status"])
    launching = bench.launch({"steps": 1}, gpus=8)
    error = launching.ended(60)
    assert error is not None and "exceeded quota: gpus" in str(error)
    assert bench.jobs() == []
