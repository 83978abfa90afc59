"""training-operator and Kueue, as processes beside the API server; their webhooks as shipped.

A webhook's configuration names a Service. It has no selector here but an EndpointSlice at the bridge's address, where
the process listens, and the API server resolves Services to their endpoints (--enable-aggregator-routing). The
certificates that the operators would make for themselves, after a minute and a half, lie there beforehand.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import pki
from tests.cluster.control import answers, apply
from tests.cluster.place import GATEWAY, RUN
from tests.cluster.processes import spawn, wait_for
from tests.cluster.programs import Programs

Json = dict[str, Any]

CERTIFICATES = "/tmp/k8s-webhook-server/serving-certs"
"""Where the training-operator reads them, whatever TMPDIR says."""
QUEUES = Path(__file__).parent / "queues.yaml"
OPERATOR, KUEUE = "training-operator", "kueue"
NOT_APPLIED = ("Deployment", "Secret", "Service", "APIService")


def install_training_operator(programs: Programs) -> None:
    objects = [
        one
        for one in yaml.load_all(programs.manifests(OPERATOR), Loader=yaml.CSafeLoader)
        if one["kind"] not in NOT_APPLIED
        and (one["kind"] != "CustomResourceDefinition" or one["metadata"]["name"] == "pytorchjobs.kubeflow.org")
    ]
    folder = certificates(OPERATOR, "kubeflow", "training-operator", "training-operator")
    service = webhook_service("kubeflow", "training-operator", "training-operator-webhook-cert", folder, 9443)
    apply([*objects, *service])


def start_training_operator(programs: Programs) -> None:
    """In a mount namespace of its own, where /tmp holds its certificates and nothing of the machine's."""
    script = f'mount -t tmpfs none /tmp && mkdir -p {CERTIFICATES} && cp "$0"/* {CERTIFICATES} && exec "$@"'
    spawn(
        OPERATOR, "unshare", "--mount", "--propagation", "private", "sh", "-c", script, RUN / "certificates" / OPERATOR,
        programs["training-operator"], f"--kubeconfig={RUN}/operators.kubeconfig", "--enable-scheme=pytorchjob",
        "--metrics-bind-address=127.0.0.1:8080", "--health-probe-bind-address=127.0.0.1:8081",
        "--controller-threads=4", "--kube-api-qps=200", "--kube-api-burst=300", "--zap-log-level=info",
    )  # fmt: skip


def training_operator_ready() -> None:
    wait_for("training-operator", lambda: answers("http://127.0.0.1:8081/readyz"), name=OPERATOR)


def install_kueue(programs: Programs) -> None:
    objects = [
        one
        for one in yaml.load_all(programs.manifests(KUEUE), Loader=yaml.CSafeLoader)
        if one["kind"] not in NOT_APPLIED
    ]
    objects.sort(key=lambda one: "WebhookConfiguration" in one["kind"])  # last: they match Pods and Jobs
    folder = certificates(KUEUE, "kueue-system", "kueue", "kueue-webhook-service")
    service = webhook_service("kueue-system", "kueue-webhook-service", "kueue-webhook-server-cert", folder, 9453)
    apply([*objects, *service])


def start_kueue(programs: Programs) -> None:
    settings = {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": "kueue-system",
        "health": {"healthProbeBindAddress": "127.0.0.1:8091"},
        "metrics": {"bindAddress": "127.0.0.1:8092"},
        "webhook": {"port": 9453, "certDir": str(RUN / "certificates" / KUEUE)},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {
            "enable": True,
            "webhookServiceName": "kueue-webhook-service",
            "webhookSecretName": "kueue-webhook-server-cert",
        },
        "integrations": {"frameworks": ["batch/job", "kubeflow.org/pytorchjob"]},
    }
    (RUN / "kueue.json").write_text(json.dumps(settings))
    spawn(
        KUEUE, programs["kueue"], f"--config={RUN}/kueue.json", "--feature-gates=VisibilityOnDemand=false",
        env={"KUBECONFIG": str(RUN / "operators.kubeconfig")},
    )  # fmt: skip


def kueue_ready() -> None:
    wait_for("Kueue", lambda: answers("http://127.0.0.1:8091/readyz"), name=KUEUE, limit_s=90)
    wait_for("Kueue's webhooks", lambda: _try(QUEUES.read_text()), name=KUEUE)


def _try(text: str) -> bool:
    try:
        apply(text)
    except Exception:
        return False
    return True


def certificates(name: str, namespace: str, common: str, service: str) -> Path:
    """Of an operator's webhook. As the operator's own rotator would make them: RSA, and a CA with a name of its own."""
    folder = RUN / "certificates" / name
    ca = pki.authority(folder, f"{common}-ca", organization=common, names=(f"{common}-ca",), rsa_key=True)
    host = f"{service}.{namespace}.svc"
    pki.issue(folder, "tls", host, ca, names=(host,), rsa_key=True)
    return folder


def webhook_service(namespace: str, service: str, secret: str, folder: Path, target: int) -> list[Json]:
    """The Service that a webhook's configuration names, with the process beside the cluster as its only endpoint."""
    files = ("ca.crt", "ca.key", "tls.crt", "tls.key")
    endpoint_port = {"name": "webhook", "port": target, "protocol": "TCP"}
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": secret, "namespace": namespace},
            "data": {file: base64.b64encode((folder / file).read_bytes()).decode() for file in files},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": service, "namespace": namespace},
            "spec": {"ports": [{"name": "webhook", "port": 443, "targetPort": target}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "addressType": "IPv4",
            "metadata": {
                "name": f"{service}-beside",
                "namespace": namespace,
                "labels": {"kubernetes.io/service-name": service},
            },
            "endpoints": [{"addresses": [GATEWAY], "conditions": {"ready": True}}],
            "ports": [endpoint_port],
        },
    ]
