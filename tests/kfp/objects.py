"""What Kubeflow Pipelines needs of a cluster's API: kinds, accounts, rights, settings, names of its servers.

The servers run beside the API server, as those of tests/cluster do; a Service without selector and an EndpointSlice
give each its name in the cluster's DNS.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import yaml

from k8s.tools import tool
from tests.cluster.bench import CHART, SECRET
from tests.cluster.place import GATEWAY
from tests.cluster.programs import Programs

Json = dict[str, Any]

NAMESPACE, JOBS = "kubeflow", "qwenvl"
"""Of the steps' pods, and of the jobs: k8s/clusters/test.yaml's."""
STEPS_ACCOUNT = "pipeline-runner"
ACCESS, SECRET_KEY = "test", "testtest"
"""Of the S3 server, which carries Kubeflow Pipelines' artifacts and the runs' outputs."""
S3_PORT, METADATA_PORT = 9000, 8080
API_PORT, API_GRPC_PORT = 8888, 8887
S3_HOST = f"minio-service.{NAMESPACE}.svc"
WORKFLOW_CONFIG = "workflow-controller-configmap"
ARTIFACT_SECRET = "mlpipeline-minio-artifact"


def kinds(programs: Programs) -> str:
    """Argo's and Kubeflow Pipelines' kinds, as YAML."""
    files = sorted((programs.folder / "manifests").glob("argoproj.io_*.yaml"))
    files.append(programs.folder / "manifests" / "scheduled-workflow-crd.yaml")
    return "\n---\n".join(file.read_text() for file in files)


def backend(programs: Programs) -> list[Json]:
    """In NAMESPACE."""
    role = yaml.safe_load(programs.manifests("pipeline-runner-role"))
    role["metadata"]["namespace"] = NAMESPACE
    rbac = "rbac.authorization.k8s.io/v1"
    results = [{"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}]
    keys = {"accesskey": ACCESS, "secretkey": SECRET_KEY}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _named(STEPS_ACCOUNT)},
        role,
        {
            "apiVersion": rbac,
            "kind": "Role",
            "metadata": _named("executor"),
            "rules": results,
        },
        *[_bound(name) for name in (role["metadata"]["name"], "executor")],
        {"apiVersion": "v1", "kind": "Secret", "metadata": _named(ARTIFACT_SECRET), "stringData": keys},
        storage_secret(NAMESPACE),
        _config_map("kfp-launcher", {"defaultPipelineRoot": ""}),
        # Without it the launcher takes the variable's name for the host, and ends of a nil pointer.
        _config_map(
            "metadata-grpc-configmap",
            {
                "METADATA_GRPC_SERVICE_HOST": f"metadata-grpc-service.{NAMESPACE}",
                "METADATA_GRPC_SERVICE_PORT": str(METADATA_PORT),
            },
        ),
        _config_map(WORKFLOW_CONFIG, _workflow_settings()),
        *service("ml-pipeline", NAMESPACE, {"http": API_PORT, "grpc": API_GRPC_PORT}),
        *service("minio-service", NAMESPACE, {"http": S3_PORT}),
        *service("metadata-grpc-service", NAMESPACE, {"grpc-api": METADATA_PORT}),
    ]


def for_jobs() -> list[Json]:
    """In JOBS: what the chart installs, with the launcher's rights for the account of the steps."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": JOBS, "labels": labels}},
        storage_secret(JOBS),
        *_chart(),
    ]


def _chart() -> list[Json]:
    command = [str(tool("helm")), "template", "qwenvl", str(CHART), "--namespace", JOBS]
    command += ["--set", f"rbac.alsoFor={{{NAMESPACE}/{STEPS_ACCOUNT}}}"]
    command += [word for name in ("rbac", "serviceaccounts") for word in ("--show-only", f"templates/{name}.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def storage_secret(namespace: str) -> Json:
    keys = {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    metadata = {"name": SECRET, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": keys}


def service(name: str, namespace: str, ports: dict[str, int]) -> list[Json]:
    """A name for a server beside the cluster: headless, so that no proxy is needed."""
    metadata = {"name": name, "namespace": namespace}
    listed = [{"name": port, "port": number} for port, number in ports.items()]
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"clusterIP": "None", "ports": listed}},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [GATEWAY], "conditions": {"ready": True}}],
            "ports": listed,
        },
    ]


def _workflow_settings() -> dict[str, str]:
    def key(name: str) -> Json:
        return {"name": ARTIFACT_SECRET, "key": name}

    repository = {
        "archiveLogs": True,
        "s3": {
            "endpoint": f"{S3_HOST}:{S3_PORT}",
            "bucket": "mlpipeline",
            "keyFormat": "artifacts/{{workflow.name}}/{{pod.name}}",
            "insecure": True,
            "accessKeySecret": key("accesskey"),
            "secretKeySecret": key("secretkey"),
        },
    }
    return {"artifactRepository": json.dumps(repository), "executor": json.dumps({"imagePullPolicy": "IfNotPresent"})}


def _bound(role: str) -> Json:
    group = "rbac.authorization.k8s.io"
    return {
        "apiVersion": f"{group}/v1",
        "kind": "RoleBinding",
        "metadata": _named(role),
        "roleRef": {"apiGroup": group, "kind": "Role", "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": STEPS_ACCOUNT, "namespace": NAMESPACE}],
    }


def _config_map(name: str, data: dict[str, str]) -> Json:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _named(name), "data": data}


def _named(name: str) -> Json:
    return {"name": name, "namespace": NAMESPACE}
