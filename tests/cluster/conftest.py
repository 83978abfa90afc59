"""The cluster of the tests: the one that KUBECONFIG names, else the project's own, brought up for the session.

A test asks for `bench`: a namespace of its own with what the chart installs, an output in S3 and a launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from k8s.cluster import Cluster, load_cluster
from k8s.tools import tool
from tests.cluster import images, lifecycle, place
from tests.cluster.bench import SECRET, Bench, chart
from tests.cluster.processes import enter
from tests.state.weed import BUCKET, s3_server
from trainer.errors import UsageError

QUOTA = "gpus"
STORAGE_NAMESPACE = "qwenvl-test-storage"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Reached:
    """A cluster that answers."""

    kubeconfig: Path
    image: str
    """Reference by digest of the image that pods run."""
    own: bool
    """Brought up by the tests: its nodes and programs may be disturbed."""


@pytest.fixture(scope="session")
def reached() -> Iterator[Reached]:
    """KUBECONFIG's cluster, with TEST_IMAGE for its pods; without it our own, kept when it was up before."""
    if named := os.environ.get("KUBECONFIG"):
        image = os.environ.get("TEST_IMAGE", "")
        if "@sha256:" not in image:
            raise UsageError(
                "KUBECONFIG names a cluster, but no image for its pods",
                where="TEST_IMAGE",
                expected="REPOSITORY@sha256:..., a trainer image with tests/cluster/payload.py in its PYTHONPATH",
            )
        yield Reached(Path(named), image, own=False)
        return
    before = lifecycle.current()
    digest = lifecycle.renew_image() if before else lifecycle.up().image
    enter()
    try:
        yield Reached(place.KUBECONFIG, f"{images.REPOSITORIES['trainer']}@{digest}", own=True)
    finally:
        if before is None:
            lifecycle.down()


@pytest.fixture(scope="session")
def s3(reached: Reached, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SeaweedFS in the cluster's network; its address as pods see it. This process's environment has the address that
    the launcher and the test use. TEST_S3_ENDPOINT and AWS_* name another one."""
    if not reached.own:
        endpoint = os.environ.get("TEST_S3_ENDPOINT")
        if endpoint is None:
            raise UsageError("KUBECONFIG names a cluster, but no S3 server for its pods", where="TEST_S3_ENDPOINT")
        yield endpoint
        return
    with s3_server(tmp_path_factory.mktemp("weed"), host=place.GATEWAY) as env:
        port = int(env["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])
        _admin(reached, "apply", "-f", "-", text="\n---\n".join(map(json.dumps, _storage_service(port))))
        yield f"http://s3.{STORAGE_NAMESPACE}.svc:{port}"


def _storage_service(port: int) -> list[dict[str, Any]]:
    """A name for a server beside the cluster: headless, so that no proxy is needed."""
    metadata = {"name": "s3", "namespace": STORAGE_NAMESPACE}
    ports = [{"name": "s3", "port": port}]
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": STORAGE_NAMESPACE}},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"clusterIP": "None", "ports": ports}},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**metadata, "labels": {"kubernetes.io/service-name": "s3"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [place.GATEWAY], "conditions": {"ready": True}}],
            "ports": ports,
        },
    ]


def _admin(reached: Reached, *arguments: str, text: str | None = None) -> str:
    command = [str(tool("kubectl")), "--kubeconfig", str(reached.kubeconfig), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def bench(reached: Reached, s3: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """Gone after the test: the namespace with all that is in it."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    namespace = f"t-{words[:36].strip('-')}-{os.urandom(2).hex()}"
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    metadata = {"name": namespace, "labels": labels}
    made: list[dict[str, Any]] = [{"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}]
    keys = {key: os.environ[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    inside = {"namespace": namespace}
    made.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET, **inside}, "stringData": keys})
    queue = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": "train", **inside}}
    made += [{**queue, "spec": {"clusterQueue": QUOTA}}, *chart(namespace)]
    _admin(reached, "apply", "-f", "-", text="\n---\n".join(map(json.dumps, made)))
    cluster = cluster_of(reached, namespace, s3)
    launcher = launcher_credentials(reached, cluster, tmp_path / "launcher.kubeconfig")
    try:
        yield Bench(namespace, cluster, f"s3://{BUCKET}/{namespace}", reached.kubeconfig, launcher)
    finally:
        _admin(reached, "delete", "namespace", namespace, "--wait=false")
        _gone(reached, namespace)


def cluster_of(reached: Reached, namespace: str, endpoint: str) -> Cluster:
    """k8s/clusters/test.yaml, or TEST_CLUSTER's file, for one namespace."""
    images_of = [f"images.{name}={reached.image}" for name in ("trainer", "launcher", "prepare")]
    overrides = [f"namespace={namespace}", f"storage.endpoint={endpoint}", *images_of]
    return load_cluster(os.environ.get("TEST_CLUSTER", "test"), overrides)


def launcher_credentials(reached: Reached, cluster: Cluster, path: Path) -> Path:
    """A kubeconfig with the token of the launcher's service account: it can do what the chart's Role grants."""
    account = cluster.accounts.launcher
    token = _admin(reached, "create", "token", account, "-n", cluster.namespace, "--duration", "2h").strip()
    content = json.loads(_admin(reached, "config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
    content["users"][0]["user"] = {"token": token}
    path.write_text(json.dumps(content))
    return path


def _gone(reached: Reached, namespace: str, limit_s: float = 60.0) -> None:
    """No pod outlives its test: the next one would share the machine with it."""
    end = time.monotonic() + limit_s
    while _admin(reached, "get", "pods", "-n", namespace, "-o", "name"):
        with contextlib.suppress(AssertionError):
            _admin(reached, "delete", "pods", "--all", "-n", namespace, "--grace-period=1", "--wait=false")
        assert time.monotonic() < end, f"pods of {namespace} do not end"
        time.sleep(0.3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts and stops come first: later the session's cluster is up."""
    items.sort(key=lambda item: item.path.name != "test_lifecycle.py" if item.path.parent == HERE else True)
