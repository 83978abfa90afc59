"""Where the test cluster lives on this machine: folders, addresses, nodes. Everything of it carries one name.

~/.cache/qwenvl-train/test-cluster/programs-KEY/   what go.mod, go.sum and the sources build, kept
~/.cache/qwenvl-train/test-cluster/run/            the running cluster: gone after `down`
/run/netns/qwenvl-test-cluster                     its network
/sys/fs/cgroup/*/qwenvl-test-cluster/              every process of it, and of its pods

QWENVL_TEST_CLUSTER=WORD makes all of it another cluster's, beside the first: run-WORD, qwenvl-test-cluster-WORD.
Addresses are the same in both: each has a network of its own.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UsageError


def suffix(word: str) -> str:
    """What tells one cluster of this machine from another; "" for the usual one.

    Raises:
        UsageError: not a word that fits into names of cgroups and sockets.
    """
    if not re.fullmatch(r"[a-z0-9]{0,12}", word):
        expected = "at most 12 small letters and digits, or nothing"
        raise UsageError("no name for a test cluster", where="QWENVL_TEST_CLUSTER", expected=expected, got=word)
    return f"-{word}" if word else ""


WHICH = suffix(os.environ.get("QWENVL_TEST_CLUSTER", ""))
NAME = f"qwenvl-test-cluster{WHICH}"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qwenvl-train"
HOME = CACHE / "test-cluster"
RUN = HOME / f"run{WHICH}"
LOCK = HOME / f".lock{WHICH}"
LAST_FAILURE = HOME / f"logs-of-the-last-failure{WHICH}"
PKI, LOGS, IMAGES = RUN / "pki", RUN / "log", RUN / "images"
KUBECONFIG = RUN / "admin.kubeconfig"
AUDIT = LOGS / "audit.jsonl"
UP = RUN / "up.json"
"""Written when the cluster is whole; without it, what lies in `RUN` is a leftover."""

NETNS = Path("/run/netns") / NAME
CGROUPS = Path("/sys/fs/cgroup")
DAEMONS = CGROUPS / "pids" / NAME / "daemons"
"""Every program is started in this cgroup, so that it and its children are found whatever becomes of their parent."""

GATEWAY, POD_RANGE = "10.244.0.1", "10.244.0.0/16"
SERVICE_RANGE, API_SERVICE, DNS_SERVICE = "10.96.0.0/16", "10.96.0.1", "10.96.0.10"
API = f"https://{GATEWAY}:443"
"""Port 443 on the bridge and on the Service's own address, which the loopback device carries: no kube-proxy needed."""

GPU = "nvidia.com/gpu"
TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}


@dataclass(frozen=True)
class Node:
    """One kubelet with its containerd. Pods of pool `gpu` of k8s/clusters/test.yaml go to nodes of pool gpu-a."""

    index: int
    name: str
    pool: str
    gpus: int = 8

    @property
    def folder(self) -> Path:
        return RUN / self.name

    @property
    def socket(self) -> Path:
        return self.folder / "containerd.sock"

    @property
    def cgroup(self) -> str:
        return f"/{NAME}/{self.name}"

    @property
    def labels(self) -> dict[str, str]:
        return {"qwenvl-train/pool": self.pool, "qwenvl-train/fabric": f"{self.pool}-rack"}


NODES = (Node(0, "gpu-a-0", "gpu-a"), Node(1, "gpu-a-1", "gpu-a"), Node(2, "gpu-b-0", "gpu-b"))
"""Two nodes of one pool, for a stage over two nodes, and one of another."""
