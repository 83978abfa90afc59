"""Kubeflow Pipelines on the test cluster: up, and whether it is there; what takes the cluster down takes it as well.

    MariaDB, ML Metadata, S3            beside the API server, as programs of the cluster (tests/cluster/processes.py)
    API server, persistence agent       Kubeflow Pipelines'
    workflow-controller                 Argo's
    driver, launcher, argoexec          images of the nodes: they run in the pods of a run

Node gpu-b-0 is the one without a taint: drivers are pods that tolerate none.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from k8s.cluster import Cluster, load_cluster
from tests.cluster import control, lifecycle, nodes
from tests.cluster.images import REPOSITORIES, Image, add_file, add_folder, add_skeleton, archive
from tests.cluster.place import DNS_SERVICE, GATEWAY, GPU, KUBECONFIG, NODES, RUN
from tests.cluster.processes import inside, run, spawn, wait_for
from tests.cluster.programs import Programs
from tests.kfp import objects, programs
from tests.kfp.objects import ACCESS, API_PORT, METADATA_PORT, NAMESPACE, S3_HOST, S3_PORT, SECRET_KEY
from trainer.errors import UsageError

HOME = RUN / "kfp"
UP = HOME / "up.json"
ENDPOINT = f"http://{GATEWAY}:{API_PORT}"
CPU_NODE = next(node for node in NODES if node.pool == "gpu-b")
VERSION = "2.14.3"
BACKEND_IMAGE, EXECUTOR_IMAGE = f"test.example/kfp:{VERSION}", "test.example/argoexec:3.7.14"
PROGRAMS = "/opt/kfp"
"""Where the images have them."""
MINE = Path(__file__).parent
BUCKET = "runs"
RANKS = "ranks"
"""The pool of the stages: nodes apart from those of the steps, whose pretended GPUs nobody asks for."""


@dataclass(frozen=True)
class Running:
    """A backend that answers."""

    cluster: Cluster
    storage: dict[str, str]
    """Environment that makes trainer/storage.py of this machine, inside the cluster's network, use its S3 server."""


def up() -> Running:
    """Kubeflow Pipelines on the running test cluster, or on a new one.

    Raises:
        UsageError: the machine lacks something, or a part does not start.
    """
    if lacks := programs.missing():
        raise UsageError("no Kubeflow Pipelines on this machine", expected="; ".join(lacks))
    built = programs.build()
    if lifecycle.current() is None:
        lifecycle.up(queue=False)
    began = time.monotonic()
    _start(built)
    UP.write_text(json.dumps({"programs": str(built.folder)}))
    print(f"Kubeflow Pipelines up in {time.monotonic() - began:.1f} s: {ENDPOINT} in the cluster's network")
    found = current()
    assert found is not None
    return found


