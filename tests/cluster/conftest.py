"""The cluster of the tests: the one that KUBECONFIG names, else the project's own, brought up for the session.

A test asks for `bench`: a namespace of its own with what the chart installs, an output in S3 and a launcher.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
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
from tests.cluster import images, lifecycle, place, services, sharing
from tests.cluster.bench import PATIENCE, SECRET, Bench, chart, create, nothing_left, token_of
from tests.cluster.processes import enter
from tests.state.weed import BUCKET
from trainer.errors import UsageError

CONTROLS = "TEST_CONTROLS"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Reached:
    """A cluster that answers."""

    kubeconfig: Path
    image: str
    """Reference by digest of the image that pods run."""
    own: bool
    """Brought up by the tests: its nodes and programs may be disturbed."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: disturbs nodes or programs of the cluster; no other test runs meanwhile")
    config.addinivalue_line("markers", "unshielded: goes on while a test that is alone disturbs the control plane")
    config.addinivalue_line("markers", "control: the fault where it must lead elsewhere; make test-cluster takes some")
    config.addinivalue_line("markers", "full: takes long; only make test-cluster-full (TEST_CONTROLS=all) runs it")
    if not hasattr(config, "workerinput"):
        sharing.begin()
        os.environ.setdefault(CONTROLS, _today())


def _today() -> str:
    return time.strftime("%Y%m%d", time.gmtime())


def pytest_report_header() -> str:
    return f"cluster tests: {CONTROLS}={os.environ.get(CONTROLS)} (all, none, or a seed for half of the controls)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Starts and stops come first: later the session's cluster is up. Then what takes longest, the short ones of
    admission between (a process begins with two tests, one after the other); at the end those that need the cluster
    alone. Of the controls, those that the seed chooses; what takes long where all of them run."""
    ours = [item for item in items if item.path.parent == HERE]
    left = [item for item in ours if not _chosen(item)]
    if left:
        config.hook.pytest_deselected(items=left)
    rank = {item: _rank(item) for item in ours}
    kept = [item for item in items if item not in left]
    items[:] = sorted(kept, key=lambda item: rank.get(item, 0))


def _chosen(item: pytest.Item) -> bool:
    seed = os.environ.get(CONTROLS) or _today()  # not set where pytest was not started on this folder
    if item.get_closest_marker("full"):
        return seed == "all"
    if not item.get_closest_marker("control"):
        return True
    if seed in ("all", "none"):
        return seed == "all"
    return hashlib.sha256(f"{seed} {item.nodeid}".encode()).digest()[0] % 2 == 0


def _rank(item: pytest.Item) -> int:
    order = ["test_lifecycle.py", "test_chain.py", "test_admission.py", "test_ray.py", "test_storage.py"]
    if item.path.name in order:
        return order.index(item.path.name)
    return len(order) + (item.get_closest_marker("alone") is not None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In the process that started the session, after all others."""
    if not hasattr(session.config, "workerinput") and not os.environ.get("KUBECONFIG") and sharing.to_remove():
        lifecycle.down()


@pytest.fixture(scope="session")
def reached() -> Reached:
    """KUBECONFIG's cluster, with TEST_IMAGE for its pods; without it our own, kept when it was up before."""
    if named := os.environ.get("KUBECONFIG"):
        image = os.environ.get("TEST_IMAGE", "")
        if "@sha256:" not in image:
            raise UsageError(
                "KUBECONFIG names a cluster, but no image for its pods",
                where="TEST_IMAGE",
                expected="REPOSITORY@sha256:..., a trainer image with tests/cluster/payload.py in its PYTHONPATH",
            )
        return Reached(Path(named), image, own=False)
    digest = sharing.shared(_start).image
    enter()
    services.use_s3()
    return Reached(place.KUBECONFIG, f"{images.REPOSITORIES['trainer']}@{digest}", own=True)


def _start(session: str) -> sharing.Shared:
    kept = lifecycle.current() is not None
    digest = lifecycle.renew_image() if kept else lifecycle.up().image
    services.start_s3()
    return sharing.Shared(session, digest, kept)


@pytest.fixture(scope="session")
def s3(reached: Reached) -> str:
    """SeaweedFS in the cluster's network; its address as pods see it. This process's environment has the address that
    the launcher and the test use. TEST_S3_ENDPOINT and AWS_* name another one."""
    if reached.own:
        return services.address(services.S3, services.S3_PORT)
    endpoint = os.environ.get("TEST_S3_ENDPOINT")
    if endpoint is None:
        raise UsageError("KUBECONFIG names a cluster, but no S3 server for its pods", where="TEST_S3_ENDPOINT")
    return endpoint


@pytest.fixture
def bench(reached: Reached, s3: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """Gone after the test: the namespace with all that is in it. What a run leaves has to go before that."""
    if request.node.get_closest_marker("unshielded"):
        shield = contextlib.nullcontext()
    else:
        shield = sharing.using(alone=request.node.get_closest_marker("alone") is not None)
    with shield:
        made = _made(reached, s3, request.node.name, tmp_path)
        before = made.objects()
        try:
            yield made
            nothing_left(made, before)
        finally:
            made.core.delete_namespace(made.namespace)
            made.end_pods()


def _made(reached: Reached, s3: str, test: str, folder: Path) -> Bench:
    words = re.sub(r"[^a-z0-9]+", "-", test.lower()).strip("-")
    namespace = f"t-{words[:36].strip('-')}-{os.urandom(2).hex()}"
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    metadata = {"name": namespace, "labels": labels}
    keys = {key: os.environ[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    inside = {"namespace": namespace}
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET, **inside}, "stringData": keys},
        *chart(namespace),
    ]
    create(str(reached.kubeconfig), objects)
    cluster = cluster_of(reached, namespace, s3)
    launcher = launcher_credentials(reached, cluster, folder / "launcher.kubeconfig")
    return Bench(namespace, cluster, f"s3://{BUCKET}/{namespace}", reached.kubeconfig, launcher)


def cluster_of(reached: Reached, namespace: str, endpoint: str) -> Cluster:
    """k8s/clusters/test.yaml, or TEST_CLUSTER's file, for one namespace."""
    images_of = [f"images.{name}={reached.image}" for name in ("trainer", "launcher", "prepare")]
    overrides = [f"namespace={namespace}", f"storage.endpoint={endpoint}", *images_of]
    cluster = load_cluster(os.environ.get("TEST_CLUSTER", "test"), overrides)
    limits = {name: int(getattr(cluster.limits, name) * PATIENCE) for name in ("schedule_s", "start_s", "silence_s")}
    return cluster.model_copy(update={"limits": cluster.limits.model_copy(update=limits)})


def launcher_credentials(reached: Reached, cluster: Cluster, path: Path) -> Path:
    """A kubeconfig with the token of the launcher's service account: it can do what the chart's Role grants."""
    token = token_of(str(reached.kubeconfig), cluster.namespace, cluster.accounts.launcher)
    content = json.loads(_flat(reached.kubeconfig))
    content["users"][0]["user"] = {"token": token}
    path.write_text(json.dumps(content))
    return path


@functools.cache
def _flat(kubeconfig: Path) -> str:
    """With everything that it names inside."""
    command = [tool("kubectl"), "--kubeconfig", kubeconfig, "config", "view", "--raw", "--minify", "--flatten"]
    return subprocess.run([*command, "-o", "json"], capture_output=True, text=True, check=True, timeout=120).stdout
