"""etcd, the API server, controller-manager, scheduler and DNS of the test cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from k8s.tools import tool
from tests.cluster.place import AUDIT, DNS_SERVICE, GATEWAY, KUBECONFIG, PKI, RUN, SERVICE_RANGE
from tests.cluster.processes import inside, pid_of, run, spawn, wait_for
from tests.cluster.programs import Programs

Json = dict[str, Any]
POLICIES = Path(__file__).parent / "policies.yaml"
AUDITED = ("", "batch", "kubeflow.org", "ray.io", "trainer.kubeflow.org")
"""API groups of what a launcher may ask for."""


def kubectl(*arguments: object, text: str | None = None, check: bool = True) -> str:
    return run(*inside(tool("kubectl"), "--kubeconfig", KUBECONFIG, *arguments), text=text, check=check)


def apply(objects: Sequence[Json] | str) -> None:
    """Server-side apply; text is YAML."""
    text = objects if isinstance(objects, str) else yaml.safe_dump_all(objects)
    kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", text=text)


def answers(url: str) -> bool:
    """Whether a probe inside the cluster's network answers."""
    code = run(*inside("curl", "-sk", "-o", "/dev/null", "-w", "%{http_code}", url), check=False)
    return code.startswith("2")  # what -w says is said of a failure as well


def start_etcd(programs: Programs) -> None:
    # Without fsync: the data lives as long as the tests.
    spawn(
        "etcd", programs["etcd"], "--data-dir", RUN / "etcd", "--listen-client-urls", "http://127.0.0.1:2379",
        "--advertise-client-urls", "http://127.0.0.1:2379", "--listen-peer-urls", "http://127.0.0.1:2380",
        "--unsafe-no-fsync", "--logger", "zap", "--log-level", "warn",
    )  # fmt: skip


def start_api_server(programs: Programs) -> None:
    """Audited, so that a test sees which verbs an account used and what it was refused."""
    policy = PKI / "audit.yaml"
    policy.write_text(
        json.dumps(
            {
                "apiVersion": "audit.k8s.io/v1",
                "kind": "Policy",
                "omitStages": ["RequestReceived"],  # a watch is told when it begins
                "rules": [
                    {"level": "Metadata", "userGroups": ["system:serviceaccounts"],
                     "resources": [{"group": group} for group in AUDITED]},
                    {"level": "None"},
                ],
            }
        )
    )  # fmt: skip
    spawn(
        "kube-apiserver", programs["kube-apiserver"], "--etcd-servers=http://127.0.0.1:2379", "--secure-port=443",
        "--bind-address=0.0.0.0", f"--advertise-address={GATEWAY}", f"--tls-cert-file={PKI}/apiserver.crt",
        f"--tls-private-key-file={PKI}/apiserver.key", f"--client-ca-file={PKI}/ca.crt",
        f"--token-auth-file={PKI}/tokens.csv", f"--service-account-key-file={PKI}/sa.pub",
        f"--service-account-signing-key-file={PKI}/sa.key",
        "--service-account-issuer=https://kubernetes.default.svc", f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
        f"--kubelet-client-certificate={PKI}/kubelet-client.crt",
        f"--kubelet-client-key={PKI}/kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP,Hostname", "--enable-aggregator-routing",
        f"--audit-policy-file={policy}", f"--audit-log-path={AUDIT}",
    )  # fmt: skip


def api_server_ready() -> None:
    wait_for("the API server", lambda: answers(f"https://{GATEWAY}/readyz"), name="kube-apiserver")


def start_control_plane(programs: Programs) -> None:
    start_etcd(programs)
    start_api_server(programs)
    api_server_ready()
    spawn(
        "kube-controller-manager", programs["kube-controller-manager"],
        f"--kubeconfig={RUN}/kube-controller-manager.kubeconfig", "--leader-elect=false",
        f"--service-account-private-key-file={PKI}/sa.key", f"--root-ca-file={PKI}/ca.crt",
        "--use-service-account-credentials", "--bind-address=127.0.0.1",
        # Lost nodes are noticed in seconds here, in a minute by default.
        "--node-monitor-grace-period=6s", "--node-monitor-period=1s", "--concurrent-deployment-syncs=1",
    )  # fmt: skip
    spawn(
        "kube-scheduler", programs["kube-scheduler"], f"--kubeconfig={RUN}/kube-scheduler.kubeconfig",
        "--leader-elect=false", "--bind-address=127.0.0.1",
    )  # fmt: skip
    wait_for("the namespace default", lambda: "default" in kubectl("get", "namespace", "default", check=False))


def start_dns(programs: Programs) -> None:
    """CoreDNS beside the control plane, on the Service's address; pods resolve nothing outside the cluster."""
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    spec = {"clusterIP": DNS_SERVICE, "ports": ports}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns", "namespace": "kube-system"}}
    apply([{**service, "spec": spec}])
    (RUN / "Corefile").write_text(
        f"""cluster.local:53 {{
    bind {DNS_SERVICE}
    errors
    ready 127.0.0.1:8181
    kubernetes cluster.local {{
        kubeconfig {KUBECONFIG}
        ttl 1
    }}
}}
.:53 {{
    bind {DNS_SERVICE}
    errors
}}
"""
    )
    spawn("coredns", programs["coredns"], "-conf", RUN / "Corefile", "-quiet")
    wait_for("DNS", lambda: answers("http://127.0.0.1:8181/ready"), name="coredns")


def running() -> list[tuple[str, int, int]]:
    """(program, pid, resident MiB) of what runs."""
    rows = []
    for path in sorted((RUN / "pids").glob("*")):
        if (pid := pid_of(path.name)) is not None:
            status = Path(f"/proc/{pid}/status").read_text()
            rows.append((path.name, pid, int(status.split("VmRSS:")[1].split()[0]) // 1024))
    return rows
