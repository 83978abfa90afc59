"""The pipeline's definition: what depends on what, what kfp may not do on its own, and the committed file."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

from k8s.cluster import load_cluster
from pipelines import step_pods
from pipelines.full_recipe import COMPILED, compile_to
from trainer.recipe import STAGES

SPEC_2_14 = Path(__file__).with_name("kfp_2_14.json")
"""The specification's descriptors out of the packages that its `source` names, kfp-pipeline-spec and kfp-kubernetes."""

Json = dict[str, Any]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Json, Json]:
    """The pipeline, and what it says to Kubernetes."""
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_to(path)
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return pipeline, platform


@pytest.fixture(scope="module")
def compiled(documents: tuple[Json, Json]) -> Json:
    return documents[0]


def steps(compiled: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tasks by the name that people see."""
    inner = next(part["dag"]["tasks"] for name, part in compiled["components"].items() if "dag" in part)
    return {task["taskInfo"]["name"]: task | {"key": key} for key, task in inner.items()}


def test_the_committed_file_is_what_the_code_compiles_to(tmp_path: Path) -> None:
    compile_to(tmp_path / "one.yaml")
    compile_to(tmp_path / "two.yaml")
    assert (tmp_path / "one.yaml").read_text() == (tmp_path / "two.yaml").read_text()
    assert (tmp_path / "one.yaml").read_text() == COMPILED.read_text(), "run python pipelines/full_recipe.py"


@pytest.mark.parametrize(
    ("step", "want"),
    [
        ("init", {"prepare-data"}),
        ("prepare-stage1", {"prepare-data"}),
        ("prepare-stage3", {"prepare-stage2"}),
        ("stage1", {"prepare-stage1", "init"}),
        ("stage3", {"prepare-stage3", "stage2"}),
        ("prepare-sft-requests", {"prepare-data"}),
        ("prepare-sft-answers", {"prepare-sft-requests", "stage3"}),
        ("prepare-sft-select", {"prepare-sft-answers"}),
        ("prepare-sft", {"prepare-sft-select", "prepare-stage3"}),
        ("prepare-dpo-answers", {"prepare-dpo-requests", "sft"}),
        ("dpo", {"prepare-dpo", "sft"}),
        ("export", {"dpo"}),
        ("evaluate", {"export"}),
        ("report", {"evaluate"}),
    ],
)
def test_a_step_waits_for_what_it_reads(compiled: dict[str, Any], step: str, want: set[str]) -> None:
    found = steps(compiled)
    name_of = {task["key"]: name for name, task in found.items()}
    assert {name_of[key] for key in found[step].get("dependentTasks", [])} == want


# ---------------------------------------------------------------- old and new servers


def specification_2_14() -> dict[str, Any]:
    """Name -> message class of Kubeflow Pipelines 2.14."""
    pool = descriptor_pool.DescriptorPool()
    for known in ("duration", "struct", "any"):
        module = __import__(f"google.protobuf.{known}_pb2", fromlist=["DESCRIPTOR"])
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    from google.rpc import status_pb2

    pool.AddSerializedFile(status_pb2.DESCRIPTOR.serialized_pb)
    found = {}
    for content in json.loads(SPEC_2_14.read_text())["files"]:
        described = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(content))
        pool.AddSerializedFile(described.SerializeToString())
        for message in described.message_type:
            name = f"{described.package}.{message.name}"
            found[message.name] = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
    return found


def read_all(messages: dict[str, Any], pipeline: Json, platform: Json) -> None:
    """As a server reads it, but nothing unknown is left out in silence."""
    json_format.ParseDict(pipeline, messages["PipelineSpec"]())
    json_format.ParseDict(platform, messages["PlatformSpec"]())
    for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, messages["KubernetesExecutorConfig"]())


def test_kfp_2_14_knows_every_field(documents: tuple[Json, Json]) -> None:
    messages = specification_2_14()
    pipeline, platform = copy.deepcopy(documents[0]), copy.deepcopy(documents[1])
    read_all(messages, pipeline, platform)
    secrets = next(iter(platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()))["secretAsEnv"]
    secrets[0]["optional"] = False  # kfp's own compiler writes it; a 2.14 server refused the pipeline for it
    with pytest.raises(json_format.ParseError, match="optional"):
        read_all(messages, pipeline, platform)
    del secrets[0]["optional"]
    next(iter(pipeline["components"].values()))["taskConfigPassthroughs"] = [{"field": "RESOURCES"}]  # 2.15 has it
    with pytest.raises(json_format.ParseError, match="taskConfigPassthroughs"):
        read_all(messages, pipeline, platform)


def test_kfp_2_17_knows_every_field(documents: tuple[Json, Json]) -> None:
    from kfp.kubernetes import kubernetes_executor_config_pb2
    from kfp.pipeline_spec import pipeline_spec_pb2

    spec, executor = vars(pipeline_spec_pb2), vars(kubernetes_executor_config_pb2)
    names = ("PipelineSpec", "PlatformSpec")
    read_all(
        {**{name: spec[name] for name in names}, "KubernetesExecutorConfig": executor["KubernetesExecutorConfig"]},
        *documents,
    )


@pytest.mark.parametrize("cluster", ["eks", "onprem"])  # storage by identity, by secret; each compiles for seconds
def test_compiled_for_a_cluster_every_step_has_its_image_pool_storage_and_tracking(
    cluster: str, tmp_path: Path
) -> None:
    offered = load_cluster(cluster, ["images.pull_secrets=[registry]"])
    compile_to(tmp_path / "one.yaml", step_pods.of_cluster(offered))
    pipeline, platform = yaml.safe_load_all((tmp_path / "one.yaml").read_text())
    read_all(specification_2_14(), pipeline, platform)
    pool, storage = offered.pools[offered.cpu_pool], offered.storage
    places = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    executors = pipeline["deploymentSpec"]["executors"]
    assert places.keys() == executors.keys()
    for name, executor in executors.items():
        env = {entry["name"]: entry["value"] for entry in executor["container"]["env"]}
        assert executor["container"]["image"] == offered.images.launcher
        assert env.get("AWS_ENDPOINT_URL") == storage.endpoint
        assert (env["AWS_REGION"], env["MLFLOW_TRACKING_URI"]) == (storage.region, offered.mlflow_uri)
        assert places[name]["nodeSelector"]["labels"] == pool.labels
        assert [one["key"] for one in places[name].get("tolerations", [])] == [one.key for one in pool.tolerations]
        assert places[name]["imagePullSecret"][0]["secretName"] == "registry"
        secrets = [one["secretName"] for one in places[name].get("secretAsEnv", [])]
        assert secrets == ([storage.credentials.secret] if storage.credentials.kind == "secret" else [])
        assert places[name]["podMetadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"


def test_the_shipped_definition_takes_the_secret_that_the_chart_does(documents: tuple[Json, Json]) -> None:
    values = yaml.safe_load((COMPILED.parents[1] / "helm" / "qwenvl-train" / "values.yaml").read_text())
    places = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert places.keys() == documents[0]["deploymentSpec"]["executors"].keys()
    for place in places.values():
        (secret,) = place["secretAsEnv"]
        assert secret["secretName"] == values["storage"]["existingSecret"]


def test_the_script_compiles_for_a_cluster_into_another_file(tmp_path: Path) -> None:
    script = str(COMPILED.with_suffix(".py"))
    before = COMPILED.read_text()
    refused = subprocess.run(
        [sys.executable, script, "--cluster", "onprem"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and "needs --to" in refused.stderr
    target = str(tmp_path / "mine.yaml")
    subprocess.run([sys.executable, script, "--cluster", "onprem", "--to", target], check=True, capture_output=True)
    assert "registry.example.com/qwenvl-train/launcher@sha256" in Path(target).read_text()
    assert COMPILED.read_text() == before


def test_a_run_on_this_machine_pays_for_no_kubernetes_client() -> None:
    script = (
        "import sys; from pipelines.run import _import_kfp; _import_kfp(); import pipelines.full_recipe;"
        "print([name for name in ('kubernetes', 'kfp.client', 'kfp.kubernetes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- order, retries, clean-up


def test_plans_of_later_stages_need_no_earlier_training(compiled: dict[str, Any]) -> None:
    found = steps(compiled)
    trained = {found[stage]["key"] for stage in STAGES}
    for stage in ("stage1", "stage2", "stage3"):
        assert not trained & set(found[f"prepare-{stage}"]["dependentTasks"])


def test_no_step_is_cached_by_kfp_and_every_one_is_tried_again_when_its_pod_is_lost(compiled: dict[str, Any]) -> None:
    for name, task in steps(compiled).items():
        assert not task.get("cachingOptions", {}).get("enableCache"), name
        assert task["retryPolicy"]["maxRetryCount"] == 2, name


def test_an_exit_task_cleans_up_whatever_happens(compiled: dict[str, Any]) -> None:
    task = compiled["root"]["dag"]["tasks"]["clean-up"]
    assert task["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_the_body_of_a_step_is_one_call(compiled: dict[str, Any]) -> None:
    for name, executor in compiled["deploymentSpec"]["executors"].items():
        source = executor["container"]["command"][-1]
        assert source.count("work.") == 1, name
        assert "pip install" not in str(executor["container"]["command"]), name
