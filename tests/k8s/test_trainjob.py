"""TrainingRuntime and TrainJob: the same pods as the PyTorchJob's, field by field, and what v2 says otherwise.

What an operator adds to a pod's environment is written out here from its source, since no operator runs in these tests.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from k8s import names, pytorchjob, trainjob
from k8s.cluster import Cluster, load_cluster
from k8s.pytorchjob import Rendered
from k8s.schemas.validate import problems
from tests.k8s.golden import RUN, trainjobs
from trainer.resolve import load_recipe, shipped

Json = dict[str, Any]
ONPREM = load_cluster("onprem")
STEPS = ("stage1", "stage2", "sft", "init", "export", "evaluate")


def both(step: str, cluster: Cluster = ONPREM, recipe: str = "qwen2_5_vl_72b") -> tuple[Rendered, Rendered]:
    loaded = load_recipe(recipe)
    if step in loaded.stages.named():
        return pytorchjob.render_stage(loaded, step, cluster, RUN), trainjob.render_stage(loaded, step, cluster, RUN)
    return pytorchjob.render_program(loaded, step, cluster, RUN), trainjob.render_program(loaded, step, cluster, RUN)


def old_template(one: Rendered) -> Json:
    return copy.deepcopy(one.job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"])


def runtime_of(one: Rendered) -> Json:
    assert one.runtime is not None
    return one.runtime


def replicated(one: Rendered) -> Json:
    (found,) = runtime_of(one)["spec"]["template"]["spec"]["replicatedJobs"]
    return copy.deepcopy(found)


def new_template(one: Rendered) -> Json:
    return replicated(one)["template"]["spec"]["template"]


def variables(template: Json) -> dict[str, Any]:
    entries = template["spec"]["containers"][0]["env"]
    found = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}
    assert len(found) == len(entries), "a name is there twice"
    return found


def added_by_training_operator(one: Rendered) -> dict[str, str]:
    """training-operator v1.9.4, pkg/controller.v1/pytorch/envvar.go and elastic.go, for a worker-only elastic job."""
    spec, name = one.job["spec"], one.name
    elastic = spec["elasticPolicy"]
    return {
        "PYTHONUNBUFFERED": "1",
        "PET_NPROC_PER_NODE": spec["nprocPerNode"],
        "PET_RDZV_ENDPOINT": f"{name}-worker-0:23456",
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
        "PET_RDZV_ID": elastic["rdzvId"],
        "PET_RDZV_CONF": ",".join(f"{conf['key']}={conf['value']}" for conf in elastic["rdzvConf"]),
    }


def added_by_trainer(one: Rendered) -> dict[str, Any]:
    """Trainer v2.2.0, pkg/runtime/framework/plugins/torch/torch.go; nothing without spec.trainer."""
    trainer = one.job["spec"].get("trainer")
    if trainer is None:
        return {}
    return {
        "PET_NNODES": str(trainer["numNodes"]),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_NODE_RANK": {
            "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
        },
        "PET_MASTER_ADDR": f"{one.name}-node-0-0.{one.name}",
        "PET_MASTER_PORT": "29500",
    }


# ---------------------------------------------------------------- the same pods


@pytest.mark.parametrize("cluster", ["aks", "eks", "gke", "onprem", "test"])
@pytest.mark.parametrize("recipe", ["tiny", "qwen2_5_vl_72b"])
def test_pod_specs_are_equal_field_by_field_but_for_the_containers_name_and_the_rendezvous(
    cluster: str, recipe: str
) -> None:
    for step in STEPS:
        old, new = both(step, load_cluster(cluster, ["pools.gpu.gpu.count=8"]), recipe)
        want, found = old_template(old), new_template(new)
        assert want["spec"]["containers"][0].pop("name") == "pytorch"
        assert found["spec"]["containers"][0].pop("name") == "node"
        entries = found["spec"]["containers"][0]["env"]
        found["spec"]["containers"][0]["env"] = [one for one in entries if not one["name"].startswith("PET_")]
        assert found == want, step


@pytest.mark.parametrize("step", STEPS)
def test_a_program_sees_the_same_environment_but_for_what_the_two_operators_say_otherwise(step: str) -> None:
    old, new = both(step)
    want = variables(old_template(old)) | added_by_training_operator(old)
    found = variables(new_template(new)) | added_by_trainer(new)
    nodes = new.job["spec"]["trainer"]["numNodes"]
    differ = {name for name in want.keys() | found.keys() if want.get(name) != found.get(name)}
    assert differ == {
        "PET_RDZV_ENDPOINT",  # the same pod under the name that a JobSet gives it
        "PET_NNODES",  # "N:N" and "N" mean the same to torchrun
        *("PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),  # of static rendezvous; c10d reads none of them
    }
    assert (want["PET_NNODES"], found["PET_NNODES"]) == (f"{nodes}:{nodes}", str(nodes))
    assert found["PET_RDZV_ENDPOINT"] == f"{new.name}-node-0-0.{new.name}:29500"


def test_torchrun_reads_both_environments_as_the_same_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = pytest.importorskip("torch.distributed.run")

    def read(environment: dict[str, Any]) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                if name.startswith("PET_"):
                    patch.setenv(name, "1" if isinstance(value, dict) else value)
            config, _, _ = torchrun.config_from_args(torchrun.get_args_parser().parse_args(["program.py"]))
        names_of = (
            "min_nodes",
            "max_nodes",
            "nproc_per_node",
            "run_id",
            "rdzv_backend",
            "rdzv_configs",
            "max_restarts",
        )
        return {name: getattr(config, name) for name in names_of} | {"endpoint": config.rdzv_endpoint}

    old, new = both("stage2")
    want = read(variables(old_template(old)) | added_by_training_operator(old))
    found = read(variables(new_template(new)) | added_by_trainer(new))
    assert want.pop("endpoint").endswith("-worker-0:23456")
    assert found.pop("endpoint").endswith(f".{new.name}:29500")
    assert found == want
    # What would come out if the rendezvous were left to the Trainer.
    static = read(added_by_trainer(new))
    assert static["rdzv_backend"] == "static" != want["rdzv_backend"]


def test_both_carry_the_same_recipe_labels_owner_and_name() -> None:
    old, new = both("stage2")
    assert new.config_map == old.config_map
    assert new.name == old.name == runtime_of(new)["metadata"]["name"] == new.job["spec"]["runtimeRef"]["name"]
    for part in ("labels", "namespace"):
        assert new.job["metadata"][part] == old.job["metadata"][part]
    changed = {names.SPEC}
    marks = [
        {k: v for k, v in one["metadata"]["annotations"].items() if k not in changed} for one in (new.job, old.job)
    ]
    assert marks[0] == marks[1]


# ---------------------------------------------------------------- what v2 insists on


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("cluster", ["aks", "eks", "gke", "onprem", "test"])
def test_a_strict_server_takes_every_object_and_the_jobset_that_comes_of_it(cluster: str, name: str) -> None:
    for one in trainjobs(load_recipe(name), cluster):
        assert problems(runtime_of(one)) == []
        assert problems(one.job) == []
        template = runtime_of(one)["spec"]["template"]
        jobset = {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": one.name, **template["metadata"]},
            "spec": template["spec"],
        }
        assert problems(jobset) == []


@pytest.mark.parametrize(
    ("path", "want"),
    [
        (("runtime", "spec", "mlPolicy", "torch", "elasticPolicy"), "elasticPolicy"),
        (
            ("runtime", "spec", "template", "spec", "replicatedJobs", 0, "template", "spec", "cleanPodPolicy"),
            "cleanPod",
        ),
        (("job", "spec", "ttlSecondsAfterFinished"), "ttlSecondsAfterFinished"),
        (("job", "spec", "runPolicy"), "runPolicy"),
        (("runtime", "spec", "podGroupPolicy"), "minAvailable"),
    ],
)
def test_what_the_table_says_v2_cannot_express_is_refused_by_its_schema(path: tuple, want: str) -> None:
    one = both("stage2")[1]
    at: Any = copy.deepcopy({"runtime": one.runtime, "job": one.job})
    document = at[path[0]]
    at = document
    for key in path[1:-1]:
        at = at[key]
    at[path[-1]] = {"minAvailable": 1} if path[-1] == "podGroupPolicy" else 1
    assert any(want in problem for problem in problems(document)), problems(document)


def test_the_trainer_finds_its_container_by_label_and_names() -> None:
    job = replicated(both("stage2")[1])
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert job["replicas"] == 1
    assert job["name"] == job["template"]["spec"]["template"]["spec"]["containers"][0]["name"] == "node"


def test_nothing_restarts_by_itself_and_pods_are_found_before_they_are_ready() -> None:
    spec = runtime_of(both("stage2")[1])["spec"]["template"]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert spec["failurePolicy"] == {"maxRestarts": 0}
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    assert spec["network"]["publishNotReadyAddresses"] is True
    assert spec["ttlSecondsAfterFinished"] == ONPREM.keep_finished_s


def test_host_names_of_a_long_recipe_fit() -> None:
    _, one = both("sft", recipe="qwen2_5_vl_7b_finetune")
    assert len(f"{one.name}-node-0-127") <= 63


@pytest.mark.parametrize(
    ("queue", "policy", "annotation"),
    [
        (["queue={kind: volcano, scheduler: volcano, queue: big}"], {"volcano": {}}, "big"),
        (["queue={kind: scheduler-plugins, scheduler: g}"], {"coscheduling": {"scheduleTimeoutSeconds": 3600}}, None),
        (["queue=null"], None, None),
    ],
)  # fmt: skip
def test_gang_scheduling_is_said_in_v2s_way(queue: list[str], policy: Json | None, annotation: str | None) -> None:
    one = both("stage2", load_cluster("onprem", queue))[1]
    assert runtime_of(one)["spec"].get("podGroupPolicy") == policy
    marks = runtime_of(one)["spec"]["template"]["metadata"].get("annotations", {})
    assert marks.get("scheduling.volcano.sh/queue-name") == annotation
    assert problems(runtime_of(one)) == []


def test_kueues_queue_is_a_label_of_the_trainjob() -> None:
    one = both("stage2")[1]
    assert one.job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert "kueue.x-k8s.io/queue-name" not in runtime_of(one)["spec"]["template"]["metadata"]["labels"]
