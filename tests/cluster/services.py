"""What stages talk to beside the API: a real S3 server and a real MLflow server, programs of the cluster like others.

Both listen on the bridge; pods know them by the names of headless Services, so that no proxy is needed. They end with
the cluster.
"""

from __future__ import annotations

import os
import sys
import zlib
from typing import Any

from tests.cluster import control, place
from tests.cluster.processes import pid_of, spawn, wait_for
from tests.state.weed import BUCKET, arguments, program
from trainer.observe.tracking import LIMITS

Json = dict[str, Any]
NAMESPACE = "qwenvl-test-services"
S3, MLFLOW = "s3", "mlflow"
MLFLOW_PORT = 5000
SHIFT = zlib.crc32(place.NAME.encode()) % 2000
"""SeaweedFS listens in /tmp too, under names made of its ports: two clusters of a machine need others, though each has
a network of its own. It listens for gRPC at each port + 10000; all of them lie below those that clients are given."""
PORTS = {name: 12000 + SHIFT + 2000 * index for index, name in enumerate(("master", "volume", "filer", "s3"))}
S3_PORT = PORTS["s3"]
S3_ENV = {
    "AWS_ENDPOINT_URL": f"http://{place.GATEWAY}:{S3_PORT}",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""For processes that are in the cluster's network and not in a pod: launchers, tests."""
MLFLOW_URI = f"http://{place.GATEWAY}:{MLFLOW_PORT}"


def address(name: str, port: int) -> str:
    """As pods see it."""
    return f"http://{name}.{NAMESPACE}.svc:{port}"


def start_s3() -> None:
    """One that runs already stays."""
    if pid_of(S3) is None:
        weed = program()
        assert weed is not None, "the dev extra carries SeaweedFS"
        folder = place.RUN / "weed"
        folder.mkdir(exist_ok=True)
        spawn(S3, *arguments(weed, folder, place.GATEWAY, PORTS), env=S3_ENV)
        control.apply(_service(S3, S3_PORT))


def use_s3() -> None:
    """In a process that is in the cluster's network: storage means the cluster's server, once that has its bucket."""
    import fsspec
    import s3fs

    os.environ.update(S3_ENV)
    s3fs.S3FileSystem.clear_instance_cache()  # those of trainer/storage.py that know another server
    files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)

    def has_bucket() -> bool:
        try:
            if not files.exists(BUCKET):
                files.mkdir(BUCKET)
            files.pipe_file(f"{BUCKET}/ready", b"yes")
        except Exception:  # whatever a server that has just begun says
            return False
        return True

    wait_for("the S3 server", has_bucket, name=S3)


def start_mlflow() -> None:
    """As the chart starts it; with SQLite."""
    if pid_of(MLFLOW) is None:
        folder = place.RUN / "mlflow"
        folder.mkdir(exist_ok=True)
        hosts = f"{MLFLOW}.{NAMESPACE}.svc:{MLFLOW_PORT},{place.GATEWAY}:{MLFLOW_PORT}"
        spawn(
            MLFLOW, sys.executable, "-m", "mlflow", "server", f"--host={place.GATEWAY}", f"--port={MLFLOW_PORT}",
            "--workers=1", f"--backend-store-uri=sqlite:///{folder}/mlflow.db", "--serve-artifacts",
            f"--artifacts-destination={folder}/artifacts", f"--allowed-hosts={hosts}",
            env={**LIMITS, "HOME": str(folder), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
        control.apply(_service(MLFLOW, MLFLOW_PORT))
    wait_for("MLflow", lambda: control.answers(f"{MLFLOW_URI}/health"), name=MLFLOW, limit_s=120)


def _service(name: str, port: int) -> list[Json]:
    metadata = {"name": name, "namespace": NAMESPACE}
    ports = [{"name": name, "port": port}]
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"clusterIP": "None", "ports": ports}},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [place.GATEWAY], "conditions": {"ready": True}}],
            "ports": ports,
        },
    ]