def current() -> Running | None:
    """The running one, with the packages as the checkout has them now."""
    if not UP.exists() or lifecycle.current() is None or not control.answers(f"{ENDPOINT}/apis/v2beta1/healthz"):
        return None
    keys = {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": "us-east-1"}
    return Running(cluster_file(lifecycle.renew_image()), {**keys, "AWS_ENDPOINT_URL": f"http://{GATEWAY}:{S3_PORT}"})


def cluster_file(digest: str) -> Cluster:
    """k8s/clusters/test.yaml with this cluster's images and storage, and with a pool for the stages."""
    images = [f"images.{name}={repository}@{digest}" for name, repository in REPOSITORIES.items()]
    cluster = load_cluster("test", [f"storage.endpoint=http://{S3_HOST}:{S3_PORT}", *images])
    cpu = cluster.pools["cpu"]
    label = "qwenvl-train/pool"
    pools = {
        **cluster.pools,
        "cpu": cpu.model_copy(update={"labels": {label: CPU_NODE.pool}}),
        RANKS: cpu.model_copy(update={"labels": {label: "gpu-a"}}),
    }
    return cluster.model_copy(update={"namespace": objects.JOBS, "pools": pools})


def as_yaml(cluster: Cluster) -> str:
    return yaml.safe_dump(cluster.model_dump(mode="json", exclude_none=True))


def _start(built: Programs) -> None:
    (HOME / "home" / ".kube").mkdir(parents=True, exist_ok=True)
    (HOME / "home" / ".kube" / "config").write_text(KUBECONFIG.read_text())  # some programs read no other place
    resolver = f"search {NAMESPACE}.svc.cluster.local\nnameserver {DNS_SERVICE}\noptions timeout:1 attempts:1\n"
    (HOME / "resolv.conf").write_text(resolver)
    with ThreadPoolExecutor(max_workers=5) as pool:
        parts = [pool.submit(part) for part in (_database, _storage, lambda: _metadata(built))]
        parts.append(pool.submit(_load_images, built))
        _install(built)
        for part in parts:
            part.result()
    _api_server(built)
    _controllers(built)


def _install(built: Programs) -> None:
    control.apply(objects.kinds(built))
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    control.apply([namespace, *objects.for_jobs()])
    control.apply(objects.backend(built))
    control.kubectl("taint", "node", CPU_NODE.name, f"{GPU}-", check=False)
    established = '{.status.conditions[?(@.type=="Established")].status}'
    wait_for(
        "the kind Workflow",
        lambda: "True" in control.kubectl("get", "crd", "workflows.argoproj.io", "-o", f"jsonpath={established}"),
    )


# ---------------------------------------------------------------- what it keeps things in


def _database() -> None:
    """MariaDB: the driver for PostgreSQL is dead code in this version of Kubeflow Pipelines."""
    data, socket = HOME / "mariadb", HOME / "mariadb.sock"
    options = ["--no-defaults", "--user=root", f"--datadir={data}"]
    run("mariadb-install-db", *options, "--auth-root-authentication-method=normal", "--skip-test-db")
    spawn(
        "mariadb", "mariadbd", *options, "--bind-address=127.0.0.1", "--port=3306", f"--socket={socket}",
        f"--pid-file={HOME}/mariadb.pid", "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M",
        "--skip-name-resolve", "--performance-schema=OFF", "--skip-grant-tables",
    )  # fmt: skip
    asked = ("mariadb", "--no-defaults", f"--socket={socket}", "--batch", "--execute", "select version()")
    wait_for("MariaDB", lambda: "MariaDB" in run(*asked, check=False), name="mariadb")


def _storage() -> None:
    """SeaweedFS. Its parts meet at sockets in the machine's /tmp that are named by their ports, whatever the network:
    two servers of one machine must have other ports, or the second takes over the first one's."""
    from tests.state.weed import program

    folder = HOME / "weed"
    folder.mkdir(exist_ok=True)
    spawn(
        "seaweedfs", program() or "weed", "-logtostderr", "server", f"-ip={GATEWAY}", "-s3", f"-dir={folder}",
        f"-s3.port={S3_PORT}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64", "-volume.max=50", "-master.port=9433", "-volume.port=18080",
        "-filer.port=18433",
        env={"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
    )  # fmt: skip
    made = (
        "curl", "-sf", "-o", "/dev/null", "-w", "%{http_code}", "-X", "PUT", "--aws-sigv4", "aws:amz:us-east-1:s3",
        "--user", f"{ACCESS}:{SECRET_KEY}", f"http://{GATEWAY}:{S3_PORT}/{BUCKET}",
    )  # fmt: skip
    wait_for("the S3 server", lambda: run(*inside(*made), check=False) == "200", name="seaweedfs")


def _metadata(built: Programs) -> None:
    spawn(
        "ml-metadata", sys.executable, "-S", MINE / "metadata_server.py", f"{GATEWAY}:{METADATA_PORT}",
        HOME / "metadata.sqlite", env={"PYTHONPATH": str(built.folder / "metadata")},
    )  # fmt: skip
    log = RUN / "log" / "ml-metadata.log"
    wait_for("ML Metadata", lambda: "ML Metadata on" in log.read_text(), name="ml-metadata")


# ---------------------------------------------------------------- what runs pipelines


PRIVATE = (
    "mount -t tmpfs none /run && mkdir -p /run/secrets/kubeflow/tokens && "
    "printf single-user > /run/secrets/kubeflow/tokens/persistenceagent-sa-token && "
    'resolver=$(readlink -m /etc/resolv.conf) && mkdir -p "$(dirname "$resolver")" && touch "$resolver" && '
    'mount --bind "$0" "$resolver" && exec "$@"'
)
"""In a mount namespace of its own: a token where only this place is read, and the cluster's DNS, without which gRPC's
look-ups of localhost block for 20 s each."""


def _spawn(name: str, *command: object, env: dict[str, str]) -> None:
    spawn(
        name, "unshare", "--mount", "--propagation", "private", "sh", "-c", PRIVATE, HOME / "resolv.conf", *command,
        env={"HOME": str(HOME / "home"), "KUBECONFIG": str(KUBECONFIG), "POD_NAMESPACE": NAMESPACE,
             "NAMESPACE": NAMESPACE, **env},
    )  # fmt: skip


def _api_server(built: Programs) -> None:
    folder = HOME / "config"
    folder.mkdir(exist_ok=True)
    settings = json.loads((built.folder / "manifests" / "config.json").read_text())
    settings |= {"InitConnectionTimeout": "30s", "DBDriverName": "mysql"}
    settings["ObjectStoreConfig"] |= {"AccessKey": ACCESS, "SecretAccessKey": SECRET_KEY}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "samples.json").write_text(json.dumps({"loadSamplesOnRestart": False, "pipelines": []}))
    env = {
        "DBCONFIG_MYSQLCONFIG_HOST": "127.0.0.1",
        "DBCONFIG_MYSQLCONFIG_PORT": "3306",
        "DBCONFIG_MYSQLCONFIG_USER": "root",
        "DBCONFIG_MYSQLCONFIG_PASSWORD": "",
        "OBJECTSTORECONFIG_HOST": GATEWAY,
        "OBJECTSTORECONFIG_PORT": str(S3_PORT),
        "OBJECTSTORECONFIG_REGION": "us-east-1",
        "MINIO_SERVICE_SERVICE_HOST": GATEWAY,
        "MINIO_SERVICE_SERVICE_PORT": str(S3_PORT),
        "METADATA_GRPC_SERVICE_SERVICE_HOST": GATEWAY,
        "METADATA_GRPC_SERVICE_SERVICE_PORT": str(METADATA_PORT),
        "ML_PIPELINE_VISUALIZATIONSERVER_SERVICE_HOST": "127.0.0.1",
        "ML_PIPELINE_VISUALIZATIONSERVER_SERVICE_PORT": "8890",
        "V2_DRIVER_IMAGE": BACKEND_IMAGE,
        "V2_LAUNCHER_IMAGE": BACKEND_IMAGE,
        "PUBLISH_LOGS": "true",
        "TAG_NAME": VERSION,
    }
    _spawn("ml-pipeline", built["apiserver"], f"--config={folder}", f"--sampleconfig={folder}/samples.json",
           "-logtostderr=true", env=env)  # fmt: skip
    url = f"{ENDPOINT}/apis/v2beta1/healthz"
    wait_for("Kubeflow Pipelines' API server", lambda: control.answers(url), name="ml-pipeline", limit_s=120)


def _controllers(built: Programs) -> None:
    _spawn(
        "workflow-controller", built["workflow-controller"], "--kubeconfig", KUBECONFIG, "--namespaced",
        "--namespace", NAMESPACE, "--configmap", objects.WORKFLOW_CONFIG, "--executor-image", EXECUTOR_IMAGE,
        "--loglevel", "info",
        env={"ARGO_NAMESPACE": NAMESPACE, "LEADER_ELECTION_DISABLE": "true", "DEFAULT_REQUEUE_TIME": "200ms"},
    )  # fmt: skip
    _spawn(
        "persistence-agent", built["persistence_agent"], "--kubeconfig", KUBECONFIG, "--namespace", NAMESPACE,
        "--mlPipelineAPIServerName", GATEWAY, "--ttlSecondsAfterWorkflowFinish", "86400", "--numWorker", "2",
        "-logtostderr=true", env={},
    )  # fmt: skip


# ---------------------------------------------------------------- images


def _load_images(built: Programs) -> None:
    """What a step's pod has besides the step: on the node where the steps run."""
    nodes.load_images(CPU_NODE, [
        _image("kfp", BACKEND_IMAGE, built, "driver", "launcher-v2"),
        _image("argoexec", EXECUTOR_IMAGE, built, "argoexec"),
    ])  # fmt: skip


def _image(name: str, tag: str, built: Programs, *names: str) -> Image:
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        add_skeleton(tar)
        add_folder(tar, PROGRAMS[1:])
        for program in names:
            add_file(tar, f"{PROGRAMS[1:]}/{program}", built[program].read_bytes(), mode=0o755)
    settings: dict[str, object] = {"Env": [f"PATH={PROGRAMS}:/usr/bin:/bin"]}
    if len(names) == 1:
        settings["Entrypoint"] = list(names)
    return archive(name, tag, layer.getvalue(), settings)


def environment() -> dict[str, str]:
    """For a shell inside the cluster's network (`python -m tests.kfp exec`)."""
    found = current()
    if found is None:
        raise UsageError("no Kubeflow Pipelines is up here", do="python -m tests.kfp up")
    path = HOME / "cluster.yaml"
    path.write_text(as_yaml(found.cluster))
    return {
        **os.environ,
        **found.storage,
        "KUBECONFIG": str(KUBECONFIG),
        "KFP_ENDPOINT": ENDPOINT,
        "KF_PIPELINES_ENDPOINT": ENDPOINT,
        "KFP_CLUSTER": str(path),
        "KFP_OUT": f"s3://{BUCKET}/kfp-tests",
    }
